"""Experts with shared low-rank factors in tiles: the torch reference (TileQ; notes, section 5).

gate and up meet the same inputs, so all input factors are one dense product; what comes out goes to the experts and
through the output factor of their grid column, column by column. down's inputs are every expert's own: its input
factors work row by row, their answers are weighted and added up by token and grid column, and all output factors are
one dense product of that sum. No projection of a gated expert can do both: the sum over experts comes after the gate.
Residuals are met by rotated inputs and decoded one matrix at a time.

Legend: T tokens, k experts per token, C = T k choices sorted by expert, S tokens of one expert, I inputs, O outputs,
M x N grid, R rank.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.format.records import decode_matrix
from moeq.layouts.grouped.packed import PackedLayer
from moeq.layouts.grouped.reference import Linear, linear, product
from moeq.layouts.tiled.facts import SideFacts
from moeq.layouts.tiled.stored import Sides
from moeq.transforms.rotation import rotate, unrotate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TiledLayer:
    """All experts of one layer.

    Attributes:
        residual: the packed residuals, of rotated inputs.
        sides: projection -> its sides.
        side_data: the blob of all sides, uint8; None if nobody gave it to kernels.
        tiles: how to read it, int64, (P, 8), as on disk, on the CPU; likewise.
        facts: projection -> what kernels on a device want to know of its sides; None on a CPU.
    """

    residual: PackedLayer
    sides: dict[str, Sides]
    side_data: Tensor | None = None
    tiles: Tensor | None = None
    facts: dict[str, SideFacts] | None = None

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.residual.num_experts

    def dense(self, expert: int, projection: str) -> Tensor:
        """The matrix (O, I) that residual and factors stand for, float32."""
        matrix, sides = self.residual.matrix(expert, projection), self.sides[projection]
        w_OI = decode_matrix(matrix.record, matrix.spec, matrix.shape)
        order_I = sides.order(expert)
        if order_I is not None:
            w_OI = unrotate(w_OI, order_I, sides.form.block, sides.form.plain)
        return w_OI + sides.low_rank(expert) if sides.form.rank else w_OI


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Choices:
    """Who answers whom, sorted by expert.

    Attributes:
        token_C: token of each choice.
        expert_C: its expert.
        counts: choices of each expert.
    """

    token_C: Tensor
    expert_C: Tensor
    counts: list[int]


def experts(
    module: nn.Module,
    layer: TiledLayer,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    linear: Linear = linear,
) -> Tensor:
    """The routed experts of one layer.

    Args:
        module: the family's experts module, stripped of its weights; gives activation and biases.
        layer: the packed weights.
        hidden_states: (T, H).
        top_k_index: (T, k).
        top_k_weights: (T, k).
        linear: computes x W^T for one residual.

    Returns:
        (T, H) in the dtype of `hidden_states`.
    """
    order, counts = hooks.by_expert(top_k_index, layer.residual.num_experts)
    total = sum(counts)
    if not total:
        return torch.zeros_like(hidden_states)
    experts_E = torch.arange(len(counts), device=order.device)
    choices = _Choices(
        token_C=order[:total] // top_k_index.shape[-1],
        expert_C=experts_E.repeat_interleave(torch.tensor(counts, device=order.device)),
        counts=counts,
    )
    inner = {name: _in_shared(layer.sides[name], hidden_states, choices) for name in layer.sides if name != "down"}
    parts, inputs_down = [], []
    for expert, part in hooks.spans(counts):
        x_SH = hidden_states[choices.token_C[part]]
        outs = {name: _residual(layer, expert, name, x_SH, linear) + low_CI[part] for name, low_CI in inner.items()}
        z_SI = hooks.activation(module, expert, outs.get("gate"), outs["up"])
        inputs_down.append(z_SI)
        parts.append(_residual(layer, expert, "down", z_SI, linear))
    down = layer.sides["down"]
    if not down.form.rank:
        parts = [hooks.finish(module, e, part) for (e, _), part in zip(hooks.spans(counts), parts, strict=True)]
        return hooks.combine(parts, order, top_k_weights, hidden_states)
    q_CR = _through(torch.cat(inputs_down), down, choices, side=0)
    if not hooks.answers_plainly(module):  # a bias, or a norm of every expert's answer: known before it is weighted
        low_CH = _through(q_CR, down, choices, side=1)
        parts = [
            hooks.finish(module, e, part + low_CH[span])
            for (e, span), part in zip(hooks.spans(counts), parts, strict=True)
        ]
        return hooks.combine(parts, order, top_k_weights, hidden_states)
    weighted_CR = q_CR.float() * top_k_weights.reshape(-1)[order[:total]].float().unsqueeze(-1)
    column_C = down.cells()[:, 1][choices.expert_C]
    columns = down.form.columns
    sum_TNR = weighted_CR.new_zeros(len(hidden_states) * columns, down.form.rank)
    sum_TNR = sum_TNR.index_add(0, choices.token_C * columns + column_C, weighted_CR)
    sum_T = sum_TNR.view(len(hidden_states), -1).to(hidden_states.dtype)
    low_TH = product(sum_T, lambda dtype: down.outputs(dtype).T)
    return hooks.combine(parts, order, top_k_weights, hidden_states) + low_TH


def _residual(layer: TiledLayer, expert: int, projection: str, x_SI: Tensor, linear: Linear) -> Tensor:
    """What the residual of an expert answers, (S, O)."""
    sides = layer.sides[projection]
    order_I = sides.order(expert)
    if order_I is not None:
        x_SI = rotate(x_SI, order_I, sides.form.block, sides.form.plain)
    return linear(x_SI, layer.residual.matrix(expert, projection))


def _in_shared(sides: Sides, x_TI: Tensor, choices: _Choices) -> Tensor:
    """What the factors of gate or up answer to each choice, (C, O)."""
    if not sides.form.rank:
        return x_TI.new_zeros(len(choices.token_C), sides.shape[0])
    if sides.form.scales == "expert":  # every expert has inputs of its own
        z_CR = _through(x_TI[choices.token_C], sides, choices, side=0)
    else:
        all_TMR = product(x_TI, sides.inputs).view(len(x_TI), sides.form.rows, sides.form.rank)
        row_C = sides.cells()[:, 0][choices.expert_C]
        z_CR = all_TMR[choices.token_C, row_C]
    return _through(z_CR, sides, choices, side=1)


def _through(x_C: Tensor, sides: Sides, choices: _Choices, *, side: int) -> Tensor:
    """Each choice through the factor of its grid row (side 0: I to R) or column (side 1: R to O), group by group."""
    if side == 0 and sides.form.scales == "expert":
        x_C = (x_C.float() / sides.scales()[choices.expert_C]).to(x_C.dtype)
    group_C = sides.cells()[:, side][choices.expert_C]
    order_C = torch.argsort(group_C, stable=True)
    sizes = torch.bincount(group_C, minlength=(sides.form.rows, sides.form.columns)[side]).tolist()
    parts = [
        product(part, partial(_factor, sides, side, group))
        for group, part in enumerate(x_C[order_C].split(sizes))
        if len(part)
    ]
    return torch.cat(parts)[torch.argsort(order_C)]


def _factor(sides: Sides, side: int, group: int, dtype: torch.dtype) -> Tensor:
    return sides.inputs(dtype, group) if side == 0 else sides.outputs(dtype, group).T

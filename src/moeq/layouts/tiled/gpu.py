"""Experts with shared low-rank factors on a GPU: as `moeq.layouts.tiled.reference`, from packed bytes, without waiting
for the host.

All input factors of a projection are one packed product, of which each choice keeps its grid row; output factors are
rows that are added up from packed bytes by grid column. Where only gate and up have factors and nothing is rotated, the
residuals go through the same launches as a grouped layer, which add the factors' answers before the activation.
From `DECODE_FROM` rows per expert on, what an expert has is decoded once.

Legend: T tokens, k experts per token, S = T * k choices, I inputs, O outputs, M x N grid, R rank.
"""

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.kernels import gpu_rows
from moeq.layouts.grouped import gpu
from moeq.layouts.tiled.facts import SideFacts
from moeq.layouts.tiled.reference import TiledLayer


def experts(
    module: nn.Module, layer: TiledLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """`moeq.layouts.tiled.reference.experts` on a GPU, or None if the call is not for Triton."""
    residual = layer.residual
    if not gpu.wanted(hidden_states, top_k_weights) or residual.data.device != hidden_states.device:
        return None
    if layer.facts is None or residual.facts is None:
        return None
    return run_experts(module, layer, hidden_states, top_k_index, top_k_weights)


def run_experts(
    module: nn.Module, layer: TiledLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `experts`, without asking whether the tensors are on a GPU."""
    residual, sides = layer.residual, layer.sides
    x_TH, index_Tk = hidden_states.contiguous(), top_k_index.contiguous()
    forms = {name: sides[name].form for name in sides}
    lows = {name: _low(layer, name, x_TH, index_Tk) for name in sides if name != "down"}
    plain = not forms["down"].rank and all(form.orders == "none" for form in forms.values())
    if plain and "gate" in sides and hooks.gates_by_silu(module, residual.shapes["up"][0]):
        low_S2O = torch.stack([lows["gate"], lows["up"]], 1) if forms["gate"].rank or forms["up"].rank else None
        return gpu.gated(residual, x_TH, index_Tk, top_k_weights, low_S2O)
    expert_S = index_Tk.view(-1).clamp(max=residual.num_experts - 1)
    outs = {name: _residual(layer, name, x_TH, index_Tk) + low_SO for name, low_SO in lows.items()}
    inner_SI = hooks.activation(module, expert_S, outs.get("gate"), outs["up"])
    out_SH = _residual(layer, "down", inner_SI, index_Tk)
    low_TH = None
    if forms["down"].rank:
        q_SR = _narrow(layer, "down", inner_SI, expert_S)
        if hooks.answers_plainly(module):
            low_TH = _shared_down(layer, q_SR, index_Tk, top_k_weights)
        else:  # a bias, or a norm of every expert's answer: known before it is weighted
            out_SH = out_SH + _widen(layer, "down", q_SR, index_Tk)
    out_SH = hooks.finish(module, expert_S, out_SH)
    answer_TH = gpu.weighted_sum(out_SH, index_Tk, top_k_weights, residual.num_experts, x_TH.dtype)
    return answer_TH if low_TH is None else answer_TH + low_TH


def _facts(layer: TiledLayer, projection: str) -> SideFacts:
    assert layer.facts is not None
    return layer.facts[projection]


def _residual(layer: TiledLayer, projection: str, x_RI: Tensor, index_Tk: Tensor) -> Tensor:
    """What the residuals answer to each choice, (S, O)."""
    form, facts = layer.sides[projection].form, _facts(layer, projection)
    if facts.orders is not None:
        x_RI = gpu_rows.rotate_op(
            x_RI.contiguous(), index_Tk, facts.orders, facts.owner_E, facts.mixing, form.block, form.plain
        )
    return gpu.product(layer.residual, x_RI, index_Tk, projection)


def _low(layer: TiledLayer, projection: str, x_TI: Tensor, index_Tk: Tensor) -> Tensor:
    """What the factors of gate or up answer to each choice, (S, O); zero without factors."""
    sides = layer.sides[projection]
    if not sides.form.rank:
        return x_TI.new_zeros(index_Tk.numel(), sides.shape[0])
    expert_S = index_Tk.view(-1).clamp(max=layer.residual.num_experts - 1)
    return _widen(layer, projection, _narrow(layer, projection, x_TI, expert_S), index_Tk)


def _narrow(layer: TiledLayer, projection: str, x_RI: Tensor, expert_S: Tensor) -> Tensor:
    """Each choice's row of x through its input factor, (S, R): through all of them, then one is taken."""
    sides, facts = layer.sides[projection], _facts(layer, projection)
    rows, rank = sides.form.rows, sides.form.rank
    row_S = torch.arange(expert_S.shape[0], device=x_RI.device) // (expert_S.shape[0] // max(1, x_RI.shape[0]) or 1)
    if facts.scales is not None:  # every choice has inputs of its own
        x_RI = (x_RI[row_S].float() / facts.scales[expert_S]).to(x_RI.dtype)
        row_S = torch.arange(expert_S.shape[0], device=x_RI.device)
    factors = facts.inputs
    assert factors is not None
    all_RMr = gpu.linear_op(
        x_RI.contiguous(), sides.data, factors.table, list(factors.widths), list(factors.spans), rows * rank
    ).view(x_RI.shape[0], rows, rank)
    return all_RMr[row_S, facts.row_E[expert_S]]


def _widen(layer: TiledLayer, projection: str, z_SR: Tensor, index_Tk: Tensor) -> Tensor:
    """Each choice's numbers through the output factor of its grid column, (S, O); zero for sentinels."""
    sides, facts = layer.sides[projection], _facts(layer, projection)
    assert facts.outputs is not None
    chosen_S = index_Tk.view(-1)
    column_S = facts.column_E[chosen_S.clamp(max=layer.residual.num_experts - 1)]
    column_S = torch.where(chosen_S < layer.residual.num_experts, column_S, sides.form.columns)
    return gpu_rows.combine(z_SR, column_S, sides.data, facts.outputs, z_SR.shape[0])


def _shared_down(layer: TiledLayer, q_SR: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Weighted numbers added up by token and grid column, through all output factors of down at once, (T, O)."""
    sides, facts = layer.sides["down"], _facts(layer, "down")
    assert facts.all_outputs is not None
    num_experts, columns, rank = layer.residual.num_experts, sides.form.columns, sides.form.rank
    here_Tk = index_Tk < num_experts
    column_Tk = facts.column_E[index_Tk.clamp(max=num_experts - 1)]
    weighted_TkR = q_SR.view(*index_Tk.shape, rank).float() * weights_Tk.unsqueeze(-1).float()
    weighted_TkR = torch.where(here_Tk.unsqueeze(-1), weighted_TkR, 0)
    # A product with ones and zeros, not a scatter: sums always run in the same order.
    lies_TNk = (column_Tk.unsqueeze(1) == torch.arange(columns, device=q_SR.device).view(1, -1, 1)).float()
    sum_TNR = torch.bmm(lies_TNk, weighted_TkR)
    sum_T = sum_TNR.view(index_Tk.shape[0], columns * rank).to(q_SR.dtype)
    return gpu_rows.combine(sum_T, None, sides.data, facts.all_outputs, sum_T.shape[0])

"""How moeq takes the place of an MoE's experts: transformers' own experts interface, nothing patched.

Every family's stacked experts module calls the function that its config names
(`transformers.integrations.moe`). moeq registers one such function, which hands the call to the
`moeq` submodule attached to the experts module: packed weights at run time, a tap in calibration.

Legend: T tokens, k experts per token, S tokens routed to one expert, H hidden, I expert width.
"""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_IMPLEMENTATION = "moeq"
HANDLER = "moeq"
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_GATES_BY_SILU = "_moeq_gates_by_silu"
SIZES = (24, 32, 48, 64, 96, 128, 192, 256, 384)
LARGE = 128
"""Numbers of rows that `filled_up` gives; above the last one multiples of `LARGE`."""


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function registered with transformers: (T, H), (T, k), (T, k) -> (T, H)."""
    handler = getattr(self, HANDLER)
    return handler(self, hidden_states, top_k_index, top_k_weights)


def register_experts() -> None:
    """Make "moeq" a known experts implementation; safe to call again."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def strip_weights(model: nn.Module, path: str) -> nn.Module:
    """Drop the stacked weights of the experts at `path`; biases and norms stay. Returns the experts."""
    experts = model.get_submodule(path)
    for name in WEIGHTS:
        experts._parameters.pop(name, None)
    # transformers would initialise the weights that are gone; some families do it from the parent module.
    for module in (experts, model.get_submodule(path.rpartition(".")[0])):
        module._is_hf_initialized = True  # type: ignore[assignment]
    return experts


def attach_handler(experts: nn.Module, handler: nn.Module) -> None:
    """Route the calls of experts whose weights were stripped to `handler`.

    `handler` is called as handler(experts, hidden_states, top_k_index, top_k_weights).
    """
    experts.add_module(HANDLER, handler)
    handler._is_hf_initialized = True  # type: ignore[assignment]
    # A config of its own: `set_experts_implementation` on the model must not send calls to weights that are not there.
    experts.config = copy(experts.config)
    experts.config._experts_implementation = EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]


def alone(experts: nn.Module) -> nn.Module:
    """The experts without their handler, for `activation` and `finish` elsewhere; what it holds is shared."""
    found = copy(experts)
    found._modules = {name: module for name, module in experts._modules.items() if name != HANDLER}
    return found


def activation(experts: nn.Module, expert: int | Tensor, gate_SI: Tensor | None, up_SI: Tensor) -> Tensor:
    """The input of the down projection, (S, I): the family's own gating of the first products.

    Args:
        experts: the family's experts module (biases and activation are its own).
        expert: which expert, or the expert of each row, (S,).
        gate_SI: x W_gate^T, or None for experts without a gate.
        up_SI: x W_up^T.
    """
    if gate_SI is None:
        fused = up_SI
        bias = experts.up_proj_bias if experts.has_bias else None
    else:
        fused = (
            torch.cat([gate_SI, up_SI], dim=-1)
            if experts.is_concatenated
            else torch.stack([gate_SI, up_SI], dim=-1).flatten(-2)
        )
        bias = experts.gate_up_proj_bias if experts.has_bias else None
    if bias is not None:
        fused = fused + bias[expert]  # type: ignore[index]
    return experts.act_fn(fused) if gate_SI is None else experts._apply_gate(fused)  # type: ignore[operator]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gates_by_silu(experts: nn.Module, width: int) -> bool:
    """Whether an expert is down(silu(gate) * up), with no bias, limit or norm anywhere; asked once of each module.

    Families write their gate as code, so it is tried on numbers: small, large and of both signs.
    """
    known = experts.__dict__.get(_GATES_BY_SILU)
    if known is None:
        known = answers_plainly(experts) and _gate_is_silu(experts, width)
        experts.__dict__[_GATES_BY_SILU] = known
    return known


@torch.inference_mode()
def _gate_is_silu(experts: nn.Module, width: int) -> bool:
    sizes = torch.tensor([-300.0, -30.0, -8.0, -1.0, -0.01, 0.01, 1.0, 8.0, 30.0, 300.0], dtype=torch.float32)
    gate_SI = sizes.repeat_interleave(len(sizes)).unsqueeze(-1).expand(-1, width)
    up_SI = sizes.repeat(len(sizes)).unsqueeze(-1).expand(-1, width)
    wanted = torch.nn.functional.silu(gate_SI) * up_SI
    return torch.allclose(activation(experts, 0, gate_SI, up_SI).float(), wanted, rtol=1e-4, atol=1e-6)


def finish(experts: nn.Module, expert: int | Tensor, down_SH: Tensor) -> Tensor:
    """What the family does to one expert's output before it is weighted: bias, then optional norm."""
    if experts.has_bias:
        down_SH = down_SH + experts.down_proj_bias[expert]  # type: ignore[index]
    if experts.has_post_expert_norm:
        down_SH = experts.post_expert_norm(down_SH)  # type: ignore[operator]
    return down_SH


def answers_plainly(experts: nn.Module) -> bool:
    """Whether an expert's answer is its down projection and nothing else, so that `finish` changes nothing."""
    return not (experts.has_bias or experts.has_post_expert_norm)


def spans(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have choices, and where those lie in the order of `by_expert`."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


def by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Sort the T * k choices by expert.

    Returns:
        order: (T * k,) positions in the flattened choices, grouped by expert, stable.
        counts: tokens of each expert. Choices >= num_experts (expert parallelism's sentinels) come
            last in `order` and are not counted.
    """
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1)
    return order, counts[:num_experts].tolist()


def filled_up(x_SK: Tensor) -> Tensor:
    """x with rows of zeros behind, so that few numbers of rows occur; for products of 16-bit numbers on a CPU.

    oneDNN, which multiplies these, makes code for each number of rows. That takes longer than most products and 0.7 MB,
    and experts have tokens of any number.
    """
    rows = x_SK.shape[0]
    if x_SK.device.type != "cpu" or x_SK.dtype == torch.float32:
        return x_SK
    wanted = next((size for size in SIZES if size >= rows), -(-rows // LARGE) * LARGE)
    return x_SK if wanted == rows else nn.functional.pad(x_SK, (0, 0, 0, wanted - rows))


def combine(parts: list[Tensor], order: Tensor, top_k_weights: Tensor, hidden_states: Tensor) -> Tensor:
    """Weight the experts' outputs and add them up per token.

    Args:
        parts: outputs in the order of `order`, (S, H) each; sentinels' outputs are absent.
        order: from `by_expert`.
        top_k_weights: (T, k).
        hidden_states: (T, H), gives dtype and shape of the result.
    """
    num_tokens, top_k = top_k_weights.shape
    out_SH = torch.cat(parts) if parts else hidden_states.new_zeros(0, hidden_states.shape[-1])
    missing = order.numel() - out_SH.shape[0]
    if missing:
        out_SH = torch.cat([out_SH, out_SH.new_zeros(missing, out_SH.shape[-1])])
    weighted = out_SH * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    unsorted = torch.empty_like(order)
    unsorted[order] = torch.arange(order.numel(), device=order.device)
    return weighted[unsorted].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

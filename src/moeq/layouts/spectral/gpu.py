"""Experts in a shared basis on a GPU: as `moeq.layouts.spectral.reference`, from packed components, without waiting for
the host.

Tokens meet the basis once: a packed product where it has 8 bits, torch's own where it is float16 (converted to the
dtype of the tokens in every call, as the reference does). Gate and up add up the components of the chosen experts, down
takes dot products with them, and each choice's answers in the basis of the outputs are weighted and added up per token.
From `DECODE_FROM` rows per expert on, what an expert has is decoded once.

Legend: T tokens, k experts per token, S = T * k choices, H hidden, I expert width, R directions.
"""

from torch import Tensor, nn

from moeq.arch import hooks
from moeq.kernels import gpu_rows
from moeq.layouts.grouped import gpu
from moeq.layouts.spectral.reference import SpectralLayer


def experts(
    module: nn.Module, layer: SpectralLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """`moeq.layouts.spectral.reference.experts` on a GPU, or None if the call is not for Triton."""
    if not gpu.wanted(hidden_states, top_k_weights) or layer.facts is None or layer.data.device != hidden_states.device:
        return None
    return run_experts(module, layer, hidden_states, top_k_index, top_k_weights)


def run_experts(
    module: nn.Module, layer: SpectralLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `experts`, without asking whether the tensors are on a GPU."""
    facts = layer.facts
    assert facts is not None
    x_TH, index_Tk = hidden_states.contiguous(), top_k_index.contiguous()
    chosen_S = index_Tk.view(-1)
    expert_S = chosen_S.clamp(max=layer.num_experts - 1)
    inputs = {"gate": _project(layer, "gate", x_TH)}
    joint = layer.entries["up"].basis == layer.entries["gate"].basis
    inputs["up"] = inputs["gate"] if joint else _project(layer, "up", x_TH)
    gate_SI, up_SI = (
        gpu_rows.combine(inputs[name], chosen_S, layer.data, facts.factors[name], chosen_S.numel())
        for name in ("gate", "up")
    )
    inner_SI = hooks.activation(module, expert_S, gate_SI, up_SI)
    part_SR = gpu_rows.dots(inner_SI, chosen_S, layer.data, facts.factors["down"], layer.entries["down"].rank)
    if hooks.answers_plainly(module):
        sum_TR = gpu.weighted_sum(part_SR, index_Tk, top_k_weights, layer.num_experts, x_TH.dtype)
        return _back(layer, sum_TR)
    # A bias, or a norm of every expert's answer: it has to be known before it is weighted.
    out_SH = hooks.finish(module, expert_S, _back(layer, part_SR))
    return gpu.weighted_sum(out_SH, index_Tk, top_k_weights, layer.num_experts, x_TH.dtype)


def _project(layer: SpectralLayer, projection: str, x_TH: Tensor) -> Tensor:
    """x B^T, (T, R)."""
    assert layer.facts is not None
    basis = layer.facts.bases.get(projection)
    if basis is None:
        return x_TH @ layer.basis(projection, x_TH.dtype).T
    rank = layer.entries[projection].rank
    return gpu.linear_op(x_TH, layer.data, basis.table, list(basis.widths), list(basis.spans), rank)


def _back(layer: SpectralLayer, sum_TR: Tensor) -> Tensor:
    """Answers in the basis of down, (T, R), as outputs, (T, H)."""
    assert layer.facts is not None
    if layer.facts.back is None:
        return sum_TR @ layer.basis("down", sum_TR.dtype)
    return gpu_rows.combine(sum_TR, None, layer.data, layer.facts.back, sum_TR.shape[0])

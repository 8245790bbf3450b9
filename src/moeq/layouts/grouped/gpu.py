"""The Triton kernels as candidates of dispatch, and as custom operators that `torch.compile` keeps whole.

Nothing here imports triton; the first call with CUDA tensors does (`_launch`). Without triton, on other devices, for
other dtypes, and where a gradient is wanted, the candidates refuse.

Fakes ask tensors for `shape[0]`: `len` of a tensor is a number, and would make a graph for every number of tokens.

Legend: T tokens, k experts per token, S = T * k choices, H hidden, I expert width, R rows, N outputs, K inputs.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Final

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.kernels.facts import KernelFacts
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix

AVAILABLE: Final = find_spec("triton") is not None
"""Whether there is a triton to import."""
AMPERE: Final = 8
"""The first GPUs whose tensor cores take bfloat16, by major number."""
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


def experts(
    module: nn.Module, layer: PackedLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """`moeq.layouts.grouped.reference.experts` on a GPU, or None if the call is not for Triton."""
    if not wanted(hidden_states, top_k_weights) or layer.facts is None or layer.data.device != hidden_states.device:
        return None
    return run_experts(module, layer, hidden_states, top_k_index, top_k_weights)


def linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor | None:
    """`moeq.layouts.grouped.reference.linear` on a GPU, or None if the call is not for Triton."""
    if not wanted(x_SK) or matrix.facts is None or matrix.record.device != x_SK.device:
        return None
    return run_linear(x_SK, matrix)


def wanted(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton can compute with x, and nobody asks for a gradient."""
    if not (x.is_cuda and x.dtype in DTYPES and usable(x.device)):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or any(other.requires_grad for other in others)))


def usable(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a device."""
    if not AVAILABLE or device.type != "cuda":
        return False
    # Not `get_device_capability`: `torch.compile` folds the properties into a constant, and breaks its graph there.
    return torch.cuda.get_device_properties(device).major >= AMPERE


def run_experts(
    module: nn.Module, layer: PackedLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `experts`, without asking whether the tensors are on a GPU."""
    x_TH, index_Tk = hidden_states.contiguous(), top_k_index.contiguous()
    if "gate" in layer.shapes and hooks.gates_by_silu(module, layer.shapes["up"][0]):
        return gated(layer, x_TH, index_Tk, top_k_weights, None)
    expert_S = index_Tk.reshape(-1).clamp(max=layer.num_experts - 1)
    gate_SI = product(layer, x_TH, index_Tk, "gate") if "gate" in layer.shapes else None
    inner_SI = hooks.activation(module, expert_S, gate_SI, product(layer, x_TH, index_Tk, "up"))
    out_SH = hooks.finish(module, expert_S, product(layer, inner_SI, index_Tk, "down"))
    return weighted_sum(out_SH, index_Tk, top_k_weights, layer.num_experts, hidden_states.dtype)


def gated(layer: PackedLayer, x_TH: Tensor, index_Tk: Tensor, weights_Tk: Tensor, low_S2I: Tensor | None) -> Tensor:
    """Routed experts with silu(gate) * up, (T, H); `low_S2I` is added to gate and up of each choice before that."""
    facts = layer.facts
    assert facts is not None
    tables = facts.table, list(facts.widths), list(facts.spans)
    return experts_op(x_TH, index_Tk, weights_Tk.contiguous(), layer.data, *tables, layer.shapes["up"][0], low_S2I)


def product(layer: PackedLayer, x_RK: Tensor, index_Tk: Tensor, projection: str) -> Tensor:
    """One projection of the chosen experts, (S, N): `moeq.kernels.triton_launch.product`."""
    facts = layer.facts
    assert facts is not None
    tables = facts.table, list(facts.widths), list(facts.spans)
    position = list(layer.shapes).index(projection)
    return product_op(x_RK.contiguous(), index_Tk, layer.data, *tables, position, layer.shapes[projection][0])


def weighted_sum(out_SN: Tensor, index_Tk: Tensor, weights_Tk: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Each token's answers times their weights, (T, N) in `dtype`; choices of experts that do not exist add nothing."""
    here_S1 = (index_Tk.reshape(-1) < num_experts).unsqueeze(-1)
    weighted_SN = torch.where(here_S1, out_SN * weights_Tk.reshape(-1, 1), 0)
    return weighted_SN.view(*index_Tk.shape, out_SN.shape[-1]).sum(dim=1).to(dtype)


def run_linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """As `linear`, without asking whether the tensors are on a GPU."""
    facts = matrix.facts
    assert facts is not None
    return linear_op(
        x_SK.contiguous(), matrix.record, facts.table, list(facts.widths), list(facts.spans), matrix.shape[0]
    )


def _launch() -> ModuleType:
    return import_module("moeq.kernels.triton_launch")  # needs triton, an optional dependency


def _facts(table: Tensor, widths: list[int], spans: list[int]) -> KernelFacts:
    return KernelFacts(table=table, widths=tuple(widths), spans=tuple(spans))


@torch.library.custom_op("moeq::triton_experts", mutates_args=())
def experts_op(
    x_TH: Tensor, index_Tk: Tensor, weights_Tk: Tensor, data: Tensor, table: Tensor,
    widths: list[int], spans: list[int], inner: int, low_S2I: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Routed experts with silu(gate) * up, (T, H): `triton_launch.experts`."""
    with torch.cuda.device_of(x_TH):  # triton launches on the current device
        return _launch().experts(x_TH, index_Tk, weights_Tk, data, _facts(table, widths, spans), inner, low_S2I)


@experts_op.register_fake
def _(
    x_TH: Tensor, index_Tk: Tensor, weights_Tk: Tensor, data: Tensor, table: Tensor,
    widths: list[int], spans: list[int], inner: int, low_S2I: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x_TH.new_empty(x_TH.shape)


@torch.library.custom_op("moeq::triton_product", mutates_args=())
def product_op(
    x_RK: Tensor, index_Tk: Tensor, data: Tensor, table: Tensor,
    widths: list[int], spans: list[int], position: int, outputs: int,
) -> Tensor:  # fmt: skip
    """One projection of the chosen experts, (S, N): `triton_launch.product`."""
    with torch.cuda.device_of(x_RK):
        return _launch().product(x_RK, index_Tk, data, _facts(table, widths, spans), position, outputs)


@product_op.register_fake
def _(
    x_RK: Tensor, index_Tk: Tensor, data: Tensor, table: Tensor,
    widths: list[int], spans: list[int], position: int, outputs: int,
) -> Tensor:  # fmt: skip
    return x_RK.new_empty(index_Tk.numel(), outputs)


@torch.library.custom_op("moeq::triton_linear", mutates_args=())
def linear_op(x_RK: Tensor, data: Tensor, table: Tensor, widths: list[int], spans: list[int], outputs: int) -> Tensor:
    """x W^T, (R, N): `triton_launch.linear`."""
    with torch.cuda.device_of(x_RK):
        return _launch().linear(x_RK, data, _facts(table, widths, spans), outputs)


@linear_op.register_fake
def _(x_RK: Tensor, data: Tensor, table: Tensor, widths: list[int], spans: list[int], outputs: int) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], outputs)

"""The compiled kernels for layers of the layouts "spectral" and "tiled", as candidates of the dispatch.

Few tokens of experts gated by SiLU take one call for the whole layer. Everything else is left to the references, with
products in a dtype that torch is fast at, and the residuals of tiled layers multiplied as in `moeq.kernels.cpu`.

The calls are torch operators (`torch.ops.moeq.packed_spectral`, `packed_tiled`), so that `torch.compile` sees them.

Legend: T tokens, k experts per token, H hidden, S tokens of one expert, N output rows, K input columns.
"""

from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from moeq import native
from moeq.arch import hooks
from moeq.kernels import cpu, reference, spectral, tiled
from moeq.kernels.packed import PackedMatrix
from moeq.kernels.spectral import SpectralLayer
from moeq.kernels.tiled import TiledLayer

_LIBRARY: Final = torch.library.Library("moeq", "FRAGMENT")
_LIBRARY.define(
    "packed_spectral(Tensor x, Tensor index, Tensor weight, Tensor data, Tensor table, Tensor starts, Tensor order, "
    "int inner, bool exact) -> Tensor"
)
_LIBRARY.define(
    "packed_tiled(Tensor x, Tensor index, Tensor weight, Tensor data, Tensor table, Tensor sides, Tensor tiles, "
    "int inner, bool exact) -> Tensor"
)


def _packed_spectral(
    x_TH: Tensor,
    index_Tk: Tensor,
    weight_Tk: Tensor,
    data: Tensor,
    table: Tensor,
    starts: Tensor,
    order: Tensor,
    inner: int,
    exact: bool,
) -> Tensor:
    x_TH, index_Tk, weight_Tk = x_TH.contiguous(), index_Tk.contiguous(), weight_Tk.contiguous()
    return native.spectral_experts(data, table, starts, order, inner, x_TH, index_Tk, weight_Tk, exact=exact)


def _packed_tiled(
    x_TH: Tensor,
    index_Tk: Tensor,
    weight_Tk: Tensor,
    data: Tensor,
    table: Tensor,
    sides: Tensor,
    tiles: Tensor,
    inner: int,
    exact: bool,
) -> Tensor:
    x_TH, index_Tk, weight_Tk = x_TH.contiguous(), index_Tk.contiguous(), weight_Tk.contiguous()
    return native.tiled_experts(data, table, sides, tiles, inner, x_TH, index_Tk, weight_Tk, exact=exact)


_LIBRARY.impl("packed_spectral", _packed_spectral, "CPU")
_LIBRARY.impl("packed_tiled", _packed_tiled, "CPU")
torch.library.register_fake("moeq::packed_spectral", lambda x, *_: torch.empty_like(x))
torch.library.register_fake("moeq::packed_tiled", lambda x, *_: torch.empty_like(x))


def spectral_experts(
    module: nn.Module, layer: SpectralLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """As `moeq.kernels.spectral.experts`; None for what the kernels do not do."""
    tables = layer.tables
    if tables is None or len(layer.entries) < 3 or not cpu.serves(hidden_states, layer.data, top_k_weights):
        return None
    inner = layer.shape.inner
    if not _is_fused(module, inner, hidden_states, top_k_weights):
        dtype = cpu.product_dtype(hidden_states.dtype)
        if dtype == hidden_states.dtype:
            return None
        answer = spectral.experts(module, layer, hidden_states.to(dtype), top_k_index, top_k_weights)
        return answer.to(hidden_states.dtype)
    return torch.ops.moeq.packed_spectral(
        hidden_states,
        top_k_index,
        top_k_weights,
        layer.data,
        tables.table,
        tables.starts,
        tables.order,
        inner,
        bool(layer.exact),
    )


def tiled_experts(
    module: nn.Module, layer: TiledLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """As `moeq.kernels.tiled.experts`; None for what the kernels do not do."""
    residual = layer.residual
    if residual.table is None or layer.side_data is None or layer.tiles is None:
        return None
    if not cpu.serves(hidden_states, residual.data, top_k_weights) or not layer.side_data.is_contiguous():
        return None
    forms = [sides.form for sides in layer.sides.values()]
    if all(form.rank == 0 and form.orders == "none" for form in forms):  # a grouped layer
        return cpu.experts(module, residual, hidden_states, top_k_index, top_k_weights)
    inner = residual.shapes["up"][0]
    if "gate" in residual.shapes and _is_fused(module, inner, hidden_states, top_k_weights):
        return torch.ops.moeq.packed_tiled(
            hidden_states,
            top_k_index,
            top_k_weights,
            residual.data,
            residual.table,
            layer.side_data,
            layer.tiles,
            inner,
            bool(residual.exact),
        )
    floats = len(hidden_states) > cpu.FEW and residual.exact is not False
    x_TH, linear = hidden_states.to(cpu.product_dtype(hidden_states.dtype)), partial(_linear, exact=floats)
    return tiled.experts(module, layer, x_TH, top_k_index, top_k_weights, linear=linear).to(hidden_states.dtype)


def _is_fused(module: nn.Module, inner: int, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    """Whether a call is one for the fused kernels: few tokens, silu(gate) * up and nothing else."""
    if len(hidden_states) > cpu.FEW or top_k_weights.dtype not in native.DTYPES:
        return False
    return hooks.gates_by_silu(module, inner)


def _linear(x_SK: Tensor, matrix: PackedMatrix, *, exact: bool) -> Tensor:
    """x W^T, (S, N), from the packed bytes where the kernels take the call."""
    found = cpu.linear(x_SK, replace(matrix, exact=True) if exact else matrix)
    return reference.linear(x_SK, matrix) if found is None else found

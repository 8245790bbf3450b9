"""The compiled kernels for layers of the layout "tiled", as a candidate.

Few tokens of experts gated by SiLU take one call for the whole layer. Everything else is left to the reference, with
products in a dtype that torch is fast at, and residuals multiplied as in `moeq.layouts.grouped.cpu`.

The call is a torch operator (`torch.ops.moeq.packed_tiled`), so that `torch.compile` sees it.

Legend: T tokens, k experts per token, H hidden, S tokens of one expert, N output rows, K input columns.
"""

from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from moeq import native
from moeq.layouts.grouped import cpu
from moeq.layouts.grouped import reference as grouped
from moeq.layouts.grouped.packed import PackedMatrix
from moeq.layouts.tiled import reference
from moeq.layouts.tiled.reference import TiledLayer

_LIBRARY: Final = torch.library.Library("moeq", "FRAGMENT")
_LIBRARY.define(
    "packed_tiled(Tensor x, Tensor index, Tensor weight, Tensor data, Tensor table, Tensor sides, Tensor tiles, "
    "int inner, bool exact) -> Tensor"
)


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


_LIBRARY.impl("packed_tiled", _packed_tiled, "CPU")
torch.library.register_fake("moeq::packed_tiled", lambda x, *_: torch.empty_like(x))


def experts(
    module: nn.Module, layer: TiledLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """As `moeq.layouts.tiled.reference.experts`; None for what the kernels do not do."""
    residual = layer.residual
    if residual.table is None or layer.side_data is None or layer.tiles is None:
        return None
    if not cpu.serves(hidden_states, residual.data, top_k_weights) or not layer.side_data.is_contiguous():
        return None
    forms = [sides.form for sides in layer.sides.values()]
    if all(form.rank == 0 and form.orders == "none" for form in forms):  # a grouped layer
        return cpu.experts(module, residual, hidden_states, top_k_index, top_k_weights)
    inner = residual.shapes["up"][0]
    if "gate" in residual.shapes and cpu.is_fused(module, inner, hidden_states, top_k_weights):
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
    return reference.experts(module, layer, x_TH, top_k_index, top_k_weights, linear=linear).to(hidden_states.dtype)


def _linear(x_SK: Tensor, matrix: PackedMatrix, *, exact: bool) -> Tensor:
    """x W^T, (S, N), from the packed bytes where the kernels take the call."""
    found = cpu.linear(x_SK, replace(matrix, exact=True) if exact else matrix)
    return grouped.linear(x_SK, matrix) if found is None else found

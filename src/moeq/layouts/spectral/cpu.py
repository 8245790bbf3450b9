"""The compiled kernels for layers of the layout "spectral", as a candidate.

Few tokens of experts gated by SiLU take one call for the whole layer. Everything else is left to the reference, with
products in a dtype that torch is fast at.

The call is a torch operator (`torch.ops.moeq.packed_spectral`), so that `torch.compile` sees it.

Legend: T tokens, k experts per token, H hidden.
"""

from typing import Final

import torch
from torch import Tensor, nn

from moeq import native
from moeq.layouts.grouped import cpu
from moeq.layouts.spectral import reference
from moeq.layouts.spectral.reference import SpectralLayer

_LIBRARY: Final = torch.library.Library("moeq", "FRAGMENT")
_LIBRARY.define(
    "packed_spectral(Tensor x, Tensor index, Tensor weight, Tensor data, Tensor table, Tensor starts, Tensor order, "
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


_LIBRARY.impl("packed_spectral", _packed_spectral, "CPU")
torch.library.register_fake("moeq::packed_spectral", lambda x, *_: torch.empty_like(x))


def experts(
    module: nn.Module, layer: SpectralLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """As `moeq.layouts.spectral.reference.experts`; None for what the kernels do not do."""
    tables = layer.tables
    if tables is None or len(layer.entries) < 3 or not cpu.serves(hidden_states, layer.data, top_k_weights):
        return None
    inner = layer.shape.inner
    if not cpu.is_fused(module, inner, hidden_states, top_k_weights):
        dtype = cpu.product_dtype(hidden_states.dtype)
        if dtype == hidden_states.dtype:
            return None
        answer = reference.experts(module, layer, hidden_states.to(dtype), top_k_index, top_k_weights)
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

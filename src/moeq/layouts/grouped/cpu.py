"""The compiled kernels for CPUs (`csrc/`), as candidates of the dispatch.

Few tokens: products straight from the packed bytes, each matrix read once; for the usual gated experts a whole layer in
one call. Many tokens: matrices are decoded, a tile at a time, and multiplied by torch. Calls that want gradients, and
everything that is not on a CPU, are left to the reference.

The calls are torch operators (`torch.ops.moeq.packed_linear`, `packed_experts`), so that `torch.compile` sees them.

Legend: T tokens, k experts per token, S tokens of one expert, N output rows, K input columns, H hidden, I expert width.
"""

from typing import Final

import torch
from torch import Tensor, nn

from moeq import native
from moeq.arch import hooks
from moeq.layouts.grouped import reference
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.spec import LEVELS, QuantSpec

FEW: Final = 16
"""Tokens of a call, or of one matrix, up to which codes are multiplied as they are; above, decoding is cheaper."""
TILE_BYTES: Final = 8 << 20
"""Decoded weights at a time: what last-level caches hold."""

_LIBRARY: Final = torch.library.Library("moeq", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor record, int rows, int bits, int group_size, int levels, bool exact) -> Tensor"
)
_LIBRARY.define(
    "packed_experts(Tensor x, Tensor index, Tensor weight, Tensor data, Tensor table, int inner, bool exact) -> Tensor"
)


def _packed_linear(
    x_SK: Tensor, record: Tensor, rows: int, bits: int, group_size: int, levels: int, exact: bool
) -> Tensor:
    spec = QuantSpec(bits=bits, group_size=group_size, levels=LEVELS[levels])
    return native.linear(record, spec, (rows, x_SK.shape[1]), x_SK.contiguous(), exact=exact)


def _packed_experts(
    x_TH: Tensor, index_Tk: Tensor, weight_Tk: Tensor, data: Tensor, table: Tensor, inner: int, exact: bool
) -> Tensor:
    return native.experts(
        data, table, inner, x_TH.contiguous(), index_Tk.contiguous(), weight_Tk.contiguous(), exact=exact
    )


_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
_LIBRARY.impl("packed_experts", _packed_experts, "CPU")
torch.library.register_fake("moeq::packed_linear", lambda x, record, rows, *_: x.new_empty(x.shape[0], rows))
torch.library.register_fake("moeq::packed_experts", lambda x, *_: torch.empty_like(x))


def linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor | None:
    """As `reference.linear`; None for what the kernels do not do."""
    if not matrix.compiled or not serves(x_SK, matrix.record):
        return None
    if x_SK.shape[0] > FEW:
        return _decode_and_multiply(x_SK, matrix)
    return _multiply_codes(x_SK, matrix)


def experts(
    module: nn.Module, layer: PackedLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """As `reference.experts`; None for what the kernels do not do."""
    if layer.table is None or not serves(hidden_states, layer.data, top_k_weights):
        return None
    few = _is_few(top_k_index, layer)
    if few and top_k_weights.dtype in native.DTYPES and _is_plain(module, layer):
        inner = layer.shapes["up"][0]
        return torch.ops.moeq.packed_experts(
            hidden_states, top_k_index, top_k_weights, layer.data, layer.table, inner, bool(layer.exact)
        )
    dtype = hidden_states.dtype
    multiply = _multiply_codes if few else _decode_and_multiply
    answer = reference.experts(
        module, layer, hidden_states.to(product_dtype(dtype)), top_k_index, top_k_weights, linear=multiply
    )
    return answer.to(dtype)


def serves(x: Tensor, data: Tensor, *others: Tensor) -> bool:
    """Whether a call is one for these kernels, and nobody asks for a gradient; says once if a compiler is missing."""
    if x.device.type != "cpu" or data.device.type != "cpu" or x.dtype not in native.DTYPES:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(other.requires_grad for other in others)):
        return False
    if not native.available():
        native.warn_missing()
        return False
    return data.is_contiguous()


def _is_few(top_k_index: Tensor, layer: PackedLayer) -> bool:
    """Whether codes are multiplied as they are: few tokens in all, or, where the user wants that, for every expert."""
    if top_k_index.shape[0] <= FEW:  # an expert may be chosen twice by one token: still few
        return True
    if layer.exact is not False or top_k_index.numel() > FEW * layer.num_experts:
        return False
    return int(torch.bincount(top_k_index.reshape(-1)).max()) <= FEW


def _is_plain(module: nn.Module, layer: PackedLayer) -> bool:
    """Whether the experts are silu(gate) * up and nothing else: the fused kernel knows no other."""
    return "gate" in layer.shapes and hooks.gates_by_silu(module, layer.shapes["up"][0])


def _multiply_codes(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """x W^T, (S, N), for few rows of x, straight from the packed bytes."""
    spec, exact = matrix.spec, bool(matrix.exact)
    return torch.ops.moeq.packed_linear(
        x_SK, matrix.record, matrix.shape[0], spec.bits, spec.group_size, LEVELS.index(spec.levels), exact
    )


def _decode_and_multiply(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """x W^T, (S, N), for many rows of x: a tile of W is decoded by all threads, then multiplied by torch."""
    rows, columns = matrix.shape
    dtype = product_dtype(x_SK.dtype)
    x = hooks.filled_up(x_SK.to(dtype))
    step = max(64, TILE_BYTES // (columns * dtype.itemsize) // 64 * 64)
    y_SN = x.new_empty(x.shape[0], rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        w_nK = native.decode_matrix(
            matrix.record, matrix.spec, matrix.shape, dtype, rows=(start, stop), threads=torch.get_num_threads()
        )
        torch.mm(x, w_nK.T, out=y_SN[:, start:stop])
    return y_SN[: x_SK.shape[0]].to(x_SK.dtype)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to multiply in: without AVX-512 torch imitates 16-bit products, ten times slower than float32 ones."""
    slow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return torch.float32 if slow else dtype


def is_fused(module: nn.Module, inner: int, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    """Whether a call is one for the kernels of whole layers: few tokens, silu(gate) * up and nothing else."""
    if len(hidden_states) > FEW or top_k_weights.dtype not in native.DTYPES:
        return False
    return hooks.gates_by_silu(module, inner)

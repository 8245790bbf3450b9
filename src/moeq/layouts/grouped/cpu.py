"""The compiled kernels for CPUs (`csrc/`), as candidates of the dispatch.

Few tokens: products straight from the packed bytes, each matrix read once; for the usual gated experts a whole layer in
one call. Many tokens: likewise where integer products are the faster ones; else matrices are decoded, a tile at a time,
and multiplied by torch. Calls that want gradients, and everything that is not on a CPU, are left to the reference.

The calls are torch operators (`torch.ops.moeq.packed_linear`, `packed_experts`), so that `torch.compile` sees them.

Legend: T tokens, k experts per token, S tokens of one expert, N output rows, K input columns, H hidden, I expert width.
"""

import functools
from collections.abc import Iterable, Sequence
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
    if x_SK.shape[0] <= FEW or _rounds_many(matrix.exact, (matrix.spec,)):
        return _multiply_codes(x_SK, matrix)
    return _decode_and_multiply(x_SK, matrix)


def linears(x_SK: Tensor, matrices: Sequence[PackedMatrix]) -> list[Tensor] | None:
    """Several `linear`s of few tokens, of one input, in one call; None for what it does not do, as to be traced."""
    exact = bool(matrices[0].exact)
    if x_SK.shape[0] > FEW or not all(matrix.compiled and bool(matrix.exact) == exact for matrix in matrices):
        return None
    if native.traced(x_SK) or not all(serves(x_SK, matrix.record) for matrix in matrices):
        return None
    forms = [(matrix.shape[0], *_form(matrix.spec)) for matrix in matrices]
    return native.linears([matrix.record for matrix in matrices], forms, x_SK.contiguous(), exact=exact)


def experts(
    module: nn.Module, layer: PackedLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor | None:
    """As `reference.experts`; None for what the kernels do not do."""
    if layer.table is None or not serves(hidden_states, layer.data, top_k_weights):
        return None
    specs = (spec for expert in layer.entries for _, spec in expert)
    codes = top_k_index.shape[0] <= FEW or _rounds_many(layer.exact, specs)
    if codes and top_k_weights.dtype in native.DTYPES and _is_plain(module, layer):
        call = torch.ops.moeq.packed_experts if native.traced(hidden_states) else _packed_experts
        inner, exact = layer.shapes["up"][0], bool(layer.exact)
        return call(hidden_states, top_k_index, top_k_weights, layer.data, layer.table, inner, exact)
    dtype = hidden_states.dtype
    multiply = _multiply_codes if codes else _decode_and_multiply
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


def _rounds_many(exact: bool | None, specs: Iterable[QuantSpec]) -> bool:
    """Whether codes are multiplied as they are by many tokens too, with activations of 8 bits.

    The user may want it or not; where nothing is said, it is done where it is faster: without units that multiply
    matrices of 16-bit floats, integer products are (benchmarks/cpu.md), but looking codebooks up for every few tokens
    is not.
    """
    if exact is not None:
        return not exact
    return not _has_matrix_units() and all(spec.codebooks is None for spec in specs)


@functools.cache
def _has_matrix_units() -> bool:
    """Whether this processor has AMX; where torch cannot say, whether it might."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16", product_dtype(torch.bfloat16) == torch.bfloat16))


def _is_plain(module: nn.Module, layer: PackedLayer) -> bool:
    """Whether the experts are silu(gate) * up and nothing else: the fused kernel knows no other."""
    return "gate" in layer.shapes and hooks.gates_by_silu(module, layer.shapes["up"][0])


def _multiply_codes(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """x W^T, (S, N), for few rows of x, straight from the packed bytes."""
    exact = bool(matrix.exact)
    call = torch.ops.moeq.packed_linear if native.traced(x_SK) else _packed_linear
    return call(x_SK, matrix.record, matrix.shape[0], *_form(matrix.spec), exact)


def _form(spec: QuantSpec) -> tuple[int, int, int]:
    return spec.bits, spec.group_size, LEVELS.index(spec.levels)


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

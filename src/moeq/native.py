"""The compiled kernels of `csrc/`, where they could be built; everything works without them, slower.

Kernels that round and pack run in the calling thread and let go of the interpreter lock, so callers spread work over
threads; their results do not depend on the instruction set, which is chosen at run time. They may differ from those of
the torch reference in the last bit of a sum, hence rarely in a code. Kernels that multiply use as many threads as torch
(`csrc/threads.h`). No result depends on the number of threads.

Legend: N output rows, K input columns, G groups per row, B bytes per row.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # documented, but not in its __all__

from moeq.spec import LEVELS, SCALE_BYTES, WHOLE_ROW, ZERO_BYTES, QuantSpec, num_groups, plane_row_bytes, sections

FITS: Final = ("minmax", "search", "half-quadratic")
"""Ways to choose the parameters of a group; the position is the kernel's number for it."""
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Weights that kernels take as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How the parameters of a group are chosen, as plain numbers; `moeq.quantizers` explains them.

    Attributes:
        fit: one of `FITS`.
        ratios: candidates of the search, for all fits but `minmax`.
        refits: alternations of least squares and rounding after the search.
        iterations: half-quadratic alternations.
        p: exponent of the half-quadratic error.
        beta: first threshold parameter of the shrinkage.
        growth: factor of `beta` from one alternation to the next.
        settled: change of scale or zero below which a group is done.
    """

    fit: str
    ratios: tuple[float, ...] = ()
    refits: int = 0
    iterations: int = 0
    p: float = 0.7
    beta: float = 1.0
    growth: float = 2.0
    settled: float = 0.0


def _load() -> Any:
    """The extension module, or None where it was not built or is slower than torch."""
    try:
        module = importlib.import_module("moeq._native")
    except ImportError:
        return None
    return module if module.worth_it() else None


_module: Any = _load()


def available() -> bool:
    """Whether there are compiled kernels on this machine."""
    return _module is not None


def module() -> Any:
    """The extension module; None where there is none."""
    return _module


def traced(x: Tensor) -> bool:
    """Whether somebody records what is done to a tensor instead of doing it: then it must meet operators of torch."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def isas() -> tuple[str, ...]:
    """Instruction sets that the kernels can use on this machine, best first; empty without kernels."""
    return () if _module is None else tuple(_module.isas())


_decoding: Final = [True]


def decodes() -> bool:
    """Whether `decode_matrix` can be used: there are kernels, and nobody found that it decodes wrongly."""
    return available() and _decoding[0]


def stop_decoding(stop: bool = True) -> None:
    """Leave decoding to torch in this process, or take it back."""
    _decoding[0] = not stop


def file() -> Path | None:
    """The file of the extension; None without one."""
    return None if _module is None else Path(_module.__file__)


_unsaid: Final = [
    "moeq was installed without its compiled kernels: rounding takes about ten times as long, and "
    "packed models run slower. "
    "Install a C++ compiler (g++ or clang++) and reinstall moeq"
]


def warn_missing() -> None:
    """Say, the first time only, that something would be faster with the compiled kernels."""
    if _unsaid:
        warnings.warn(_unsaid.pop(), stacklevel=3)


def round_matrix(
    w_NK: Tensor, spec: QuantSpec, rounding: Rounding, *, gain: bool, isa: str = ""
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Round a matrix group by group, in this thread.

    Args:
        w_NK: weights on the CPU, of one of `DTYPES`, contiguous.
        spec: how they are stored.
        rounding: how the parameters of a group are chosen.
        gain: match the gain of every group (docs/decisions/0013).
        isa: one of `isas()` instead of the best.

    Returns:
        codes_NK, scale_NG and zero_NG of a `QuantizedMatrix`; None if a weight is NaN or infinite.
    """
    rows, columns = w_NK.shape
    grid = rows, num_groups(columns, spec.group_size)
    codes_NK = torch.empty(rows, columns, dtype=torch.uint8)
    scale_NG = torch.empty(grid, dtype=torch.float16)
    zero_dtype = torch.uint8 if ZERO_BYTES[spec.levels] == 1 else torch.float16
    zero_NG = torch.empty(grid if ZERO_BYTES[spec.levels] else (0,), dtype=zero_dtype)
    finite = _module.round_matrix(
        w_NK.detach(),
        codes_NK,
        scale_NG,
        zero_NG,
        fit=FITS.index(rounding.fit),
        bits=spec.bits,
        levels=LEVELS.index(spec.levels),
        group_size=columns if spec.group_size == WHOLE_ROW else spec.group_size,
        ratios=rounding.ratios,
        refits=rounding.refits,
        iterations=rounding.iterations,
        p=rounding.p,
        beta=rounding.beta,
        growth=rounding.growth,
        settled=rounding.settled,
        gain=gain,
        isa=isa,
    )
    if not finite:
        return None
    return codes_NK, scale_NG, zero_NG if ZERO_BYTES[spec.levels] else None


def trellis_columns(
    bits: int, w_SN: Tensor, scale_SN: Tensor, upper_SS: Tensor, *, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """Round columns one after the other by Viterbi's search, errors made up for by the columns after them.

    Args:
        bits: width of a code.
        w_SN: columns of weights, float32, contiguous; overwritten by what was rounded.
        scale_SN: scale of every weight.
        upper_SS: their part of the factored Hessian (`moeq.quantizers.gptq`).
        isa: one of `isas()` instead of the best.

    Returns:
        codes, uint8, and errors / U_jj, both (S, N).
    """
    codes_SN, error_SN = torch.empty(w_SN.shape, dtype=torch.uint8), torch.empty_like(w_SN)
    _module.trellis_columns(bits, w_SN, scale_SN.contiguous(), upper_SS.contiguous(), codes_SN, error_SN, isa=isa)
    return codes_SN, error_SN


def pack_codes(codes_NK: Tensor, spec: QuantSpec, record: Tensor, *, isa: str = "") -> None:
    """Write the planes of a matrix record (docs/format.md).

    Args:
        codes_NK: uint8 codes below 2^bits, on the CPU, contiguous.
        spec: how they are stored.
        record: uint8, the whole record, contiguous; only its planes are written.
        isa: one of `isas()` instead of the best.
    """
    shift = spec.bits
    rows, columns = codes_NK.shape
    for width, offset, size in sections(spec, (rows, columns)).planes:
        shift -= width
        _module.pack_plane(codes_NK, width, shift, record[offset : offset + size], isa=isa)


def decode_matrix(
    record: Tensor,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: tuple[int, int] | None = None,
    threads: int = 1,
    isa: str = "",
) -> Tensor:
    """The weights of a matrix record, (N, K).

    Args:
        record: uint8, the whole record, on the CPU, contiguous, aligned to 2 bytes.
        spec: how the matrix is stored.
        shape: (N, K).
        dtype: one of `DTYPES`.
        rows: only rows from the first to before the second.
        threads: how many do it.
        isa: one of `isas()` instead of the best.
    """
    where = sections(spec, shape)
    start, stop = rows or (0, shape[0])
    w_NK = torch.empty(stop - start, shape[1], dtype=dtype)
    if spec.codebooks is not None or spec.history:
        level = LEVELS.index(spec.levels)
        _module.decode_rows(record, shape[0], spec.bits, level, spec.group_size, start, w_NK, threads=threads, isa=isa)
        return w_NK
    skipped = start * num_groups(shape[1], spec.group_size)
    _module.decode_matrix(
        record,
        [(width, offset + start * plane_row_bytes(shape[1], width)) for width, offset, _ in where.planes],
        where.scales[0] + skipped * SCALE_BYTES,
        where.zeros[0] + skipped * ZERO_BYTES[spec.levels],
        bits=spec.bits,
        levels=LEVELS.index(spec.levels),
        group_size=shape[1] if spec.group_size == WHOLE_ROW else spec.group_size,
        w=w_NK,
        threads=threads,
        isa=isa,
    )
    return w_NK


def linear(
    record: Tensor, spec: QuantSpec, shape: tuple[int, int], x_SK: Tensor, *, exact: bool = False, isa: str = ""
) -> Tensor:
    """x W^T straight from the packed bytes, (S, N) in the dtype of x; for few rows of x.

    It reads W once. Activations are rounded to 8 bits in runs of 128, each with its own scale; the sums are those of
    integers. The result does not depend on the number of threads, which is torch's.

    Args:
        record: uint8, the whole record, on the CPU, contiguous, aligned to 2 bytes.
        spec: how the matrix is stored.
        shape: (N, K).
        x_SK: of one of `DTYPES`, contiguous.
        exact: keep activations in float32 instead; slower.
        isa: one of `isas()` instead of the best.
    """
    form = shape[0], spec.bits, spec.group_size, LEVELS.index(spec.levels)
    return linears([record], [form], x_SK, exact=exact, isa=isa)[0]


def linears(
    records: Sequence[Tensor],
    forms: Sequence[tuple[int, int, int, int]],
    x_SK: Tensor,
    *,
    exact: bool = False,
    isa: str = "",
) -> list[Tensor]:
    """As `linear`, for several matrices that meet the same x, which is prepared once.

    Args:
        records: of matrices with K columns.
        forms: (N, bits, group size, position of the level set in `LEVELS`) of each.
        x_SK: as for `linear`, like everything after it.
    """
    answers = [x_SK.new_empty(x_SK.shape[0], form[0]) for form in forms]
    x, threads = arrays(x_SK.detach())[0], torch.get_num_threads()
    _module.linear(arrays(*records), forms, x, arrays(*answers), exact, threads, isa)
    return answers


def experts(
    data: Tensor,
    table: Tensor,
    inner: int,
    x_TH: Tensor,
    index_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    exact: bool = False,
    isa: str = "",
) -> Tensor:
    """The routed experts of a layer, gated by SiLU, in one call: (T, H) in the dtype of x; for few tokens.

    Every chosen matrix is read once, whatever its width. Activations and threads as in `linear`.

    Args:
        data: uint8, the layer's blob, on the CPU, contiguous, aligned to 2 bytes.
        table: what says where matrices lie, int64, (E, 3, 4), as on disk (docs/format.md).
        inner: width of an expert.
        x_TH: of one of `DTYPES`, contiguous.
        index_Tk: experts of each token, int64; numbers that are too large are left out.
        weight_Tk: their weights, of one of `DTYPES`.
        exact: keep activations in float32 instead; slower.
        isa: one of `isas()` instead of the best.

    Raises:
        ValueError: the table points outside the blob.
    """
    y_TH = torch.empty_like(x_TH)
    routed = arrays(x_TH.detach(), index_Tk, weight_Tk.detach(), y_TH)
    _module.experts(*arrays(data, table), inner, *routed, exact, torch.get_num_threads(), isa)
    return y_TH


def spectral_experts(
    data: Tensor,
    table: Tensor,
    starts: Tensor,
    order: Tensor,
    inner: int,
    x_TH: Tensor,
    index_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    exact: bool = False,
    isa: str = "",
) -> Tensor:
    """As `experts`, for the layout "spectral".

    Inputs are rounded to 8 bits where they meet a basis of 8 bits and where they meet down's components. Coefficients
    of components of up to 4 bits are rounded to 8 bits, those of wider ones to 16,
    in runs of 16 or 32 components.

    Args:
        data: the layer's blob, as for `experts`.
        table: where its parts lie, int64, (3, 8, 5), as on disk (docs/format.md).
        starts: first row of each expert in each slab, and one past the last, int64, (3, 7, E + 1).
        order: directions of each expert's components in the order of its rows, int16, (3, E, at least R).
        inner: width of an expert.
        x_TH: as for `experts`, like everything after it.

    Raises:
        ValueError: something points outside the blob or a basis.
    """
    y_TH = torch.empty_like(x_TH)
    routed = arrays(x_TH.detach(), index_Tk, weight_Tk.detach(), y_TH)
    layer = arrays(data, table, starts, order)
    _module.spectral_experts(*layer, inner, *routed, exact, torch.get_num_threads(), isa)
    return y_TH


def tiled_experts(
    data: Tensor,
    table: Tensor,
    sides: Tensor,
    tiles: Tensor,
    inner: int,
    x_TH: Tensor,
    index_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    exact: bool = False,
    isa: str = "",
) -> Tensor:
    """As `experts`, for the layout "tiled".

    Args:
        data: blob of the residuals, as for `experts`.
        table: of the residuals, as for `experts`.
        sides: blob of factors, cells, scales and permutations, uint8, aligned to 2 bytes.
        tiles: how to read it, int64, (3, 8), as on disk (docs/format.md).
        inner: width of an expert.
        x_TH: as for `experts`, like everything after it.

    Raises:
        ValueError: something points outside its blob.
    """
    y_TH = torch.empty_like(x_TH)
    routed = arrays(x_TH.detach(), index_Tk, weight_Tk.detach(), y_TH)
    layer = arrays(data, table, sides, tiles)
    _module.tiled_experts(*layer, inner, *routed, exact, torch.get_num_threads(), isa)
    return y_TH


def arrays(*tensors: Tensor) -> list[Any]:
    """Tensors as the extension takes them. It would ask each tensor itself, which takes torch five times as long."""
    return [to_dlpack(tensor) for tensor in tensors]


def read_bandwidth(data: Tensor, *, isa: str = "") -> float:
    """Bytes per second at which torch's number of threads reads a buffer once; give one larger than all caches."""
    return _module.read_bandwidth(data, torch.get_num_threads(), isa)

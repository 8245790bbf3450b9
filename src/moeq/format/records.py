"""Codes to bytes and back: pure functions over torch tensors (docs/format.md, "Planes").

Legend: N output rows, K input columns, G groups per row, B bytes.
"""

from typing import Final

import torch
from torch import Tensor

from moeq import blocks, native
from moeq.spec import (
    BLOCK,
    WHOLE_ROW,
    Codebooks,
    QuantSpec,
    Sections,
    num_groups,
    plane_row_bytes,
    sections,
    stored_bytes,
)
from moeq.trellis import codes as trellis

CODE_DTYPE: Final = torch.uint8


def _pack_block(codes: Tensor, width: int) -> Tensor:
    """(..., n) codes below 2^width with n a multiple of 8 -> (..., n * width / 8) bytes.

    Byte j holds in its field s (bits s*width ..) the code s * m + j, m being the bytes of the block.
    """
    fields = 8 // width
    split = codes.unflatten(-1, (fields, codes.shape[-1] // fields))
    packed = split[..., 0, :].clone()
    for field in range(1, fields):
        packed |= split[..., field, :] << (field * width)
    return packed


def _unpack_block(packed: Tensor, width: int) -> Tensor:
    fields = 8 // width
    if fields == 1:
        return packed
    out = packed.new_empty(*packed.shape[:-1], fields, packed.shape[-1])
    for field in range(fields):
        torch.bitwise_right_shift(packed, field * width, out=out[..., field, :])
    return out.bitwise_and_((1 << width) - 1).flatten(-2)


def pack_plane(codes_NK: Tensor, width: int) -> Tensor:
    """Pack codes below 2^width.

    Args:
        codes_NK: uint8 codes, (N, K), any K.
        width: 1, 2, 4 or 8.

    Returns:
        uint8, (N, plane_row_bytes(K, width)).
    """
    rows, columns = codes_NK.shape
    full = columns // BLOCK * BLOCK
    blocks = codes_NK[:, :full].unflatten(-1, (full // BLOCK, BLOCK)) if full else codes_NK.new_zeros(rows, 0, BLOCK)
    parts = [_pack_block(blocks, width).flatten(1)]
    tail = columns - full
    if tail:
        padded = codes_NK.new_zeros(rows, -(-tail // 8) * 8)
        padded[:, :tail] = codes_NK[:, full:]
        parts.append(_pack_block(padded, width))
    return torch.cat(parts, dim=1).contiguous()


def unpack_plane(packed_NB: Tensor, width: int, columns: int) -> Tensor:
    """Inverse of `pack_plane`: uint8 codes, (N, columns)."""
    rows = packed_NB.shape[0]
    full = columns // BLOCK * BLOCK
    block_bytes = BLOCK * width // 8
    split = full // BLOCK * block_bytes
    head = packed_NB[:, :split].unflatten(-1, (full // BLOCK, block_bytes)) if full else None
    parts = [_unpack_block(head, width).flatten(1)] if head is not None else []
    if head is not None and columns == full:
        return parts[0]
    if columns - full:
        parts.append(_unpack_block(packed_NB[:, split:], width)[:, : columns - full])
    return torch.cat(parts, dim=1) if parts else packed_NB.new_zeros(rows, 0)


def plane_spec(spec: QuantSpec) -> QuantSpec:
    """A spec whose codes lie in the same planes as those of `spec`; columns are codes, not weights."""
    books = spec.codebooks
    return spec if books is None else QuantSpec(bits=books.code_bits, group_size=WHOLE_ROW, levels="half")


def pack_matrix(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, spec: QuantSpec) -> Tensor:
    """One matrix record.

    Args:
        codes_NK: uint8 codes below 2^bits; for `vector` one for each vector, (N, K / dim).
        scale_NG: float16 scales.
        zero_NG: uint8 for `asym`, float16 for `asym16`, None for `sym` and `half`; for `vector` the codebooks, uint8;
            for `ggml` this and `scale_NG` are the last two parts of `moeq.blocks.Blocks`.
        spec: how to store it.

    Returns:
        uint8, (stored_bytes(spec, (N, K)),); padding is zero.
    """
    rows, columns = codes_NK.shape
    if spec.in_blocks:
        stored = blocks.pack(blocks.Blocks(codes_NK, scale_NG, zero_NG), blocks.kind_of(spec, columns)).view(-1)
        padding = stored_bytes(spec, (rows, columns)) - stored.numel()
        return torch.nn.functional.pad(stored, (0, padding))
    where = sections(spec, (rows, columns * (1 if spec.codebooks is None else spec.codebooks.dim)))
    record = torch.zeros(where.total, dtype=torch.uint8)
    if native.available() and codes_NK.device.type == "cpu" and codes_NK.numel():
        native.pack_codes(codes_NK.detach().contiguous(), plane_spec(spec), record)
    else:
        pack_codes(codes_NK, plane_spec(spec), record)
    offset, size = where.scales
    record[offset : offset + size] = scale_NG.contiguous().view(torch.uint8).view(-1)
    offset, size = where.zeros
    if size and zero_NG is not None:
        record[offset : offset + size] = zero_NG.contiguous().view(torch.uint8).view(-1)
    return record


def pack_codes(codes_NK: Tensor, spec: QuantSpec, record: Tensor) -> None:
    """Write the planes of a matrix record: the truth that the compiled kernel is tested against.

    Args:
        codes_NK: uint8 codes below 2^bits.
        spec: how to store them.
        record: uint8, the whole record; only its planes are written.
    """
    rows, columns = codes_NK.shape
    shift = spec.bits
    planes = sections(spec, (rows, columns)).planes
    for width, offset, size in planes:
        shift -= width
        plane = (codes_NK >> shift) & ((1 << width) - 1) if len(planes) > 1 else codes_NK
        record[offset : offset + size] = pack_plane(plane, width).view(-1)


def unpack_codes(record: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """The uint8 codes (N, K) of a matrix record; (N, K / dim) for `vector`."""
    rows, columns = shape[0], shape[1] if spec.codebooks is None else shape[1] // spec.codebooks.dim
    where = sections(spec, shape).planes
    planes = [(w, record[at : at + size].view(rows, plane_row_bytes(columns, w))) for w, at, size in where]
    return _join(planes, columns)


def unpack_scales(record: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """The float16 scales and stored zeros (or None) of a matrix record, each (N, G), as views.

    For `vector` the second are the codebooks, (down, across, entries * dim).
    """
    rows, columns = shape
    where: Sections = sections(spec, shape)
    groups = num_groups(columns, spec.group_size)
    offset, size = where.scales
    scale_NG = record[offset : offset + size].view(torch.float16).view(rows, groups)
    offset, size = where.zeros
    if not size:
        return scale_NG, None
    stored = record[offset : offset + size]
    if spec.codebooks is not None:
        return scale_NG, stored.view(*spec.codebooks.grid(shape), -1)
    zero_NG = stored.view(torch.float16) if spec.levels == "asym16" else stored
    return scale_NG, zero_NG.view(rows, groups)


def real_zeros(zero_NG: Tensor | None, spec: QuantSpec) -> Tensor | float:
    """The zero of each group in units of codes, float32; a number where the level set fixes it."""
    if spec.levels == "sym":
        return float(2 ** (spec.bits - 1))
    if spec.levels == "half":
        return (2**spec.bits - 1) / 2
    assert zero_NG is not None
    if spec.levels == "asym16":
        return zero_NG.float()
    return zero_NG.float() * ((2**spec.bits - 1) / 255)


def dequantize(
    codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """w = scale * (code - zero), computed in float32, (N, K) in `dtype`.

    For `vector` the entries that codes name, for `trellis` those that codes and the ones above them name: of rows from
    the middle of a matrix the first `spec.history` come out wrong.
    """
    rows, columns = codes_NK.shape
    if spec.in_blocks:
        return blocks.dequantize(blocks.Blocks(codes_NK, scale_NG, zero_NG), blocks.kind_of(spec, columns), dtype)
    if spec.codebooks is not None:
        assert zero_NG is not None
        return _look_up(codes_NK, scale_NG, zero_NG, spec.codebooks, dtype)
    groups = num_groups(columns, spec.group_size)
    group_size = columns if groups == 1 else spec.group_size
    scale_NG = scale_NG.float()
    zero = 0.0 if spec.history else real_zeros(zero_NG, spec)
    padded = groups * group_size
    codes = trellis.entries(codes_NK, spec.bits) if spec.history else codes_NK.float()
    if padded != columns:
        codes = torch.nn.functional.pad(codes, (0, padded - columns))
    w_NGg = codes.view(rows, groups, group_size)
    w_NGg.sub_(zero if isinstance(zero, float) else zero.unsqueeze(-1)).mul_(scale_NG.unsqueeze(-1))
    return w_NGg.view(rows, padded)[:, :columns].to(dtype)


def _look_up(codes_NV: Tensor, scale_N1: Tensor, entries: Tensor, books: Codebooks, dtype: torch.dtype) -> Tensor:
    """The weights (N, K) of codes (N, K / dim), scales of rows and entries (blocks, entries, dim), block by block."""
    rows, vectors = codes_NV.shape
    across = -(-vectors * books.dim // books.columns)
    table_Vd = entries.view(-1, books.dim).float() - 128
    down_N = torch.arange(rows, device=codes_NV.device) // books.rows
    across_V = torch.arange(vectors, device=codes_NV.device) // (books.columns // books.dim)
    book_NV = down_N.unsqueeze(1) * across + across_V
    return (table_Vd[book_NV * books.entries + codes_NV].flatten(1) * scale_N1.float()).to(dtype)


CHUNK_WEIGHTS: Final = 1 << 18
"""Weights decoded at a time: what fits into a core's second-level cache with its temporaries."""


def decode_matrix(
    record: Tensor,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The weights (N, K) of a matrix record in `dtype`, or only the rows from `rows[0]` to before `rows[1]`.

    The compiled kernel gives the same bits as `decode_in_chunks`.
    """
    plain = record.device.type == "cpu" and record.is_contiguous() and record.data_ptr() % 2 == 0
    if (
        native.decodes()
        and plain
        and not spec.in_blocks
        and dtype in native.DTYPES
        and record.numel() >= sections(spec, shape).total
    ):
        return native.decode_matrix(record.detach(), spec, shape, dtype, rows=rows)
    return decode_in_chunks(record, spec, shape, dtype, rows=rows)


def decode_in_chunks(
    record: Tensor,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """`decode_matrix` with torch alone. This is the truth every kernel is tested against."""
    if spec.codebooks is not None:
        return _decode_vectors(record, spec, shape, dtype, rows)
    columns = shape[1]
    first, last = rows or (0, shape[0])
    if spec.in_blocks:
        return blocks.decode(record, spec, shape, (first, last)).to(dtype)
    scale_NG, zero_NG = unpack_scales(record, spec, shape)
    planes = [
        (width, record[offset : offset + size].view(shape[0], plane_row_bytes(columns, width)))
        for width, offset, size in sections(spec, shape).planes
    ]
    step = max(1, CHUNK_WEIGHTS // columns)
    w_NK = torch.empty(last - first, columns, dtype=dtype, device=record.device)
    for start in range(first, last, step):
        above = min(start, spec.history)  # rows that those of a trellis depend on
        part = slice(start - above, min(last, start + step))
        codes = _join([(width, plane[part]) for width, plane in planes], columns)
        zero = None if zero_NG is None else zero_NG[part]
        some_NK = dequantize(codes, scale_NG[part], zero, spec, dtype)
        w_NK[start - first : part.stop - first] = some_NK[above:]
    return w_NK


def _decode_vectors(
    record: Tensor, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, rows: tuple[int, int] | None
) -> Tensor:
    """`decode_in_chunks` for the level set "vector"; whole blocks of rows are decoded."""
    books = spec.codebooks
    assert books is not None
    scale_NG, zero_NG = unpack_scales(record, spec, shape)
    assert zero_NG is not None
    first, last = rows or (0, shape[0])
    start, stop = first // books.rows * books.rows, min(shape[0], -(-last // books.rows) * books.rows)
    columns = shape[1] // books.dim
    planes = [
        (width, record[offset : offset + size].view(shape[0], -1)[start:stop])
        for width, offset, size in sections(spec, shape).planes
    ]
    down = slice(start // books.rows, -(-stop // books.rows))
    w_NK = _look_up(_join(planes, columns), scale_NG[start:stop], zero_NG[down], books, dtype)
    return w_NK[first - start : last - start]


def _join(planes: list[tuple[int, Tensor]], columns: int) -> Tensor:
    """The codes that planes hold, most significant plane first."""
    width, plane = planes[0]
    codes = unpack_plane(plane, width, columns)
    for width, plane in planes[1:]:
        codes = codes.bitwise_left_shift(width).bitwise_or_(unpack_plane(plane, width, columns))
    return codes

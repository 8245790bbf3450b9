"""How a layer of the layout "spectral" lies in its file (docs/format.md, "Spectral layers").

`<path>.moeq_data` holds for each projection its basis, its map and its slabs; `<path>.moeq_table` (I64, [P, 8, 5])
says of the basis and of each slab its offset, bits, group size, level set and rows. Where gate and up share a basis,
up's row repeats gate's.

Legend: P projections, E experts, H hidden size, I expert width, R kept directions, n components of one expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.errors import MoeqError, PackedError
from moeq.format.records import decode_matrix, pack_codes, pack_matrix, unpack_codes
from moeq.layouts.spectral.shape import (
    SLAB_COLUMNS,
    SLAB_WIDTHS,
    WIDTHS,
    Form,
    SpectralShape,
    Widths,
    basis_bytes,
    basis_spec,
    kept_directions,
    map_bytes,
    map_spec,
    slab_bytes,
    slab_rows,
)
from moeq.spec import LEVELS, QuantSpec

_FIX: Final = "quantize the model again, or download the checkpoint again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """The components of one width: a matrix record of `rows` rows.

    Attributes:
        offset: its first byte in the blob.
        spec: how it is stored.
        rows: components of all experts.
    """

    offset: int
    spec: QuantSpec
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralEntry:
    """Where the parts of one projection lie.

    Attributes:
        projection: its name.
        rank: directions of the basis.
        basis: first byte of the basis.
        basis_bits: 8, or 16 for raw float16.
        map: first byte of the map.
        slabs: those that have rows, widest first.
    """

    projection: str
    rank: int
    basis: int
    basis_bits: int
    map: int
    slabs: tuple[Slab, ...]


def build_spectral_table(form: Form, widths: Mapping[str, Widths], shape: SpectralShape) -> Tensor:
    """The table of a layer, int64, [P, 8, 5].

    Args:
        form: how the model is stored.
        widths: projection -> widths of all components, (E, H).
        shape: of the layer.
    """
    kept = kept_directions(widths, joint=form.joint)
    spec = basis_spec(form.basis_bits)
    rows: list[list[list[int]]] = []
    end = 0
    for name in shape.projections:
        rank = int(kept[name].sum())
        shared = form.joint and name == "up"
        group, level = (0, 0) if spec is None else (spec.group_size, LEVELS.index(spec.levels))
        at = rows[-1][0][0] if shared else end
        projection = [[at, form.basis_bits, group, level, rank]]
        end += 0 if shared else basis_bytes(form.basis_bits, rank, shape.hidden)
        end += map_bytes(shape.num_experts, rank)
        for width, count in slab_rows(widths[name]).items():
            slab = form.slabs.get(width, QuantSpec(bits=width, levels="half"))
            projection.append([end, width, slab.group_size, LEVELS.index(slab.levels), count])
            end += slab_bytes(slab, count, shape.inner)
        rows.append(projection)
    return torch.tensor(rows, dtype=torch.int64)


def parse_spectral_table(
    table: Tensor, shape: SpectralShape, num_bytes: int, *, tensor: str | None = None
) -> tuple[SpectralEntry, ...]:
    """Read and prove the table of a layer.

    Args:
        table: int64, [P, 8, 5].
        shape: of the layer.
        num_bytes: bytes of the blob.
        tensor: name of the table, for messages.

    Raises:
        PackedError: wrong dtype or shape, illegal specs, or offsets that are not what the specs imply.
    """
    wanted = (len(shape.projections), 1 + len(SLAB_WIDTHS), len(SLAB_COLUMNS))
    if table.dtype != torch.int64 or table.shape != wanted:
        raise PackedError(
            f"the table is {table.dtype} {list(table.shape)}, not int64 {list(wanted)}", tensor=tensor, fix=_FIX
        )
    entries: list[SpectralEntry] = []
    end = 0
    for name, rows in zip(shape.projections, table.tolist(), strict=True):
        before = entries[-1] if entries and name == "up" else None
        entry, end = _parse_projection(name, rows, shape, end, before, tensor)
        entries.append(entry)
    if end != num_bytes:
        raise PackedError(f"the parts take {end} bytes, the data has {num_bytes}", tensor=tensor, fix=_FIX)
    return tuple(entries)


def _parse_projection(
    name: str,
    rows: list[list[int]],
    shape: SpectralShape,
    end: int,
    gate: SpectralEntry | None,
    tensor: str | None,
) -> tuple[SpectralEntry, int]:
    at, bits, _, _, rank = rows[0]
    spec = basis_spec(bits) if bits in (8, 16) else None
    facts = [0, 0] if spec is None else [spec.group_size, LEVELS.index(spec.levels)]
    if bits not in (8, 16) or rows[0][2:4] != facts or not 0 <= rank <= shape.hidden:
        raise PackedError(f"the basis of {name} is malformed", tensor=tensor, fix=_FIX)
    shared = gate is not None and (gate.basis, gate.basis_bits, gate.rank) == (at, bits, rank) and at != end
    if not shared and at != end:
        raise PackedError(f"the basis of {name} is said to start at byte {at}, not {end}", tensor=tensor, fix=_FIX)
    end += 0 if shared else basis_bytes(bits, rank, shape.hidden)
    where = end
    end += map_bytes(shape.num_experts, rank)
    slabs = []
    for width, (offset, stored, group_size, level, count) in zip(SLAB_WIDTHS, rows[1:], strict=True):
        try:
            if stored != width or not 0 <= level < len(LEVELS) or not 0 <= count <= shape.num_experts * rank:
                raise PackedError(f"{stored} bits, level set {level}, {count} rows")
            slab = QuantSpec(bits=width, group_size=group_size, levels=LEVELS[level], layout="spectral")
        except MoeqError as error:
            raise PackedError(
                f"the {width}-bit slab of {name} is malformed: {error}", tensor=tensor, fix=_FIX
            ) from None
        if offset != end:
            raise PackedError(
                f"the {width}-bit slab of {name} is said to start at byte {offset}, not {end}", tensor=tensor, fix=_FIX
            )
        end += slab_bytes(slab, count, shape.inner)
        if count:
            slabs.append(Slab(offset=offset, spec=slab, rows=count))
    return (
        SpectralEntry(projection=name, rank=rank, basis=at, basis_bits=bits, map=where, slabs=tuple(slabs)),
        end,
    )


def pack_basis(rows: Tensor, scale_NG: Tensor | None, bits: int) -> Tensor:
    """The record of a basis, uint8.

    Args:
        rows: a direction in each row, (R, H): float16 values, or the uint8 codes of 8 bits.
        scale_NG: float16 scales of the codes.
        bits: 8 or 16.
    """
    spec = basis_spec(bits)
    record = torch.zeros(basis_bytes(bits, rows.shape[0], rows.shape[1]), dtype=torch.uint8)
    if not record.numel():
        return record
    if spec is not None:
        assert scale_NG is not None
        return pack_matrix(rows, scale_NG, None, spec)
    raw = rows.half().contiguous().view(torch.uint8).view(-1)
    record[: raw.numel()] = raw
    return record


def decode_basis(record: Tensor, bits: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The basis (R, H) of a record in `dtype`."""
    spec = basis_spec(bits)
    if not min(shape):
        return torch.zeros(shape, dtype=dtype, device=record.device)
    if spec is not None:
        return decode_matrix(record, spec, shape, dtype)
    return record[: 2 * shape[0] * shape[1]].view(torch.float16).view(shape).to(dtype)


def pack_map(widths_ER: Widths) -> Tensor:
    """The map of the kept directions' widths, uint8."""
    experts, rank = widths_ER.shape
    codes = torch.from_numpy(np.searchsorted(np.array(WIDTHS), widths_ER).astype(np.uint8))
    record = torch.zeros(map_bytes(experts, rank), dtype=torch.uint8)
    if rank:
        pack_codes(codes, map_spec(), record)
    return record


def decode_map(record: Tensor, num_experts: int, rank: int) -> Widths:
    """Inverse of `pack_map`: widths (E, R)."""
    if not rank:
        return np.zeros((num_experts, 0), dtype=np.uint8)
    codes_ER = unpack_codes(record.cpu(), map_spec(), (num_experts, rank))
    return np.array(WIDTHS, dtype=np.uint8)[codes_ER.numpy()]


def packed_order(widths_R: Widths) -> np.ndarray:
    """Directions of one expert's components in the order of its rows: by falling width, then by direction."""
    kept = np.flatnonzero(widths_R)
    return kept[np.argsort(-widths_R[kept].astype(np.int64), kind="stable")]


def check_map(widths_ER: Widths, entry: SpectralEntry, path: str) -> None:
    """Raise PackedError unless the map has as many components of each width as the slabs have rows."""
    rows = {slab.spec.bits: slab.rows for slab in entry.slabs}
    found = {width: count for width, count in slab_rows(widths_ER).items() if count}
    if rows != found:
        raise PackedError(f"map and slabs of {entry.projection} count other components", tensor=path, fix=_FIX)


def decode_factor(
    data: Tensor, entry: SpectralEntry, starts: Sequence[tuple[int, int]], inner: int, dtype: torch.dtype
) -> Tensor:
    """The components of one expert, (n, I), in the order of `packed_order`.

    Args:
        data: the layer's blob.
        entry: the projection.
        starts: for each slab of `entry`, the expert's first row and the row after its last.
        inner: I.
        dtype: of the result.
    """
    parts = []
    for slab, (start, stop) in zip(entry.slabs, starts, strict=True):
        if stop > start:
            record = data[slab.offset : slab.offset + slab_bytes(slab.spec, slab.rows, inner)]
            parts.append(decode_matrix(record, slab.spec, (slab.rows, inner), dtype, rows=(start, stop)))
    return torch.cat(parts) if parts else torch.zeros(0, inner, dtype=dtype, device=data.device)

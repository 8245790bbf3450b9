"""How the sides of a layer of the layout "tiled" lie in its file (docs/format.md, "Tiled layers").

`<path>.moeq_sides` (U8) holds the sides of its projections back to back, `<path>.moeq_tiles` (I64, [P, 8]) says how to
read them. The residuals lie in `<path>.moeq_data` and `<path>.moeq_table`, as those of a grouped layer.

Legend: E experts, M x N grid, I inputs, O outputs, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeq.errors import PackedError
from moeq.format.records import decode_matrix, pack_matrix
from moeq.layouts.tiled.shape import FACTOR, INDEX_BYTES, SHARING, TILE_COLUMNS, TileForm, side_sections
from moeq.model_parts import PROJECTIONS

_FIX: Final = "quantize the model again, or download the checkpoint again"

Codes = tuple[Tensor, Tensor]
"""Codes (rows, columns) and scales (rows, 1) of a rounded factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileEntry:
    """Where the sides of one projection lie.

    Attributes:
        offset: their first byte in the blob.
        form: how they are stored.
    """

    offset: int
    form: TileForm


def build_tile_table(forms: Mapping[str, TileForm], num_experts: int, shapes: Mapping[str, tuple[int, int]]) -> Tensor:
    """The table of a layer's sides, int64, [P, 8]."""
    rows, offset = [], 0
    for name in (name for name in PROJECTIONS if name in forms):
        form = forms[name]
        sharing = SHARING.index(form.scales), SHARING.index(form.orders)
        rows.append([offset, form.rank, form.rows, form.columns, *sharing, form.block, form.plain])
        offset += side_sections(form, num_experts, shapes[name]).total
    return torch.tensor(rows, dtype=torch.int64)


def parse_tile_table(
    table: Tensor, num_experts: int, shapes: Mapping[str, tuple[int, int]], num_bytes: int, *, tensor: str | None = None
) -> dict[str, TileEntry]:
    """Read and prove the table of a layer's sides.

    Args:
        table: int64, [P, 8].
        num_experts: E.
        shapes: projection -> (O, I), in storage order.
        num_bytes: bytes of the blob.
        tensor: name of the table, for messages.

    Raises:
        PackedError: wrong dtype or shape, illegal values, or offsets that are not what they imply.
    """
    if table.dtype != torch.int64 or table.shape != (len(shapes), len(TILE_COLUMNS)):
        raise PackedError(
            f"the table is {table.dtype} {list(table.shape)}, not int64 [{len(shapes)}, {len(TILE_COLUMNS)}]",
            tensor=tensor,
            fix=_FIX,
        )
    entries, end = {}, 0
    for (name, shape), row in zip(shapes.items(), table.tolist(), strict=True):
        offset, rank, rows, columns, scales, orders, block, plain = row
        if not (0 <= scales < len(SHARING) and 0 <= orders < len(SHARING)):
            raise PackedError(f"the sides of {name} are shared in an unknown way", tensor=tensor, fix=_FIX)
        form = TileForm(
            rank=rank,
            rows=rows,
            columns=columns,
            scales=SHARING[scales],
            orders=SHARING[orders],
            block=block,
            plain=plain,
        )
        problem = form.problem(num_experts, shape)
        if problem is not None:
            raise PackedError(f"{name} is said to have {problem}", tensor=tensor, fix=_FIX)
        if offset != end:
            raise PackedError(
                f"the sides of {name} are said to start at byte {offset}, not {end}", tensor=tensor, fix=_FIX
            )
        entries[name] = TileEntry(offset=offset, form=form)
        end += side_sections(form, num_experts, shape).total
    if end != num_bytes:
        raise PackedError(f"the sides take {end} bytes, the data has {num_bytes}", tensor=tensor, fix=_FIX)
    return entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sides:
    """The sides of one projection, as views of their bytes.

    Attributes:
        data: their bytes, uint8.
        form: how to read them.
        num_experts: E.
        shape: (O, I).
    """

    data: Tensor
    form: TileForm
    num_experts: int
    shape: tuple[int, int]

    def cells(self) -> Tensor:
        """Row and column of each expert, int64 (E, 2)."""
        offset, size = side_sections(self.form, self.num_experts, self.shape).cells
        return _indices(self.data[offset : offset + size]).view(self.num_experts, 2)

    def inputs(self, dtype: torch.dtype = torch.float32, row: int | None = None) -> Tensor:
        """The input factors of all grid rows, (M R, I), or that of one, (R, I)."""
        where = side_sections(self.form, self.num_experts, self.shape).inputs
        return self._factor(where, (self.form.rows, self.shape[1]), row, dtype)

    def outputs(self, dtype: torch.dtype = torch.float32, column: int | None = None) -> Tensor:
        """The output factors of all grid columns, (N R, O), or that of one, (R, O)."""
        where = side_sections(self.form, self.num_experts, self.shape).outputs
        return self._factor(where, (self.form.columns, self.shape[0]), column, dtype)

    def _factor(self, where: tuple[int, int], shape: tuple[int, int], tile: int | None, dtype: torch.dtype) -> Tensor:
        rank = self.form.rank
        rows = None if tile is None else (tile * rank, (tile + 1) * rank)
        record = self.data[where[0] : where[0] + where[1]]
        return decode_matrix(record, FACTOR, (shape[0] * rank, shape[1]), dtype, rows=rows)

    def scales(self) -> Tensor:
        """What divides the inputs of every expert's factors, float32 (E, I); only if they are stored."""
        start, size = side_sections(self.form, self.num_experts, self.shape).scales
        return self.data[start : start + size].view(torch.float16).view(self.num_experts, -1).float()

    def low_rank(self, expert: int) -> Tensor:
        """What the factors give for an expert, (O, I) float32."""
        row, column = self.cells()[expert].tolist()
        a_RI = self.inputs(torch.float32, row)
        if self.form.scales == "expert":
            a_RI = a_RI / self.scales()[expert]
        return self.outputs(torch.float32, column).T @ a_RI

    def order(self, expert: int) -> Tensor | None:
        """The permutation of an expert's inputs, int64 (I,), or None where nothing is rotated."""
        if self.form.orders == "none":
            return None
        owner = {"layer": 0, "expert": expert}.get(self.form.orders)
        if owner is None:
            owner = int(self.cells()[expert, 0])
        start = side_sections(self.form, self.num_experts, self.shape).orders[0]
        size = self.shape[1] * INDEX_BYTES
        return _indices(self.data[start + owner * size : start + (owner + 1) * size])


def _indices(data: Tensor) -> Tensor:
    """uint16 numbers as int64; torch has no arithmetic for the former."""
    pairs = data.view(-1, 2).long()
    return pairs[:, 0] + 256 * pairs[:, 1]


def _index_bytes(values: Tensor) -> Tensor:
    values = values.long().flatten().cpu()
    return torch.stack([values % 256, values // 256], dim=1).to(torch.uint8).flatten()


def pack_sides(
    form: TileForm,
    shape: tuple[int, int],
    cells_E2: Tensor,
    factors: tuple[Codes, Codes] | None,
    scales_EI: Tensor | None,
    orders: Tensor | None,
) -> Tensor:
    """The bytes of one projection's sides, uint8; padding is zero.

    Args:
        form: how they are stored.
        shape: (O, I).
        cells_E2: row and column of each expert.
        factors: input and output factors, if the rank is not 0.
        scales_EI: float16, if they are stored.
        orders: (owners, I), if there are any.
    """
    where = side_sections(form, len(cells_E2), shape)
    data = torch.zeros(where.total, dtype=torch.uint8)

    def put(place: tuple[int, int], part: Tensor) -> None:
        assert part.numel() == place[1]
        data[place[0] : place[0] + place[1]] = part

    if form.has_cells:
        put(where.cells, _index_bytes(cells_E2))
    if factors is not None:
        for place, (codes, scale) in zip((where.inputs, where.outputs), factors, strict=True):
            put(place, pack_matrix(codes, scale, None, FACTOR))
    if scales_EI is not None:
        put(where.scales, scales_EI.half().contiguous().view(torch.uint8).flatten())
    if orders is not None:
        put(where.orders, _index_bytes(orders))
    return data


def views(
    data: Tensor, entries: Mapping[str, TileEntry], num_experts: int, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Sides]:
    """The sides of a layer, as views of its blob."""
    found = {}
    for name, entry in entries.items():
        size = side_sections(entry.form, num_experts, shapes[name]).total
        part = data[entry.offset : entry.offset + size]
        found[name] = Sides(data=part, form=entry.form, num_experts=num_experts, shape=shapes[name])
    return found


def read_sides(
    data: Tensor,
    entries: Mapping[str, TileEntry],
    num_experts: int,
    shapes: Mapping[str, tuple[int, int]],
    path: str,
) -> dict[str, Sides]:
    """The sides of a layer, whose cells, scales and permutations are proven.

    Raises:
        PackedError: a cell lies outside the grid or is taken twice, a scale is not positive, or a permutation is none.
    """
    found = views(data, entries, num_experts, shapes)
    for name, sides in found.items():
        _check(sides, name, path)
    return found


def _check(sides: Sides, name: str, path: str) -> None:
    form = sides.form
    if form.has_cells:
        cells_E2 = sides.cells()
        inside = bool((cells_E2 < torch.tensor([form.rows, form.columns], device=cells_E2.device)).all())
        if not inside or len(torch.unique(cells_E2, dim=0)) != sides.num_experts:
            raise PackedError(f"experts of {name} share a cell or lie outside the grid", tensor=path, fix=_FIX)
    if form.scales == "expert":
        scales_EI = sides.scales()
        if not bool(((scales_EI > 0) & scales_EI.isfinite()).all()):
            raise PackedError(f"a scale of {name} is not positive", tensor=path, fix=_FIX)
    start, size = side_sections(form, sides.num_experts, sides.shape).orders
    if size:
        orders = _indices(sides.data[start : start + size]).view(-1, sides.shape[1])
        if not torch.equal(orders.sort(1).values, torch.arange(sides.shape[1], device=orders.device).expand_as(orders)):
            raise PackedError(f"the inputs of {name} are permuted by no permutation", tensor=path, fix=_FIX)

"""What kernels on a device want to know of rows that belong to groups: components of experts, factors of grid columns.

Such a row is met as a whole: a kernel multiplies it by one number and adds it to others, or takes its dot product.
Rows lie in slabs, matrix records of one width each; every group has a run of rows in each slab.

Legend: L slabs, one for each width; G groups; R rows of all slabs; H hidden, I expert width; M x N grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.components import SLAB_WIDTHS, Widths, basis_spec
from moeq.format.spectral import SpectralEntry, SpectralShape
from moeq.format.tiled import Sides
from moeq.kernels.packed import KernelFacts, Kinds, kernel_facts, kinds_of
from moeq.spec import QuantSpec
from moeq.tiling import FACTOR, INDEX_BYTES, side_sections

DOT_ROWS: Final = 32
"""Rows whose dot products one program of the kernel computes."""
MOST_MIXED: Final = 256
"""Inputs that are mixed by a product with a Hadamard matrix; more are mixed step by step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowFacts:
    """Rows of the slabs of a blob.

    Attributes:
        table: one line for each width of `SLAB_WIDTHS`, int64, (L, len(KERNEL_COLUMNS) + 1): the slab's record as in
            `KernelFacts.table`, then the position of its first row in `places`. Zeros where there is no such slab.
        firsts: first row of each group in each slab, and one past the last group's, int32, (L, G + 1).
        places: for each row, slab after slab, which number of the other operand it belongs to, int32, (R,).
        widths: a bit 1 << b for each width b that there is.
        span: inputs that share a scale in all slabs, at most 128.
        rows: rows of the largest group.
        blocks: programs that the dot products of the largest group take, `DOT_ROWS` for each.
        columns: numbers in a row.
    """

    table: Tensor
    firsts: Tensor
    places: Tensor
    widths: int
    span: int
    rows: int
    blocks: int
    columns: int

    @property
    def groups(self) -> int:
        """G, or 0 if there are no slabs."""
        return self.firsts.shape[1] - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpectralFacts:
    """What kernels on a device want to know of a spectral layer.

    Attributes:
        factors: projection -> the components of all experts.
        bases: projection -> its basis as a matrix (R, H), for products with inputs; absent for float16.
        back: the basis of down as rows, for products with components; None for float16.
    """

    factors: dict[str, RowFacts]
    bases: dict[str, KernelFacts]
    back: RowFacts | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideFacts:
    """What kernels on a device want to know of the sides of one projection of a tiled layer.

    Attributes:
        row_E, column_E: cell of each expert, int64; row 0 and column 0 of all where no cells are stored.
        inputs: the input factors as one matrix (M R, I); None without factors.
        outputs: the output factors' rows by grid column; None without factors.
        all_outputs: the same rows as one group: None without factors.
        scales: what divides the inputs of every expert's factors, float32 (E, I); None where none are stored.
        orders: permutations, int32 (owners, I); None where nothing is rotated.
        owner_E: whose permutation is each expert's, int64; None where one belongs to the layer, or nothing is rotated.
        mixing: Walsh-Hadamard matrix times a power of two, float32 (block, block); None where nothing is mixed so.
    """

    row_E: Tensor
    column_E: Tensor
    inputs: KernelFacts | None
    outputs: RowFacts | None
    all_outputs: RowFacts | None
    scales: Tensor | None
    orders: Tensor | None
    owner_E: Tensor | None
    mixing: Tensor | None


def row_facts(
    slabs: Sequence[tuple[int, QuantSpec, int]],
    columns: int,
    firsts: Sequence[np.ndarray],
    places: Sequence[np.ndarray],
    device: torch.device,
    kinds: Kinds | None = None,
) -> RowFacts:
    """The facts of some slabs.

    Args:
        slabs: those that have rows: offset in the blob, spec, rows.
        columns: numbers in a row.
        firsts: for each of them, first row of each group and one past the last, (G + 1,).
        places: for each of them, see `RowFacts.places`.
        device: where the blob is.
        kinds: what these rows and others have, as one projection; None for what they have themselves.
    """
    lines = torch.zeros(len(SLAB_WIDTHS), 9, dtype=torch.int64)
    first_LG = np.zeros((len(SLAB_WIDTHS), len(firsts[0]) if firsts else 1), dtype=np.int32)
    base = 0
    for (offset, spec, rows), first_G in zip(slabs, firsts, strict=True):
        at = SLAB_WIDTHS.index(spec.bits)
        lines[at, :8] = kernel_facts([[(offset, spec)]], [(rows, columns)], torch.device("cpu")).table[0, 0]
        lines[at, 8] = base
        first_LG[at] = first_G
        base += rows
    counts_LG = np.diff(first_LG, axis=1)
    kinds = kinds or kinds_of([{spec for _, spec, _ in slabs}])
    where = np.concatenate([*places, np.zeros(1)]).astype(np.int32)  # never empty: kernels get its address
    return RowFacts(
        table=lines.to(device),
        firsts=torch.from_numpy(first_LG).to(device),
        places=torch.from_numpy(where).to(device),
        widths=kinds.widths[0] if slabs else 0,
        span=kinds.spans[0],
        rows=int(counts_LG.sum(0).max(initial=0)),
        blocks=int((-(-counts_LG // DOT_ROWS)).sum(0).max(initial=0)),
        columns=columns,
    )


def one_group(offset: int, spec: QuantSpec, rows: int, columns: int, device: torch.device) -> RowFacts:
    """The rows of one record, which all belong together."""
    return row_facts([(offset, spec, rows)], columns, [np.array([0, rows])], [np.arange(rows)], device)


def spectral_facts(
    entries: Mapping[str, SpectralEntry],
    widths: Mapping[str, Widths],
    starts: Mapping[str, np.ndarray],
    shape: SpectralShape,
    device: torch.device,
    kinds: Mapping[str, Kinds] | None = None,
) -> SpectralFacts:
    """The facts of a spectral layer; arguments as the attributes of `moeq.kernels.spectral.SpectralLayer`."""
    factors, bases, back = {}, {}, None
    for name, entry in entries.items():
        slabs = [(slab.offset, slab.spec, slab.rows) for slab in entry.slabs]
        # Rows of a slab lie expert after expert, by rising direction: as numpy finds them.
        places = [np.nonzero(widths[name] == slab.spec.bits)[1] for slab in entry.slabs]
        factors[name] = row_facts(
            slabs, shape.inner, list(starts[name]), places, device, None if kinds is None else kinds[name]
        )
        spec = basis_spec(entry.basis_bits)
        if spec is not None and entry.rank:
            bases[name] = kernel_facts([[(entry.basis, spec)]], [(entry.rank, shape.hidden)], device)
            if name == "down":
                back = one_group(entry.basis, spec, entry.rank, shape.hidden, device)
    return SpectralFacts(factors=factors, bases=bases, back=back)


def side_facts(sides: Sides) -> SideFacts:
    """The facts of one projection's sides, on the device of their bytes."""
    form, device = sides.form, sides.data.device
    outputs, inputs = sides.shape
    where = side_sections(form, sides.num_experts, sides.shape)
    cells_E2 = sides.cells() if form.has_cells else torch.zeros(sides.num_experts, 2, dtype=torch.int64, device=device)
    in_factors = out_rows = all_rows = orders = owner_E = mixing = None
    if form.rank:
        rows = form.columns * form.rank
        place = where.outputs[0]
        in_factors = kernel_facts([[(where.inputs[0], FACTOR)]], [(form.rows * form.rank, inputs)], device)
        firsts = np.arange(form.columns + 1) * form.rank
        within = np.arange(rows) % form.rank
        out_rows = row_facts([(place, FACTOR, rows)], outputs, [firsts], [within], device)
        all_rows = one_group(place, FACTOR, rows, outputs, device)
    if form.orders != "none":
        start, size = where.orders
        pairs = sides.data[start : start + size].view(-1, inputs, INDEX_BYTES).int()
        orders = (pairs[..., 0] + 256 * pairs[..., 1]).contiguous()
        if form.orders == "tile":
            owner_E = cells_E2[:, 0].contiguous()
        elif form.orders == "expert":
            owner_E = torch.arange(sides.num_experts, device=device)
        if 1 < form.block <= MOST_MIXED and form.plain < inputs:
            mixing = _hadamard(form.block).to(device)
    return SideFacts(
        row_E=cells_E2[:, 0].contiguous(),
        column_E=cells_E2[:, 1].contiguous(),
        inputs=in_factors,
        outputs=out_rows,
        all_outputs=all_rows,
        scales=sides.scales() if form.scales == "expert" else None,
        orders=orders,
        owner_E=owner_E,
        mixing=mixing,
    )


def _hadamard(block: int) -> Tensor:
    """The matrix in Sylvester's order, times the power of two below 1 / sqrt(block): exact in every dtype."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / 2 ** -(-(block.bit_length() - 1) // 2)

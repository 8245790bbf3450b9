"""What kernels on a device want to know of packed bytes, as tables on that device and a few numbers.

Numbers that kernels are compiled for are kept apart from what they look up: layers of one model have the former in
common.

Legend: E experts, P projections, N output rows, K input columns; L slabs, one for each width; G groups; R rows of all
slabs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.spec import BITS, BLOCK, LEVELS, WHOLE_ROW, QuantSpec, num_groups, sections
from moeq.trellis.tables import TABLES

KERNEL_COLUMNS: Final = ("high", "low", "scales", "zeros", "bits", "group_size", "levels", "groups")
"""What a kernel on a device wants to know of a record: first bytes in the blob of its planes (twice the same where
there is one), scales and zeros; inputs that share a scale (K for the whole row); groups per row."""
ENTRY_COLUMNS: Final = 4
"""Behind them, the entries of a trellis, 32 bytes; zeros for other level sets."""
FACT_COLUMNS: Final = len(KERNEL_COLUMNS) + ENTRY_COLUMNS
"""Numbers in the line of a record."""
SLABS: Final = tuple(reversed(BITS))
"""Widths of slabs, in their order."""
DOT_ROWS: Final = 32
"""Rows whose dot products one program of the kernel computes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelFacts:
    """What kernels on a device want to know of a layer.

    Attributes:
        table: one line for each record, int64, (E, P, FACT_COLUMNS), on the device of the bytes.
        widths: for each projection, a bit for each kind of record that there is, see `kind_of`.
        spans: for each projection, inputs that share a scale in all of its records, at most 128.
    """

    table: Tensor
    widths: tuple[int, ...]
    spans: tuple[int, ...]

    def widths_of(self, position: int, *, gated: bool) -> int:
        """The kinds of a projection, or of it and the next if `gated`."""
        return self.widths[position] | (self.widths[position + 1] if gated else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """What kernels on a device are compiled for. Layers that have it in common share their kernels.

    Attributes:
        widths, spans: as in `KernelFacts`.
    """

    widths: tuple[int, ...]
    spans: tuple[int, ...]

    def __or__(self, other: "Kinds") -> "Kinds":
        """What serves both."""
        return Kinds(
            widths=tuple(a | b for a, b in zip(self.widths, other.widths, strict=True)),
            spans=tuple(min(a, b) for a, b in zip(self.spans, other.spans, strict=True)),
        )


def kinds_of(specs: Sequence[Iterable[QuantSpec]]) -> Kinds:
    """The kinds of the records of each projection; where there are none, blocks of 128 inputs may share a scale."""
    distinct = [set(each) for each in specs]
    return Kinds(
        widths=tuple(sum({kind_of(spec) for spec in each}) for each in distinct),
        spans=tuple(min((span_of(spec) for spec in each), default=BLOCK) for each in distinct),
    )


def span_of(spec: QuantSpec) -> int:
    """Inputs that share a scale, at most 128."""
    return BLOCK if spec.group_size == WHOLE_ROW else spec.group_size


def kind_of(spec: QuantSpec) -> int:
    """The bit of a kind of record that kernels on a device have code for: its width, 16 more for codebooks and 24
    more for trellises."""
    return 1 << spec.bits + (24 if spec.history else 0 if spec.codebooks is None else 16)


def kernel_facts(
    entries: Sequence[Sequence[tuple[int, QuantSpec]]],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    kinds: Kinds | None = None,
) -> KernelFacts:
    """The facts of a layer.

    Args:
        entries: expert -> projection (storage order) -> (offset in the blob, spec).
        shapes: projection, in the same order -> (N, K).
        device: where the blob is.
        kinds: what this layer and others have; None for what it has itself.
    """
    table = torch.tensor(
        [[_line(*entry, shape) for entry, shape in zip(expert, shapes, strict=True)] for expert in entries],
        dtype=torch.int64,
        device=device,
    ).view(len(entries), len(shapes), FACT_COLUMNS)
    if kinds is None:
        kinds = entry_kinds(entries, len(shapes))
    return KernelFacts(table=table, widths=kinds.widths, spans=kinds.spans)


def entry_kinds(entries: Sequence[Sequence[tuple[int, QuantSpec]]], projections: int) -> Kinds:
    """The kinds of the records of a layer."""
    return kinds_of([{expert[position][1] for expert in entries} for position in range(projections)])


def _line(offset: int, spec: QuantSpec, shape: tuple[int, int]) -> list[int]:
    where = sections(spec, shape)
    group_size = shape[1] if spec.group_size == WHOLE_ROW else spec.group_size
    starts = where.planes[0][1], where.planes[-1][1], where.scales[0], where.zeros[0]
    facts = spec.bits, group_size, LEVELS.index(spec.levels), num_groups(shape[1], spec.group_size)
    return [offset + start for start in starts] + list(facts) + _entries(spec)


@cache
def _entries(spec: QuantSpec) -> list[int]:
    if not spec.history:
        return [0] * ENTRY_COLUMNS
    entries = np.resize(np.array(TABLES[spec.bits], dtype=np.int8), 8 * ENTRY_COLUMNS)
    return [int(eight) for eight in entries.view(np.int64)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowFacts:
    """Rows of the slabs of a blob.

    Attributes:
        table: one line for each width of `SLABS`, int64, (L, FACT_COLUMNS + 1): the slab's record as in
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
    lines = torch.zeros(len(SLABS), FACT_COLUMNS + 1, dtype=torch.int64)
    first_LG = np.zeros((len(SLABS), len(firsts[0]) if firsts else 1), dtype=np.int32)
    base = 0
    for (offset, spec, rows), first_G in zip(slabs, firsts, strict=True):
        at = SLABS.index(spec.bits)
        lines[at, :FACT_COLUMNS] = kernel_facts([[(offset, spec)]], [(rows, columns)], torch.device("cpu")).table[0, 0]
        lines[at, FACT_COLUMNS] = base
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

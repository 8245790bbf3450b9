"""What kernels work on: views of packed bytes with the specs to read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeq.artifacts import PROJECTIONS
from moeq.format.blob import Entries
from moeq.spec import BLOCK, LEVELS, WHOLE_ROW, QuantSpec, num_groups, sections, stored_bytes

KERNEL_COLUMNS: Final = ("high", "low", "scales", "zeros", "bits", "group_size", "levels", "groups")
"""What a kernel on a device wants to know of a record: first bytes in the blob of its planes (twice the same where
there is one), scales and zeros; inputs that share a scale (K for the whole row); groups per row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelFacts:
    """What kernels on a device want to know of a layer.

    Attributes:
        table: one line for each record, int64, (E, P, len(KERNEL_COLUMNS)), on the device of the bytes.
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
    """The bit of a kind of record that kernels on a device have code for: its width, 16 more for codebooks."""
    return 1 << spec.bits + (0 if spec.codebooks is None else 16)


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
    ).view(len(entries), len(shapes), len(KERNEL_COLUMNS))
    if kinds is None:
        kinds = entry_kinds(entries, len(shapes))
    return KernelFacts(table=table, widths=kinds.widths, spans=kinds.spans)


def entry_kinds(entries: Sequence[Sequence[tuple[int, QuantSpec]]], projections: int) -> Kinds:
    """The kinds of the records of a layer."""
    return kinds_of([{expert[position][1] for expert in entries} for position in range(projections)])


def device_facts(
    data: Tensor, entries: Entries, shapes: Sequence[tuple[int, int]], kinds: Kinds | None = None
) -> KernelFacts | None:
    """The facts of bytes where they are now.

    None on a CPU, whose kernels read the table on disk.
    """
    if data.device.type == "cpu":
        return None
    return kernel_facts(entries, shapes, data.device, kinds)


def _line(offset: int, spec: QuantSpec, shape: tuple[int, int]) -> list[int]:
    where = sections(spec, shape)
    group_size = shape[1] if spec.group_size == WHOLE_ROW else spec.group_size
    starts = where.planes[0][1], where.planes[-1][1], where.scales[0], where.zeros[0]
    facts = spec.bits, group_size, LEVELS.index(spec.levels), num_groups(shape[1], spec.group_size)
    return [offset + start for start in starts] + list(facts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """One quantized matrix.

    Attributes:
        record: its bytes, uint8, (stored_bytes(spec, shape),).
        spec: how to read them.
        shape: (N, K).
        exact: whether kernels keep activations in floats: always, never, or (None) unless few tokens are computed.
        facts: for kernels on a device, as of a layer with one expert and one projection; None if nobody made them.
        compiled: whether compiled kernels for CPUs may compute it (`moeq.kernels.trust`).
    """

    record: Tensor
    spec: QuantSpec
    shape: tuple[int, int]
    exact: bool | None = None
    facts: KernelFacts | None = None
    compiled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayer:
    """All experts of one layer.

    Attributes:
        data: the layer's blob, uint8.
        entries: expert -> projection (storage order) -> (offset in the blob, spec).
        shapes: projection -> (N, K).
        table: `entries` as on disk, int64, (E, P, 4), on the CPU; None if nobody gave it to kernels.
        exact: whether kernels keep activations in floats: always, never, or (None) unless few tokens are computed.
        facts: for kernels on a device; None if nobody made them.
    """

    data: Tensor
    entries: Entries
    shapes: dict[str, tuple[int, int]]
    table: Tensor | None = None
    exact: bool | None = None
    facts: KernelFacts | None = None

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.entries)

    def matrix(self, expert: int, projection: str) -> PackedMatrix:
        """One matrix, as a view."""
        position = [name for name in PROJECTIONS if name in self.shapes].index(projection)
        offset, spec = self.entries[expert][position]
        shape = self.shapes[projection]
        record = self.data[offset : offset + stored_bytes(spec, shape)]
        return PackedMatrix(record=record, spec=spec, shape=shape, exact=self.exact)

"""The grouped layout in numbers: records of single matrices, each with a width of its own. No torch here."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX, LayerChoice, LayerPlan, OutTensor, data_tensor, table_tensor
from moeq.spec import TABLE_COLUMNS, QuantSpec, stored_bytes

RECORDS: Final = "grouped"
"""The layout of the specs that its matrices get."""
OPTIONS: Final = ()
"""Options of a recipe that mean something for this layout alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedPlan(LayerPlan):
    """Which spec every matrix gets.

    Attributes:
        specs: expert -> projection (storage order) -> spec.
        shapes: (N, K) of each projection, in the same order.
    """

    layout: ClassVar[str] = "grouped"

    specs: tuple[tuple[QuantSpec, ...], ...]
    shapes: tuple[tuple[int, int], ...]

    def tensors(self, path: str) -> tuple[tuple[OutTensor, OutTensor], ...]:
        """The blob of all records and its table."""
        size = sum(
            stored_bytes(s, shape) for expert in self.specs for s, shape in zip(expert, self.shapes, strict=True)
        )
        return (records(path, size, (len(self.specs), len(self.shapes))),)

    def widths_count(self) -> dict[int, int]:
        """Code bits -> matrices."""
        return dict(Counter(spec.bits for expert in self.specs for spec in expert))


def planned(choice: LayerChoice) -> GroupedPlan:
    """What a plan decides about a layer."""
    return GroupedPlan(specs=choice.specs, shapes=tuple(choice.shapes.values()))


def records(path: str, size: int, grid: tuple[int, int]) -> tuple[OutTensor, OutTensor]:
    """Blob and table of some records; `grid` has experts and projections."""
    table = table_tensor(path + TABLE_SUFFIX, (*grid, len(TABLE_COLUMNS)))
    return data_tensor(path + DATA_SUFFIX, size), table


def problem(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why experts of these shapes cannot have this layout, or None."""
    return None

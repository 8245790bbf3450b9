"""What it is and what it takes. No torch here."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from moeq.layouts.base import LayerChoice, LayerPlan, OutTensor, data_tensor, table_tensor
from moeq.spec import QuantSpec, stored_bytes

DATA, TABLE = ".reversed_data", ".reversed_bits"
RECORDS: Final = "reversed"
OPTIONS: Final = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReversedPlan(LayerPlan):
    """Which spec every matrix gets."""

    layout: ClassVar[str] = "reversed"

    choice: LayerChoice

    def tensors(self, path: str) -> tuple[tuple[OutTensor, OutTensor], ...]:
        """The records, and a width for each."""
        shapes = list(self.choice.shapes.values())
        size = sum(
            stored_bytes(spec, shape) for row in self.choice.specs for spec, shape in zip(row, shapes, strict=True)
        )
        grid = len(self.choice.specs), len(shapes)
        return ((data_tensor(path + DATA, size), table_tensor(path + TABLE, grid)),)

    def widths_count(self) -> dict[int, int]:
        """Code bits -> matrices."""
        return dict(Counter(spec.bits for row in self.choice.specs for spec in row))


def spec_of(bits: int) -> QuantSpec:
    """What a width in the table stands for; nothing else is stored of it."""
    return QuantSpec(bits=bits, group_size=32, levels="sym", layout="reversed")


def planned(choice: LayerChoice) -> ReversedPlan:
    """What a plan decides about a layer."""
    return ReversedPlan(choice=choice)


def problem(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Nothing speaks against it."""
    return None

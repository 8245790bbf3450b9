"""What a layout is to everybody who only counts bytes. No torch here.

A layout is how the experts of one layer are stored. It is a package of `moeq.layouts` with the same few files: `shape`
(this seam: what it is and what it takes), `stored` (its bytes), `reference`, `cpu`, `gpu` (its computation), `module`
(the seam of `moeq.layouts.serving`), `writer` (that of `moeq.layouts.layer_writer`) and `shown` (that of
`moeq.layouts.showing`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Final

from moeq.spec import QuantSpec

DATA_SUFFIX: Final = ".moeq_data"
TABLE_SUFFIX: Final = ".moeq_table"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutTensor:
    """One tensor of a packed checkpoint.

    Attributes:
        name: its name there.
        dtype: safetensors' name of the element type.
        shape: dimensions.
        size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def data_tensor(name: str, size: int) -> OutTensor:
    """A blob of `size` bytes."""
    return OutTensor(name=name, dtype="U8", shape=(size,), size=size)


def table_tensor(name: str, shape: tuple[int, ...]) -> OutTensor:
    """A table of int64 numbers."""
    size = 8
    for side in shape:
        size *= side
    return OutTensor(name=name, dtype="I64", shape=shape, size=size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerChoice:
    """What a plan holds about one layer, before its layout reads it.

    Attributes:
        specs: expert -> projection (storage order) -> spec; empty where no matrix has one.
        shapes: projection -> (N, K), in the same order.
        details: whatever else the plan holds for this layout.
    """

    specs: tuple[tuple[QuantSpec, ...], ...]
    shapes: Mapping[str, tuple[int, int]]
    details: Any = None


class LayerPlan(ABC):
    """What a plan decides about the experts of one layer; made by `planned` in the file `shape` of a layout."""

    layout: ClassVar[str]

    @abstractmethod
    def tensors(self, path: str) -> tuple[tuple[OutTensor, OutTensor], ...]:
        """Blobs with their tables, as they are stored; those of the experts first."""
        ...

    @abstractmethod
    def widths_count(self) -> dict[int, int]:
        """Code bits -> expert matrices that get them, or components."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of all experts of the layer, tables included."""
        return sum(tensor.size for pair in self.tensors("") for tensor in pair)

    @property
    def fixed_bytes(self) -> int:
        """Those of them that do not depend on widths."""
        return sum(table.size for _, table in self.tensors(""))

    @property
    def scratch_bytes(self) -> int:
        """Memory that writing the layer takes beside what one matrix does, roughly."""
        return 0


def part(name: str, file: str) -> ModuleType:
    """A file of the package of a layout, one of `moeq.spec.LAYOUTS`: that tuple is the registry.

    Files are loaded when somebody asks for them, so that serving never loads what writes.
    """
    return import_module(f"moeq.layouts.{name}.{file}")

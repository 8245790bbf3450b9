"""What kernels work on: views of packed bytes with the specs to read them."""

from dataclasses import dataclass

from torch import Tensor

from moeq.artifacts import PROJECTIONS
from moeq.spec import QuantSpec, stored_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """One quantized matrix.

    Attributes:
        record: its bytes, uint8, (stored_bytes(spec, shape),).
        spec: how to read them.
        shape: (N, K).
    """

    record: Tensor
    spec: QuantSpec
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayer:
    """All experts of one layer.

    Attributes:
        data: the layer's blob, uint8.
        entries: expert -> projection (storage order) -> (offset in the blob, spec).
        shapes: projection -> (N, K).
    """

    data: Tensor
    entries: tuple[tuple[tuple[int, QuantSpec], ...], ...]
    shapes: dict[str, tuple[int, int]]

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.entries)

    def matrix(self, expert: int, projection: str) -> PackedMatrix:
        """One matrix, as a view."""
        position = [name for name in PROJECTIONS if name in self.shapes].index(projection)
        offset, spec = self.entries[expert][position]
        shape = self.shapes[projection]
        return PackedMatrix(record=self.data[offset : offset + stored_bytes(spec, shape)], spec=spec, shape=shape)

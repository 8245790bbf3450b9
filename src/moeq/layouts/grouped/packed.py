"""What kernels work on: views of packed bytes with the specs to read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moeq.kernels.facts import KernelFacts, Kinds, kernel_facts
from moeq.layouts.grouped.stored import Entries
from moeq.model_parts import PROJECTIONS
from moeq.spec import QuantSpec, stored_bytes


def device_facts(
    data: Tensor, entries: Entries, shapes: Sequence[tuple[int, int]], kinds: Kinds | None = None
) -> KernelFacts | None:
    """The facts of bytes where they are now; None on a CPU, whose kernels read the table on disk."""
    if data.device.type == "cpu":
        return None
    return kernel_facts(entries, shapes, data.device, kinds)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """One quantized matrix.

    Attributes:
        record: its bytes, uint8, (stored_bytes(spec, shape),).
        spec: how to read them.
        shape: (N, K).
        exact: whether kernels keep activations in floats: always, never, or (None) unless few tokens are computed.
        facts: for kernels on a device, as of a layer with one expert and one projection; None if nobody made them.
        compiled: whether compiled kernels for CPUs may compute it (`moeq.layouts.trust`).
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

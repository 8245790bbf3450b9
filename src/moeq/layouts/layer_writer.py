"""What a layout is to whoever writes it: from source weights to the bytes of a layer. A seam of `moeq.layouts`.

Writers round; serving never loads them.

Legend: T tokens, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture
from moeq.layouts.base import part
from moeq.layouts.job import Job

Blob = Tensor | Iterator[memoryview]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibrated:
    """A layer that was rounded to calibration inputs.

    Attributes:
        y_TH: what the rounded experts answer.
        counts: routed tokens of each expert.
        blobs: in the order of the plan's tensors.
    """

    y_TH: Tensor
    counts: list[int]
    blobs: tuple[Blob, ...]


class LayerWriter(ABC):
    """Makes the bytes of one layer; every layout has one, as `WRITER` in its file `writer`."""

    @abstractmethod
    def __init__(self, job: Job, layer: int) -> None: ...

    @abstractmethod
    def plain(self) -> tuple[Blob, ...]:
        """The blobs, in the order of the plan's tensors; rounded without data."""
        ...

    @abstractmethod
    def calibrated(self, experts: nn.Module, capture: Capture, pool: SpillPool) -> Calibrated:
        """Round to what the experts were asked.

        Args:
            experts: the family's module, for its activation.
            capture: what they were asked.
            pool: makes the blob's store.
        """
        ...

    @abstractmethod
    def tables(self) -> tuple[Tensor, ...]:
        """The tables of the blobs."""
        ...


def writer(name: str) -> type[LayerWriter]:
    """The writer of a layout."""
    found = part(name, "writer").WRITER
    assert issubclass(found, LayerWriter)
    return found

"""From weights to bytes."""

from typing import Final

import torch
from torch import Tensor, nn

from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture
from moeq.errors import OptionError
from moeq.layouts.job import Job
from moeq.layouts.layer_writer import Blob, Calibrated, LayerWriter
from moeq.spec import Unit


class ReversedWriter(LayerWriter):
    """Writes one layer."""

    def __init__(self, job: Job, layer: int) -> None:
        self._job, self._index, self._layer = job, layer, job.inventory.layers[layer]

    def plain(self) -> tuple[Blob, ...]:
        """Records of all experts, the last one first."""
        job, found = self._job, []
        for expert in reversed(range(self._layer.num_experts)):
            for projection in self._layer.projections:
                unit = Unit(layer=self._index, expert=expert, projection=projection)
                spec = job.plan.spec(unit, self._layer.projections)
                found.append(job.settle(unit, job.quantizer.quantize(job.matrix(unit), spec, None)))
        return (torch.cat(found),)

    def calibrated(self, experts: nn.Module, capture: Capture, pool: SpillPool) -> Calibrated:
        """Not done here."""
        raise OptionError("this layout is rounded without data", option="quantizer", fix="use rtn")

    def tables(self) -> tuple[Tensor, ...]:
        """The widths."""
        return (torch.tensor([[spec.bits for spec in row] for row in self._job.plan.layer_specs(self._index)]),)


WRITER: Final = ReversedWriter

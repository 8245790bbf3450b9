"""Writes grouped layers: every matrix is rounded and packed by itself."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from moeq.calibration.crew import Crew
from moeq.calibration.experts import ExpertsTask, Round, grouped, quantize_experts
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture
from moeq.fleet import HERE
from moeq.layouts.grouped.stored import build_table
from moeq.layouts.job import Job
from moeq.layouts.layer_writer import Blob, Calibrated, LayerWriter
from moeq.quantizers.base import QuantizedMatrix
from moeq.spec import Unit, stored_bytes


class GroupedWriter(LayerWriter):
    """Writes one layer."""

    def __init__(self, job: Job, layer: int) -> None:
        self._job, self._layer = job, layer

    def plain(self) -> tuple[Blob, ...]:
        """Records as they are rounded."""
        return (expert_records(self._job, self._layer),)

    def calibrated(self, experts: nn.Module, capture: Capture, pool: SpillPool) -> Calibrated:
        """Records of all experts."""
        y_TH, blob, counts = round_records(self._job, self._layer, experts, capture, pool)
        return Calibrated(y_TH=y_TH, counts=counts, blobs=(blob,))

    def tables(self) -> tuple[Tensor, ...]:
        """Where the records lie."""
        return (record_table(self._job, self._layer),)


WRITER: Final = GroupedWriter


def record_table(job: Job, index: int) -> Tensor:
    """The table of a layer's records."""
    layer = job.inventory.layers[index]
    return build_table(job.plan.layer_specs(index), [layer.shapes[projection] for projection in layer.projections])


def expert_records(job: Job, layer: int) -> Iterator[memoryview]:
    """The matrix records of a layer in storage order; no data needed.

    On a CPU every core rounds a matrix of its own with single-threaded operations: the many small
    operations of a search would otherwise wait for each other at every step. The bytes do not depend
    on the number of cores.
    """
    shape = job.inventory.layers[layer]
    units = (
        Unit(layer=layer, expert=expert, projection=projection)
        for expert in range(shape.num_experts)
        for projection in shape.projections
    )

    def record(unit: Unit) -> Tensor:
        spec = job.plan.spec(unit, shape.projections)
        return job.settle(unit, job.quantizer.quantize(job.matrix(unit).to(job.device), spec, None))

    threads = torch.get_num_threads()
    workers = threads if job.device.type == "cpu" else 1
    ahead: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for unit in units:
                ahead.append(pool.submit(record, unit))
                if len(ahead) > 2 * workers:
                    yield memoryview(ahead.popleft().result().numpy())  # type: ignore[arg-type]
            while ahead:
                yield memoryview(ahead.popleft().result().numpy())  # type: ignore[arg-type]
        finally:
            for future in ahead:
                future.cancel()
            # The workers' setting became the default of threads to come.
            torch.set_num_threads(threads)


def round_records(
    job: Job, layer: int, experts: nn.Module, capture: Capture, pool: SpillPool, rounding: Round | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """Answers, blob and token counts of a layer whose experts are rounded one by one as records.

    `rounding` is instead of the job's quantizer alone.
    """
    shape = job.inventory.layers[layer]
    specs = job.plan.layer_specs(layer)
    sizes = [
        [stored_bytes(spec, shape.shapes[name]) for spec, name in zip(expert, shape.projections, strict=True)]
        for expert in specs
    ]
    blob = pool.empty((sum(map(sum, sizes)),), torch.uint8)
    starts = {}
    offset = 0
    for expert, row in enumerate(sizes):
        for projection, size in zip(shape.projections, row, strict=True):
            starts[expert, projection] = offset
            offset += size

    def sink(expert: int, projection: str, rounded: QuantizedMatrix) -> None:
        part = job.settle(Unit(layer=layer, expert=expert, projection=projection), rounded)
        start = starts[expert, projection]
        blob[start : start + part.numel()] = part

    # Whatever else rounds is not made to travel.
    away = job.fleet is not HERE and rounding is None
    task = ExpertsTask(
        layer=shape,
        read=replace(job, fleet=HERE).matrices(layer),
        round=rounding or grouped(shape, specs, job.quantizer),
        sink=sink,
        device=job.device,
        compensate=job.compensate,
        crew=Crew(fleet=job.fleet, directory=job.partial) if away else None,
    )
    y_TH, counts = quantize_experts(task, experts, capture)
    return y_TH, blob, counts

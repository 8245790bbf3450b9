"""Writes the shards of a packed checkpoint from source weights, without or with calibration."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moeq.artifacts import DenseLinear, Inventory, MatrixSource, Plan
from moeq.checkpoint.read import Reader
from moeq.checkpoint.write import FileDigest, ShardWriter
from moeq.costs.component_table import ComponentTable
from moeq.format.blob import build_table
from moeq.format.packing import decode_matrix, dequantize, pack_matrix
from moeq.format.spectral import SpectralShape, build_spectral_table
from moeq.format.tiled import build_tile_table
from moeq.quantizers.base import QuantizedMatrix, Quantizer
from moeq.spec import QuantSpec, Unit
from moeq.stages.shards import Shard
from moeq.tiling import TileOptions

Progress = Callable[[str, int, int], None]
"""Called with what is being counted, how many are done and how many there are."""


def weights_digest(weights_NK: Tensor) -> str:
    """sha256 of decoded float32 weights."""
    return hashlib.sha256(memoryview(weights_NK.contiguous().view(-1).numpy())).hexdigest()  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Everything that packing needs to know.

    Attributes:
        inventory: the source.
        plan: the spec of every unit.
        shards: the files to write.
        reader: the source's tensors.
        partial: where the files go.
        quantizer: rounds the experts.
        dense_quantizer: rounds the other linears; needs no data.
        device: where rounding is done.
        table: the costs that a plan of components came from, for their bases.
        gain: match the gain of components' scales.
        damp: damping of Hessians, in mean diagonals.
        tiles: choices of the tiled layout.
        seed: of everything random.
        noted: unit -> digest of its rounded weights, filled for a few units of each layer; what
            `verify` compares the reloaded model with.
    """

    inventory: Inventory
    plan: Plan
    shards: tuple[Shard, ...]
    reader: Reader
    partial: Path
    quantizer: Quantizer
    dense_quantizer: Quantizer
    device: torch.device
    table: ComponentTable | None = None
    gain: bool = True
    damp: float = 0.1
    tiles: TileOptions = field(default_factory=TileOptions)
    seed: int = 0
    noted: dict[Unit, str] = field(default_factory=dict)

    def settle(self, unit: Unit, rounded: QuantizedMatrix) -> Tensor:
        """The matrix record of a rounded expert matrix."""
        layer = self.inventory.layers[unit.layer]
        spec = self.plan.spec(unit, layer.projections)
        parts = (rounded.codes_NK, rounded.scale_NG, rounded.zero_NG)
        if unit.expert in (0, layer.num_experts - 1):
            self.noted[unit] = weights_digest(dequantize(*parts, spec))
        return pack_matrix(*parts, spec)

    def matrix(self, unit: Unit) -> Tensor:
        """The source weights (N, K) of a unit."""
        layer = self.inventory.layers[unit.layer]
        return self.reader.matrix(layer.sources[unit.projection], unit.expert, layer.shapes[unit.projection])

    def dense_record(self, linear: DenseLinear) -> tuple[Tensor, QuantSpec]:
        """The matrix record of a linear outside the experts."""
        spec = self.plan.specs[self.plan.dense[linear.path]]
        source = MatrixSource(name=linear.source, stacked=False)
        weights = self.reader.matrix(source, 0, linear.shape).to(self.device)
        rounded = self.dense_quantizer.quantize(weights, spec, None)
        return pack_matrix(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec), spec

    def dense_weights(self, linear: DenseLinear, dtype: torch.dtype) -> Tensor:
        """What a packed linear outside the experts decodes to."""
        record, spec = self.dense_record(linear)
        return decode_matrix(record, spec, linear.shape, dtype)


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


def write_layer(job: Job, shard: Shard, blob: Tensor | Iterator[memoryview], sides: Tensor | None = None) -> FileDigest:
    """Write the shard of one MoE layer: its experts' blob, their sides if there are any, its linears, all tables."""
    assert shard.layer is not None
    linears = [job.inventory.dense[position] for position in shard.dense]
    layer = job.inventory.layers[shard.layer]
    tables = [layer_table(job.inventory, job.plan, shard.layer)]
    if sides is not None:
        tables.append(build_tile_table(job.plan.tiles[shard.layer], layer.num_experts, layer.shapes))
    declared = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
    names = iter(tensor.name for tensor in shard.tensors)
    writer = ShardWriter(job.partial / shard.file, declared)
    try:
        writer.write(next(names), blob)
        if sides is not None:
            writer.write(next(names), sides)
        for linear in linears:
            record, spec = job.dense_record(linear)
            writer.write(next(names), record)
            tables.append(build_table([[spec]], [linear.shape]))
        for table in tables:
            writer.write(next(names), table)
    except BaseException:
        writer.abort()
        raise
    return writer.close()


def layer_table(inventory: Inventory, plan: Plan, index: int) -> Tensor:
    """The table of a layer's blob."""
    layer = inventory.layers[index]
    if plan.components is not None:
        hidden, inner = layer.shapes["down"]
        shape = SpectralShape(projections=layer.projections, num_experts=layer.num_experts, hidden=hidden, inner=inner)
        return build_spectral_table(plan.form, plan.widths(index, layer), shape)
    return build_table(plan.layer_specs(index), [layer.shapes[projection] for projection in layer.projections])


def write_copied(job: Job, shard: Shard) -> FileDigest:
    """Write a shard of tensors copied byte for byte from the source.

    Raises:
        TensorError: one of them holds NaN.
    """
    declared = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
    writer = ShardWriter(job.partial / shard.file, declared)
    for tensor in shard.tensors:
        writer.write(tensor.name, job.reader.chunks(tensor.name, check_nan=True))
    return writer.close()

"""Packs the MoE layers of a model from calibration tokens, block by block, writing each as it finishes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.arch import hooks
from moeq.arch.keymap import KeyMap, build_keymap, load_prefix, unload_prefix
from moeq.arch.meta import build_meta_model
from moeq.calibration.experts import (
    ExpertsTask,
    ReadMatrix,
    Round,
    grouped,
    quantize_experts,
    replay_experts,
    survey,
)
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture, Streamer
from moeq.checkpoint.mapped import map_file
from moeq.checkpoint.write import FileDigest
from moeq.components import blob_bytes
from moeq.errors import CheckpointError
from moeq.format.blob import DATA_SUFFIX, build_table, parse_table, record
from moeq.format.packing import decode_matrix
from moeq.quantizers.base import QuantizedMatrix
from moeq.runtime import attach
from moeq.spec import Unit, stored_bytes
from moeq.stages import finish
from moeq.stages.packing import Job, Progress, write_layer
from moeq.stages.shards import Shard
from moeq.stages.spectral_packing import ComponentRounding
from moeq.stages.tile_packing import TileRounding

Done = Callable[[str, FileDigest], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Blocks:
    """Loads decoder blocks of a skeleton, with the packed linears already rounded."""

    job: Job
    skeleton: PreTrainedModel
    keymap: KeyMap
    dtype: torch.dtype

    def __call__(self, block: str) -> nn.Module:
        job = self.job
        load_prefix(self.skeleton, block, self.keymap, job.reader.tensor, self.dtype)
        for linear in job.inventory.dense:
            if linear.path in job.plan.dense and linear.path.startswith(block + "."):
                module = self.skeleton.get_submodule(linear.path)
                module.weight.data = job.dense_weights(linear, self.dtype)
        return self.skeleton.get_submodule(block).to(job.device).eval()

    def unload(self, block: str) -> None:
        """Drop the block's weights."""
        unload_prefix(self.skeleton, block)


def compute_dtype(source: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run blocks in: the checkpoint's, but float32 where a CPU is slow at it.

    That is float16 on every CPU, and bfloat16 on those without AVX-512: torch emulates it there, ten times slower than
    float32 in the forward direction and fifty times slower in the backward one.
    """
    if device.type != "cpu" or source not in (torch.float16, torch.bfloat16):
        return source
    native_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return source if source == torch.bfloat16 and native_bfloat16 else torch.float32


def block_paths(job: Job, model: nn.Module) -> tuple[str, ...]:
    """Module paths of all decoder blocks, in order: the siblings of those that hold experts.

    Raises:
        CheckpointError: the experts' blocks are not all children of one list.
    """
    parents = {layer.block.rpartition(".")[0] for layer in job.inventory.layers}
    if len(parents) != 1:
        raise CheckpointError(
            f"experts lie under several lists of blocks: {', '.join(sorted(parents))}",
            tensor=job.inventory.layers[0].path,
            fix="quantize this model with --quantizer hqq, which needs no calibration",
        )
    parent = parents.pop()
    return tuple(f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children())


def run(
    job: Job,
    directory: Path,
    ids_NT: Tensor,
    *,
    routing: str,
    finished: Mapping[str, FileDigest],
    done: Done,
    progress: Progress | None = None,
) -> dict[int, list[int]]:
    """Write the shards of all MoE layers.

    Layers whose shard is finished are not rounded again: their packed weights answer, so that later
    layers see the same inputs as in an uninterrupted run.

    Args:
        job: what to pack.
        directory: the source checkpoint.
        ids_NT: calibration tokens.
        routing: "natural", "all" or a number.
        finished: shards that an earlier run completed.
        done: called with the name and digest of each shard as it is on disk.
        progress: called as blocks are done.

    Returns:
        MoE layer -> routed tokens of each expert.
    """
    driver, skeleton = build_meta_model(directory), build_meta_model(directory)
    dtype = compute_dtype(skeleton.dtype, job.device)
    for layer in job.inventory.layers:
        hooks.strip_weights(skeleton, layer.path)
    blocks = block_paths(job, driver)
    keymap = build_keymap(driver, job.reader.headers)
    # The head is never asked for logits.
    outside = driver.base_model_prefix if driver.base_model is not driver else ""
    load_prefix(driver, outside, keymap, job.reader.tensor, dtype, skip=blocks)
    counts: dict[int, list[int]] = {}
    pool = SpillPool(job.partial)
    layer_shards = {shard.layer: shard for shard in job.shards if shard.layer is not None}

    def visit(layer: int, experts: nn.Module, capture: Capture) -> Tensor:
        shard = layer_shards[layer]
        if shard.file in finished:
            y_TH, counts[layer] = _replay(job, shard, experts, capture)
        else:
            sides = None
            if job.plan.tiles:
                shape = job.inventory.layers[layer]
                rounding = TileRounding(job, layer, survey(shape, _reader(job, layer), experts, capture, job.device))
                sides = rounding.sides()
                y_TH, blob, counts[layer] = _round(job, layer, experts, capture, pool, rounding.round)
            else:
                pack = _round if job.plan.components is None else _round_components
                y_TH, blob, counts[layer] = pack(job, layer, experts, capture, pool)
            done(shard.file, write_layer(job, shard, blob, sides))
        return y_TH

    Streamer(
        driver=driver,
        blocks=blocks,
        loader=_Blocks(job=job, skeleton=skeleton, keymap=keymap, dtype=dtype),
        experts={layer.path: index for index, layer in enumerate(job.inventory.layers)},
        top_k=tuple(layer.top_k for layer in job.inventory.layers),
        hidden=tuple(layer.shapes["down"][0] for layer in job.inventory.layers),
        visitor=visit,
        pool=pool,
        device=job.device,
        routing=int(routing) if routing.isdecimal() else routing,
        progress=None if progress is None else lambda count, total: progress("blocks", count, total),
    ).run(ids_NT)
    return counts


def _reader(job: Job, layer: int) -> ReadMatrix:
    return lambda expert, name: job.matrix(Unit(layer=layer, expert=expert, projection=name))


def _round(
    job: Job, layer: int, experts: nn.Module, capture: Capture, pool: SpillPool, rounding: Round | None = None
) -> tuple[Tensor, Tensor, list[int]]:
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

    task = ExpertsTask(
        layer=shape,
        round=rounding or grouped(shape, specs, _reader(job, layer), job.quantizer, job.device),
        sink=sink,
        device=job.device,
    )
    y_TH, counts = quantize_experts(task, experts, capture)
    return y_TH, blob, counts


def _round_components(
    job: Job, layer: int, experts: nn.Module, capture: Capture, pool: SpillPool
) -> tuple[Tensor, Tensor, list[int]]:
    shape = job.inventory.layers[layer]
    rounding = ComponentRounding(job, layer)
    task = ExpertsTask(layer=shape, round=rounding.round, sink=rounding.sink, device=job.device)
    y_TH, counts = quantize_experts(task, experts, capture)
    size = blob_bytes(job.plan.form, job.plan.widths(layer, shape), *shape.shapes["down"])
    blob = pool.empty((size,), torch.uint8)
    start = 0
    for part in rounding.parts():
        blob[start : start + part.numel()] = part
        start += part.numel()
    return y_TH, blob, counts


def _replay(job: Job, shard: Shard, experts: nn.Module, capture: Capture) -> tuple[Tensor, list[int]]:
    assert shard.layer is not None
    layer = job.inventory.layers[shard.layer]
    if job.plan.components is not None:
        packed = finish.packed_layers(job.inventory, job.plan)[shard.layer]
        tensors = map_file(job.partial / shard.file)
        dense = attach.spectral_layer(tensors, packed, torch.device("cpu"))[1].dense
        return replay_experts(layer, dense, experts, capture, job.device)
    if job.plan.tiles:
        packed = finish.packed_layers(job.inventory, job.plan)[shard.layer]
        tiled = attach.tiled_layer(map_file(job.partial / shard.file), packed)
        return replay_experts(layer, tiled.dense, experts, capture, job.device)
    shapes = [layer.shapes[name] for name in layer.projections]
    data = map_file(job.partial / shard.file)[layer.path + DATA_SUFFIX]
    table = build_table(job.plan.layer_specs(shard.layer), shapes)
    entries = parse_table(table, shapes, data.numel(), tensor=layer.path)

    def read(expert: int, projection: str) -> Tensor:
        position = layer.projections.index(projection)
        offset, spec = entries[expert][position]
        part = record(data, offset, spec, shapes[position])
        return decode_matrix(part, spec, shapes[position], capture.x_TH.dtype)

    return replay_experts(layer, read, experts, capture, job.device)

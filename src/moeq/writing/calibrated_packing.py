"""Packs the MoE layers of a model from calibration tokens, block by block, writing each as it finishes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.arch import hooks
from moeq.arch.keymap import KeyMap, build_keymap, load_prefix, unload_prefix
from moeq.arch.meta import build_meta_model
from moeq.calibration.experts import replay_experts
from moeq.calibration.opening import block_paths
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture, Streamer, compute_dtype
from moeq.checkpoint.mapped import map_file
from moeq.checkpoint.write import FileDigest
from moeq.layouts.job import Job
from moeq.layouts.layer_writer import writer
from moeq.layouts.serving import layout
from moeq.progress import Progress
from moeq.writing import other_files
from moeq.writing.arrangement import Shard
from moeq.writing.heard_linears import HeardLinears
from moeq.writing.shard_writer import write_layer

Done = Callable[[str, FileDigest], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Blocks:
    """Loads decoder blocks of a skeleton, with those packed linears already rounded that need no text."""

    job: Job
    skeleton: PreTrainedModel
    keymap: KeyMap
    dtype: torch.dtype
    linears: HeardLinears

    def __call__(self, block: str) -> nn.Module:
        job = self.job
        load_prefix(self.skeleton, block, self.keymap, job.reader.tensor, self.dtype)
        self.linears.plain(block, self.skeleton.get_submodule(block))
        return self.skeleton.get_submodule(block).to(job.device).eval()

    def unload(self, block: str) -> None:
        """Drop the block's weights."""
        unload_prefix(self.skeleton, block)


def run(
    job: Job,
    shards: Sequence[Shard],
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
        shards: the files to write.
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
    layers = job.inventory.attached.layers
    for layer in layers:
        hooks.strip_weights(skeleton, layer.path)
    blocks = block_paths(job.inventory.attached, driver)
    keymap = build_keymap(driver, job.reader.headers)
    # The head is never asked for logits.
    outside = driver.base_model_prefix if driver.base_model is not driver else ""
    load_prefix(driver, outside, keymap, job.reader.tensor, dtype, skip=blocks)
    counts: dict[int, list[int]] = {}
    pool = SpillPool(job.partial)
    linears = HeardLinears(job=job, shards=shards, blocks=blocks, finished=finished, dtype=dtype)
    layer_shards = {shard.layer: shard for shard in shards if shard.layer is not None}

    def visit(layer: int, experts: nn.Module, capture: Capture) -> Tensor:
        shard = layer_shards[layer]
        if shard.file in finished:
            y_TH, counts[layer] = _replay(job, shard, layer, experts, capture)
            return y_TH
        make = writer(job.plan.layout)(job, layer)
        found = make.calibrated(experts, capture, pool)
        counts[layer] = found.counts
        done(shard.file, write_layer(job, shard, found.blobs, make.tables()))
        linears.written(shard)
        return found.y_TH

    Streamer(
        driver=driver,
        blocks=blocks,
        loader=_Blocks(job=job, skeleton=skeleton, keymap=keymap, dtype=dtype, linears=linears),
        experts={layer.path: index for index, layer in enumerate(layers)},
        top_k=tuple(layer.top_k for layer in layers),
        hidden=tuple(layer.shapes["down"][0] for layer in layers),
        visitor=visit,
        pool=pool,
        device=job.device,
        routing=int(routing) if routing.isdecimal() else routing,
        progress=None if progress is None else lambda count, total: progress("packing", count, total),
        prepare=linears.heard,
    ).run(ids_NT)
    return counts


def _replay(job: Job, shard: Shard, layer: int, experts: nn.Module, capture: Capture) -> tuple[Tensor, list[int]]:
    """What the packed experts of a finished shard answer."""
    entry = other_files.packed_layers(job.inventory, job.plan)[layer]
    opened = layout(entry.layout).open(entry, map_file(job.partial / shard.file))
    return replay_experts(job.inventory.layers[layer], opened.dense, experts, capture, job.device)

"""Rounds the linears of decoder blocks with calibration text, block by block (docs/decisions/0011)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moeq.calibration.linears import second_moments
from moeq.checkpoint.mapped import map_file
from moeq.checkpoint.write import FileDigest
from moeq.format.records import decode_matrix
from moeq.layouts.base import DATA_SUFFIX
from moeq.layouts.job import Job
from moeq.model_parts import DenseLinear
from moeq.writing.arrangement import Shard


@dataclass(frozen=True, kw_only=True, eq=False)
class HeardLinears:
    """The packed linears of blocks.

    Attributes:
        job: what to pack.
        shards: all files.
        blocks: paths of the decoder blocks in order of execution.
        finished: files that an earlier run completed.
        dtype: that blocks compute in.
    """

    job: Job
    shards: Sequence[Shard]
    blocks: Sequence[str]
    finished: Mapping[str, FileDigest]
    dtype: torch.dtype

    @cached_property
    def _homes(self) -> dict[str, Shard]:
        """Path of a packed linear -> the file that it goes to."""
        dense = self.job.inventory.dense
        return {dense[position].path: shard for shard in self.shards for position in shard.dense}

    def plain(self, block: str, module: nn.Module) -> None:
        """Give those linears of a block that will not be `heard` their rounded weights."""
        for linear in self._packed(block):
            if not self._is_heard(linear):
                self._set(linear, block, module, self.job.dense_weights(linear, self.dtype))

    def heard(self, block: str, module: nn.Module, show: Callable[[], None]) -> None:
        """Round the others by what they are asked, see `moeq.calibration.stream.Streamer.prepare`."""
        mine = [linear for linear in self._packed(block) if self._is_heard(linear)]
        fresh = [linear for linear in mine if self._homes[linear.path].file not in self.finished]
        if fresh:
            inside = {linear.path: module.get_submodule(_inner(linear.path, block)) for linear in fresh}
            moments = second_moments(inside, show)
            for linear in fresh:
                if linear.path in moments:
                    self.job.hear(linear, moments[linear.path])
        for linear in mine:
            weights = self.job.dense_weights(linear, self.dtype) if linear in fresh else self._finished(linear)
            self._set(linear, block, module, weights)

    def written(self, shard: Shard) -> None:
        """A file is on disk: its linears need not be remembered."""
        for position in shard.dense:
            self.job.heard.pop(self.job.inventory.dense[position].path, None)

    def _packed(self, block: str) -> list[DenseLinear]:
        job = self.job
        return [linear for linear in job.inventory.dense if linear.path in job.plan.dense and linear.block == block]

    def _is_heard(self, linear: DenseLinear) -> bool:
        """Whether text comes by before the linear's file is written."""
        layer = self._homes[linear.path].layer
        if self.job.heard_quantizer is None or layer is None:
            return False
        last = self.job.inventory.layers[layer].block
        return last in self.blocks and self.blocks.index(linear.block) <= self.blocks.index(last)

    def _finished(self, linear: DenseLinear) -> Tensor:
        shard = self._homes[linear.path]
        record = map_file(self.job.partial / shard.file)[linear.path + DATA_SUFFIX]
        return decode_matrix(record, self.job.dense_spec(linear), linear.shape, self.dtype)

    def _set(self, linear: DenseLinear, block: str, module: nn.Module, weights: Tensor) -> None:
        weight = module.get_submodule(_inner(linear.path, block)).weight
        assert isinstance(weight, Tensor)
        weight.data = weights.to(self.job.device)


def _inner(path: str, block: str) -> str:
    return path.removeprefix(block + ".")

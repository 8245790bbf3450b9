"""Writes the shards of a packed checkpoint: layers with the linears that go with them, and tensors that are copied."""

from collections.abc import Sequence

from torch import Tensor

from moeq.checkpoint.write import FileDigest, ShardWriter
from moeq.layouts.grouped.stored import build_table
from moeq.layouts.job import Job
from moeq.layouts.layer_writer import Blob
from moeq.writing.arrangement import Shard


def write_layer(job: Job, shard: Shard, blobs: Sequence[Blob], tables: Sequence[Tensor]) -> FileDigest:
    """Write the shard of one MoE layer: its experts' blobs, its linears, all tables."""
    tables = list(tables)
    declared = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
    names = iter(tensor.name for tensor in shard.tensors)
    writer = ShardWriter(job.partial / shard.file, declared)
    try:
        for blob in blobs:
            writer.write(next(names), blob)
        for linear in (job.inventory.dense[position] for position in shard.dense):
            record, spec = job.dense_record(linear)
            writer.write(next(names), record)
            tables.append(build_table([[spec]], [linear.shape]))
        for table in tables:
            writer.write(next(names), table)
    except BaseException:
        writer.abort()
        raise
    return writer.close()


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

"""Which tensors the packed checkpoint will hold, in which files, and how many bytes that is.

Computed from headers alone: the same numbers serve `plan`, the budget and the writer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeq.artifacts import Inventory, Plan
from moeq.checkpoint.write import header_bytes
from moeq.layouts.base import OutTensor
from moeq.layouts.grouped.shape import records
from moeq.spec import TensorInfo, stored_bytes

COPY_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of the packed checkpoint.

    Attributes:
        file: its name.
        layer: index of the MoE layer it holds, None for tensors copied from the source.
        dense: positions in `Inventory.dense` of the packed linears it holds.
        tensors: what it holds, in order.
    """

    file: str
    layer: int | None
    dense: tuple[int, ...]
    tensors: tuple[OutTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file, header included."""
        return header_bytes([(t.name, t.dtype, t.shape) for t in self.tensors]) + sum(t.size for t in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a packed checkpoint by what they are for.

    Attributes:
        experts: routed experts: codes, scales, zeros, padding, tables.
        dense: other linears that are packed, tables included.
        copied: tensors copied from the source.
        headers: headers of the weight files.
    """

    experts: int
    dense: int
    copied: int
    headers: int

    @property
    def total(self) -> int:
        """Bytes of all weight files."""
        return self.experts + self.dense + self.copied + self.headers


def consumed(inventory: Inventory, plan: Plan) -> set[str]:
    """Names of the source tensors that the packed ones replace."""
    names = {linear.source for linear in inventory.dense if linear.path in plan.dense}
    for layer in inventory.layers:
        for source in layer.sources.values():
            names.update(source.tensor(expert) for expert in range(layer.num_experts))
    return names


def dense_tensors(inventory: Inventory, plan: Plan, position: int) -> tuple[OutTensor, OutTensor]:
    """Record and table of one packed linear."""
    linear = inventory.dense[position]
    return records(linear.path, stored_bytes(plan.specs[plan.dense[linear.path]], linear.shape), (1, 1))


def arrange(inventory: Inventory, plan: Plan, headers: Mapping[str, TensorInfo]) -> tuple[Shard, ...]:
    """The files of the packed checkpoint: one for each MoE layer, then the copied tensors.

    A packed linear goes with the MoE layer of its decoder block or the next one, else with the first one: where the
    linears of blocks are rounded with text, they have seen it when their file is written.
    Blobs come before tables and every blob is a multiple of 64 bytes: all of them are aligned.
    """
    blocks = [layer.block for layer in inventory.layers]
    homes: dict[int, list[int]] = {}
    for position, linear in enumerate(inventory.dense):
        if linear.path in plan.dense:
            homes.setdefault(_home(linear.block, blocks), []).append(position)
    groups: list[tuple[int | None, tuple[int, ...], list[OutTensor]]] = []
    for index, layer in enumerate(inventory.layers):
        positions = tuple(homes.get(index, ()))
        pairs = list(plan.layer(index, layer).tensors(layer.path))
        pairs += [dense_tensors(inventory, plan, position) for position in positions]
        groups.append((index, positions, [data for data, _ in pairs] + [table for _, table in pairs]))
    groups += [(None, (), tensors) for tensors in _copied(headers, consumed(inventory, plan))]
    count = len(groups)
    return tuple(
        Shard(file=f"model-{i:05}-of-{count:05}.safetensors", layer=layer, dense=positions, tensors=tuple(tensors))
        for i, (layer, positions, tensors) in enumerate(groups, start=1)
    )


def _home(block: str, blocks: Sequence[str]) -> int:
    """The first MoE layer in a block of the same stack that is not before `block`; 0 if there is none."""
    stack, _, number = block.rpartition(".")
    for index, other in enumerate(blocks):
        same, _, at = other.rpartition(".")
        if same == stack and number.isdecimal() and at.isdecimal() and int(at) >= int(number):
            return index
    return 0


def _copied(headers: Mapping[str, TensorInfo], replaced: set[str]) -> list[list[OutTensor]]:
    groups: list[list[OutTensor]] = []
    filled = COPY_SHARD_BYTES
    for name, info in headers.items():
        if name in replaced:
            continue
        size = info.stop - info.start
        if filled + size > COPY_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(OutTensor(name=name, dtype=info.dtype, shape=info.shape, size=size))
        filled += size
    return groups


def sizes(inventory: Inventory, plan: Plan, shards: tuple[Shard, ...]) -> Sizes:
    """What the files of `arrange` take."""
    dense = sum(
        tensor.size
        for position, linear in enumerate(inventory.dense)
        if linear.path in plan.dense
        for tensor in dense_tensors(inventory, plan, position)
    )
    copied = sum(tensor.size for shard in shards if shard.layer is None for tensor in shard.tensors)
    total = sum(shard.size for shard in shards)
    return Sizes(
        experts=plan.expert_bytes, dense=dense, copied=copied, headers=total - plan.expert_bytes - dense - copied
    )

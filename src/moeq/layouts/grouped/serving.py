"""Modules over grouped records: experts, and linears outside them. They hold uint8 buffers only.

Nothing is ever unpacked into memory for good.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from moeq import native
from moeq.errors import PackedError
from moeq.format.manifest import PackedLayer as Entry
from moeq.format.records import decode_matrix
from moeq.kernels.facts import Kinds, entry_kinds
from moeq.layouts import trust
from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX
from moeq.layouts.grouped import cpu, gpu, reference
from moeq.layouts.grouped.loose import LooseRecords
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix, device_facts
from moeq.layouts.grouped.stored import Entries, Shapes, parse_table, table_of
from moeq.layouts.serving import FIX, DeviceCall, ExpertsModule, Layout, OpenedLayer, Tables, first, is_placed, pair
from moeq.spec import TABLE_COLUMNS, QuantSpec, stored_bytes

ExpertsKernel = Callable[[nn.Module, PackedLayer, Tensor, Tensor, Tensor], Tensor | None]
LinearKernel = Callable[[Tensor, PackedMatrix], Tensor | None]

EXPERTS: Final[tuple[ExpertsKernel, ...]] = (gpu.experts, cpu.experts, reference.experts)
LINEAR: Final[tuple[LinearKernel, ...]] = (gpu.linear, cpu.linear, reference.linear)
"""Which kernel computes a call: candidates in order, each may refuse."""


class PackedExperts(ExpertsModule):
    """Experts of the layout "grouped"."""

    data: Tensor | None
    loose: LooseRecords | None

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.register_module("loose", None)
        self.shapes = shapes
        self.entries: Entries = ()
        self.exact: bool | None = None
        self._table: Tensor | None = None
        self._kinds: Kinds | None = None
        self._layer: PackedLayer | None = None
        self.register_buffer("data", None)

    def bind(self, data: Tensor, entries: Entries, kinds: Kinds | None = None) -> None:
        """Take the layer's blob (uint8), what its table says, and what it has in common with other layers."""
        self.data = data
        self._kinds = kinds
        self.entries = entries
        self._table = table_of(entries)
        # Now, not in the first call: that may be a graph's, whose memory does not last.
        self._layer = self._made(data)

    @property
    def layer(self) -> PackedLayer:
        """The packed weights, as views."""
        assert self.data is not None, "used before loading"
        known = self._layer
        if known is None or known.data is not self.data or known.exact != self.exact:
            known = self._layer = self._made(self.data)
        return known

    def _made(self, data: Tensor) -> PackedLayer:
        compiled = has_kernels(self.entries) and trust.compiled(data.device, *subjects("grouped", self.entries))
        shapes = list(self.shapes.values())
        return PackedLayer(
            data=data,
            entries=self.entries,
            shapes=self.shapes,
            table=self._table if compiled else None,
            exact=self.exact,
            facts=device_facts(data, self.entries, shapes, self._kinds) if compiled else None,
        )

    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one matrix decode to, (N, K) float32 on the CPU."""
        matrix = self.layer.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape).cpu()

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        if self.loose is not None:
            linear = self.loose.linear
            return reference.experts(experts, self.layer, hidden_states, top_k_index, top_k_weights, linear=linear)
        return first(EXPERTS, experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def loosen(self) -> LooseRecords:
        """Scales, and zeros where there are some."""
        self.loose = LooseRecords(self.layer.data, self.entries, list(self.shapes.values()))
        return self.loose

    def chosen_bytes(self, experts: Sequence[int]) -> int:
        """Bytes of the records of these experts."""
        return sum(self.layer.matrix(expert, name).record.numel() for expert in experts for name in self.shapes)

    def device_call(self, experts: nn.Module) -> DeviceCall | None:
        """`moeq.layouts.grouped.gpu.run_experts`."""
        layer, facts = self.layer, self.layer.facts
        if facts is None:
            return None
        return DeviceCall(
            same=f"grouped {layer.shapes} {facts.widths} {facts.spans}",
            hidden=layer.shapes["up"][1],
            device=layer.data.device,
            run=partial(gpu.run_experts, experts, layer),
        )

    def extra_repr(self) -> str:
        """Shapes and size, for print(model)."""
        size = 0 if self.data is None else self.data.numel()
        return f"experts={len(self.entries)}, shapes={self.shapes}, bytes={size}"


class DecodedWeight(Tensor):
    """What packed weights decode to: a copy, so changing it would change nothing, without a word."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        changes = func == _SET_DATA or (name.endswith("_") and not name.startswith("__")) or name in _IN_PLACE
        if changes and isinstance(args[0], cls):
            raise PackedError(
                "packed weights cannot be changed, adapters not merged into them",
                fix="keep the adapter apart, or merge it into the original model and quantize that",
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_SET_DATA: Final = Tensor.data.__set__  # type: ignore[attr-defined]
_IN_PLACE: Final = frozenset(("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"))


class Siblings:
    """Packed linears of one module: those that are seen to meet the same input are computed in one call.

    Which they are is the business of the family's code, so it is watched for a token: whoever is given the very input
    that another one was given before it follows that one from then on. An answer that nobody fetches ends it for good.
    """

    def __init__(self, members: Sequence["PackedLinear"]) -> None:
        self._members = tuple(members)
        self._followers: dict[int, list[int]] = {}
        self._alone: set[int] = set()
        self._seen: tuple[int, Tensor, Tensor] | None = None
        self._held: tuple[int, Tensor, int, dict[int, Tensor]] | None = None

    def answer(self, member: int, x: Tensor, x_SK: Tensor) -> Tensor | None:
        """x W^T of a member, or None if it has to compute that alone. `x` is what it was given, `x_SK` its rows."""
        held = self._held
        if held is not None:
            leader, asked, version, answers = held
            found = answers.pop(member, None) if asked is x and version == _version(x) else None
            if not answers or found is None:
                self._held = None
            if found is not None:
                return found
            if answers:  # by whoever runs the model from several threads, too: they compute alone, no more
                self._followers[leader] = [each for each in self._followers[leader] if each not in answers]
        if native.traced(x) or not 0 < len(x_SK) <= cpu.FEW:
            return None
        followers = self._followers.get(member)
        if not followers:
            self._watch(member, x)
            return None
        group = (member, *followers)
        outs = cpu.linears(x_SK, [self._members[each].matrix for each in group])
        if outs is None:
            return None
        self._held = member, x, _version(x), dict(zip(group[1:], outs[1:], strict=True))
        return outs[0]

    def _watch(self, member: int, x: Tensor) -> None:
        seen = self._seen
        if seen is not None and seen[1] is x and torch.equal(seen[2], x):
            if member != seen[0] and member not in self._alone:
                self._followers.setdefault(seen[0], []).append(member)
                self._alone.add(member)  # follows one only
        elif member not in self._alone:
            self._seen = member, x, x.clone()


def _version(x: Tensor) -> int:
    """Grows when a tensor is changed; those of inference mode do not count."""
    return 0 if x.is_inference() else x._version


class PackedLinear(nn.Linear):
    """A linear layer over packed weights. It is an nn.Linear for whoever looks for one, as peft's adapters do."""

    data: Tensor | None
    loose: LooseRecords | None

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: there are no weights to make
        self.register_module("loose", None)
        self._is_hf_initialized = True  # transformers has nothing to fill in
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.spec: QuantSpec | None = None
        self.exact: bool | None = None
        self._matrix: PackedMatrix | None = None
        self._together: tuple[Siblings, int] | None = None
        self.register_buffer("data", None)

    def join(self, siblings: Siblings, member: int) -> None:
        """Be computed with others where that can be, as this one of them."""
        self._together = siblings, member

    def bind(self, data: Tensor, spec: QuantSpec) -> None:
        """Take the matrix record (uint8) and its spec."""
        self.data = data
        self.spec = spec
        self._matrix = self._made(data, spec)  # with the facts, see `ExpertsModule`

    @property
    def matrix(self) -> PackedMatrix:
        """The packed weights, as views."""
        assert self.data is not None, "used before loading"
        assert self.spec is not None
        known = self._matrix
        if known is None or known.record is not self.data or known.exact != self.exact:
            known = self._matrix = self._made(self.data, self.spec)
        return known

    def _made(self, data: Tensor, spec: QuantSpec) -> PackedMatrix:
        shape = self.out_features, self.in_features
        entries: Entries = (((0, spec),),)
        compiled = has_kernels(entries) and trust.compiled(data.device, *subjects("linear", entries))
        facts = device_facts(data, entries, [shape]) if compiled else None
        return PackedMatrix(record=data, spec=spec, shape=shape, exact=self.exact, facts=facts, compiled=compiled)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if is_placed(self.data):
            _ = self.matrix  # now, see `ExpertsModule`
        return self

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weights (out_features, in_features), float32; for code that looks at them but changes nothing."""
        return decode_matrix(self.matrix.record, self.matrix.spec, self.matrix.shape).as_subclass(DecodedWeight)

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        flat = hidden_states.reshape(-1, self.in_features)
        if self.loose is not None:
            out = self.loose.linear(flat, self.matrix)
        else:
            together = self._together
            found = None if together is None else together[0].answer(together[1], hidden_states, flat)
            out = first(LINEAR, flat, self.matrix) if found is None else found
        if self.bias is not None:
            out = out + self.bias
        return out.view(*hidden_states.shape[:-1], self.out_features)

    def loosen(self) -> LooseRecords:
        """As `ExpertsModule.loosen`."""
        matrix = self.matrix
        self.loose = LooseRecords(matrix.record, (((0, matrix.spec),),), [matrix.shape])
        return self.loose

    def extra_repr(self) -> str:
        """Shape and width, for print(model)."""
        bits = "?" if self.spec is None else self.spec.bits
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedRecords(OpenedLayer):
    """The records of a layer.

    Attributes:
        shapes: projection -> (N, K), in storage order.
        data: the blob.
        entries: where its records lie.
    """

    shapes: dict[str, tuple[int, int]]
    data: Tensor
    entries: Entries

    @property
    def layer(self) -> PackedLayer:
        """The layer, without what kernels want to know."""
        return PackedLayer(data=self.data, entries=self.entries, shapes=self.shapes)

    def dense(self, expert: int, projection: str) -> Tensor:
        """The matrix (N, K), float32."""
        matrix = self.layer.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape)

    def only(self, experts: Sequence[int]) -> Self:
        """The layer with some experts alone, in this order."""
        shapes = tuple(self.shapes.values())
        parts, entries, start = [], [], 0
        for expert in experts:
            row = []
            for (offset, spec), shape in zip(self.entries[expert], shapes, strict=True):
                size = stored_bytes(spec, shape)
                parts.append(self.data[offset : offset + size])
                row.append((start, spec))
                start += size
            entries.append(tuple(row))
        data = self.data if len(experts) == len(self.entries) else torch.cat(parts)
        return replace(self, data=data, entries=tuple(entries))

    def kinds(self) -> Mapping[Hashable, Kinds]:
        """One key for all layers of the same shapes."""
        return {self.key: entry_kinds(self.entries, len(self.shapes))}

    @property
    def key(self) -> Hashable:
        """What layers that share kernels have in common."""
        return "records", tuple(self.shapes.items())

    def fill(self, module: nn.Module, device: torch.device, common: Mapping[Hashable, Kinds]) -> None:
        """Bind `PackedExperts`."""
        assert isinstance(module, PackedExperts)
        module.bind(self.data.to(device), self.entries, common[self.key])


class GroupedLayout(Layout):
    """Records of single matrices, back to back."""

    def check(self, layer: Entry, tables: Tables) -> None:
        """The table has a row for every matrix, and the records fill the blob."""
        check_records(layer.path, layer.num_experts, layer.ordered_shapes, tables)

    def module(self, layer: Entry) -> ExpertsModule:
        """Empty `PackedExperts`."""
        return PackedExperts(layer.named_shapes)

    def open(self, layer: Entry, tensors: Mapping[str, Tensor]) -> OpenedRecords:
        """The records of a layer."""
        data, entries = open_records(layer.path, layer.ordered_shapes, tensors)
        return OpenedRecords(shapes=layer.named_shapes, data=data, entries=entries)


LAYOUT: Final = GroupedLayout()


def check_records(path: str, num_experts: int, shapes: Shapes, tables: Tables) -> None:
    """Prove the table of some records; a linear outside the experts has one expert and one shape.

    Raises:
        PackedError: it contradicts the blob's size or the manifest.
    """
    data = tables.expect(path + DATA_SUFFIX, "U8", 1)
    table = tables.expect(path + TABLE_SUFFIX, "I64", 3)
    if table.shape != (num_experts, len(shapes), len(TABLE_COLUMNS)):
        raise PackedError(
            f"the table has shape {list(table.shape)}, the manifest says {num_experts} experts "
            f"with {len(shapes)} matrices",
            tensor=path + TABLE_SUFFIX,
            fix=FIX,
        )
    parse_table(tables.tensor(path + TABLE_SUFFIX), shapes, data.shape[0], tensor=path + TABLE_SUFFIX)


def open_records(path: str, shapes: Shapes, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Entries]:
    """A blob, and where its records lie.

    Raises:
        PackedError: bytes are missing, or contradict each other.
    """
    data, table = pair(tensors, path)
    return data, parse_table(table, shapes, data.numel(), tensor=path + TABLE_SUFFIX)


def has_kernels(entries: Entries) -> bool:
    """Whether compiled kernels read all of these records; blocks of ggml are for llama.cpp's."""
    return not any(spec.in_blocks for expert in entries for _, spec in expert)


def subjects(layout: str, entries: Entries) -> tuple[str, ...]:
    """What `moeq.layouts.trust` is asked about such a layer."""
    specs = {spec for expert in entries for _, spec in expert}
    books = ("codebooks",) if any(spec.codebooks is not None for spec in specs) else ()
    return (layout, *books, *(("trellis",) if any(spec.history for spec in specs) else ()))

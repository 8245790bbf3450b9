"""From bytes to answers."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from moeq.layouts.reversed.shape import DATA, TABLE, spec_of  # type: ignore[import-not-found]
from torch import Tensor, nn

from moeq.errors import PackedError
from moeq.format.manifest import PackedLayer as Entry
from moeq.format.records import decode_matrix
from moeq.kernels.facts import Kinds
from moeq.layouts.grouped import reference
from moeq.layouts.grouped.packed import PackedLayer
from moeq.layouts.serving import DeviceCall, ExpertsModule, Layout, OpenedLayer, Tables, pair
from moeq.spec import stored_bytes


class ReversedExperts(ExpertsModule):
    """Experts of this layout; the torch reference computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.exact: bool | None = None
        self._layer: PackedLayer | None = None
        self.register_buffer("data", None, persistent=False)

    def bind(self, layer: PackedLayer) -> None:
        """Take the records."""
        self.data, self._layer = layer.data, layer

    @property
    def layer(self) -> PackedLayer:
        """The records."""
        assert self._layer is not None, "used before loading"
        return self._layer

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        return reference.experts(experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def weights(self, expert: int, projection: str) -> Tensor:
        """One matrix, float32."""
        matrix = self.layer.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape)

    def chosen_bytes(self, experts: Sequence[int]) -> int:
        """Bytes of some experts."""
        return sum(self.layer.matrix(expert, name).record.numel() for expert in experts for name in self.layer.shapes)

    def device_call(self, experts: nn.Module) -> DeviceCall | None:
        """No kernel of a GPU serves it."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedReversed(OpenedLayer):
    """The records of a layer."""

    layer: PackedLayer

    def dense(self, expert: int, projection: str) -> Tensor:
        """One matrix, float32."""
        matrix = self.layer.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape)

    def kinds(self) -> Mapping[Hashable, Kinds]:
        """Nothing is compiled."""
        return {}

    def fill(self, module: nn.Module, device: torch.device, common: Mapping[Hashable, Kinds]) -> None:
        """Bind the module."""
        assert isinstance(module, ReversedExperts)
        module.bind(self.layer)


class ReversedLayout(Layout):
    """Records, the last expert's first."""

    suffixes = (DATA, TABLE)

    def check(self, layer: Entry, tables: Tables) -> None:
        """The records fill the blob."""
        size = tables.expect(layer.path + DATA, "U8", 1).shape[0]
        tables.expect(layer.path + TABLE, "I64", 2)
        rows = tables.tensor(layer.path + TABLE).tolist()
        if (
            sum(stored_bytes(spec_of(b), s) for row in rows for b, s in zip(row, layer.ordered_shapes, strict=True))
            != size
        ):
            raise PackedError("the records do not fill the blob", tensor=layer.path + DATA, fix="download it again")

    def module(self, layer: Entry) -> ExpertsModule:
        """An empty module."""
        return ReversedExperts()

    def open(self, layer: Entry, tensors: Mapping[str, Tensor]) -> OpenedReversed:
        """The records of a layer."""
        data, table = pair(tensors, layer.path, self.suffixes)
        entries, end = [], 0
        for row in reversed(table.tolist()):
            places = []
            for bits, shape in zip(row, layer.ordered_shapes, strict=True):
                places.append((end, spec_of(bits)))
                end += stored_bytes(spec_of(bits), shape)
            entries.append(tuple(places))
        return OpenedReversed(layer=PackedLayer(data=data, entries=tuple(entries[::-1]), shapes=layer.named_shapes))


LAYOUT: Final = ReversedLayout()

"""The module over spectral layers, and how it is filled."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from moeq.format.manifest import PackedLayer as Entry
from moeq.kernels.facts import Kinds
from moeq.layouts import trust
from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX
from moeq.layouts.serving import DeviceCall, ExpertsModule, Layout, OpenedLayer, Tables, first, pair
from moeq.layouts.spectral import cpu, gpu, reference
from moeq.layouts.spectral.loose import LooseComponents
from moeq.layouts.spectral.reference import SpectralLayer, read_layer, spectral_tables
from moeq.layouts.spectral.shape import SpectralShape, basis_bytes
from moeq.layouts.spectral.stored import parse_spectral_table

SpectralKernel = Callable[[nn.Module, SpectralLayer, Tensor, Tensor, Tensor], Tensor | None]

EXPERTS: Final[tuple[SpectralKernel, ...]] = (gpu.experts, cpu.experts, reference.experts)
"""Which kernel computes a call: candidates in order, each may refuse."""


class SpectralExperts(ExpertsModule):
    """Experts of the layout "spectral"."""

    data: Tensor | None
    loose: LooseComponents | None

    def __init__(self, shape: SpectralShape) -> None:
        super().__init__()
        self.register_module("loose", None)
        self.shape = shape
        self.exact: bool | None = None
        self._layer: SpectralLayer | None = None
        self._compiled = False
        self.register_buffer("data", None)

    def bind(self, data: Tensor, layer: SpectralLayer) -> None:
        """Take the layer's blob (uint8) and what its table and maps say."""
        self.data = data
        self._layer = self._judged(layer)

    @property
    def layer(self) -> SpectralLayer:
        """The packed weights, as views."""
        assert self.data is not None, "used before loading"
        assert self._layer is not None
        layer = self._layer
        if layer.data is not self.data:  # moved to another device since it was last used
            layer = self._judged(layer.at(self.data))
        if self._compiled and layer.tables is None and self.data.device.type == "cpu":
            layer = replace(layer, tables=spectral_tables(layer))
        if layer.exact != self.exact:
            layer = replace(layer, exact=self.exact)
        self._layer = layer
        return self._layer

    def _judged(self, layer: SpectralLayer) -> SpectralLayer:
        """The layer, without what kernels want to know if they may not compute it."""
        self._compiled = trust.compiled(layer.data.device, "spectral")
        return layer if self._compiled else replace(layer, tables=None, facts=None)

    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one expert's projection decode to: its components (n, I), float32, on the CPU."""
        return self.layer.factor(expert, projection).cpu()

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        if self.loose is not None:
            arguments = hidden_states, top_k_index, top_k_weights
            return reference.experts(experts, self.layer, *arguments, components=self.loose.components)
        return first(EXPERTS, experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def loosen(self) -> LooseComponents:
        """One gain for each component; bases stay."""
        self.loose = LooseComponents(self.layer)
        return self.loose

    def chosen_bytes(self, experts: Sequence[int]) -> int:
        """Bytes of all bases, and of the components of an expert on average."""
        layer = self.layer
        entries = layer.entries.values()
        bases = {entry.basis: basis_bytes(entry.basis_bits, entry.rank, layer.shape.hidden) for entry in entries}
        slabs = layer.data.numel() - sum(bases.values())
        return sum(bases.values()) + slabs * len(experts) // layer.num_experts

    def device_call(self, experts: nn.Module) -> DeviceCall | None:
        """`moeq.layouts.spectral.gpu.run_experts`."""
        layer = self.layer
        if layer.facts is None:
            return None
        rows = layer.facts.factors
        # Ranks and sizes of groups decide how sums are split; their powers of two, in how many ways.
        sizes = {name: (rows[name].widths, rows[name].span, rows[name].rows.bit_length()) for name in rows}
        ranks = [(entry.basis_bits, entry.rank.bit_length()) for entry in layer.entries.values()]
        return DeviceCall(
            same=f"spectral {self.shape} {sizes} {ranks}",
            hidden=self.shape.hidden,
            device=layer.data.device,
            run=partial(gpu.run_experts, experts, layer),
        )

    def extra_repr(self) -> str:
        """Shape and size, for print(model)."""
        size = 0 if self.data is None else self.data.numel()
        ranks = {} if self._layer is None else {name: entry.rank for name, entry in self._layer.entries.items()}
        return f"experts={self.shape.num_experts}, inner={self.shape.inner}, ranks={ranks}, bytes={size}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedComponents(OpenedLayer):
    """The components of a layer."""

    layer: SpectralLayer

    def dense(self, expert: int, projection: str) -> Tensor:
        """The matrix (N, K) that the components stand for, float32."""
        return self.layer.dense(expert, projection)

    def kinds(self) -> Mapping[Hashable, Kinds]:
        """A key for each projection, shared by layers of the same shape."""
        return {self._key(name): kinds for name, kinds in self.layer.own_kinds().items()}

    def _key(self, projection: str) -> Hashable:
        return "components", self.layer.shape.hidden, self.layer.shape.inner, projection

    def fill(self, module: nn.Module, device: torch.device, common: Mapping[Hashable, Kinds]) -> None:
        """Bind `SpectralExperts`."""
        assert isinstance(module, SpectralExperts)
        kinds = {name: common[self._key(name)] for name in self.layer.entries}
        data = self.layer.data.to(device)
        module.bind(data, replace(self.layer, kinds=kinds).at(data))


class SpectralLayout(Layout):
    """Components of shared bases."""

    def check(self, layer: Entry, tables: Tables) -> None:
        """The table's offsets are those that its ranks and rows imply."""
        size = tables.expect(layer.path + DATA_SUFFIX, "U8", 1).shape[0]
        name = layer.path + TABLE_SUFFIX
        tables.expect(name, "I64", 3)
        parse_spectral_table(tables.tensor(name), shape_of(layer), size, tensor=name)

    def module(self, layer: Entry) -> ExpertsModule:
        """Empty `SpectralExperts`."""
        return SpectralExperts(shape_of(layer))

    def open(self, layer: Entry, tensors: Mapping[str, Tensor]) -> OpenedComponents:
        """The components of a layer, with proven maps."""
        data, table = pair(tensors, layer.path)
        shape = shape_of(layer)
        entries = parse_spectral_table(table, shape, data.numel(), tensor=layer.path + TABLE_SUFFIX)
        return OpenedComponents(layer=read_layer(data, entries, shape, layer.path))


LAYOUT: Final = SpectralLayout()


def shape_of(layer: Entry) -> SpectralShape:
    """A layer's shape as this layout needs it."""
    hidden, inner = layer.shapes["down"]
    return SpectralShape(projections=layer.projections, num_experts=layer.num_experts, hidden=hidden, inner=inner)

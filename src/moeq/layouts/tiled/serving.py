"""The module over tiled layers, and how it is filled."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from moeq.format.manifest import PackedLayer as Entry
from moeq.format.records import decode_matrix
from moeq.kernels.facts import Kinds
from moeq.layouts import trust
from moeq.layouts.grouped.loose import LooseRecords
from moeq.layouts.grouped.packed import PackedLayer, device_facts
from moeq.layouts.grouped.serving import OpenedRecords, check_records, open_records, subjects
from moeq.layouts.grouped.stored import Entries, table_of
from moeq.layouts.serving import DeviceCall, ExpertsModule, Layout, OpenedLayer, Tables, first, pair
from moeq.layouts.tiled import cpu, gpu, reference
from moeq.layouts.tiled.facts import side_facts
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.shape import SIDES_SUFFIX, TILES_SUFFIX
from moeq.layouts.tiled.stored import TileEntry, build_tile_table, parse_tile_table, read_sides, views

TiledKernel = Callable[[nn.Module, TiledLayer, Tensor, Tensor, Tensor], Tensor | None]

EXPERTS: Final[tuple[TiledKernel, ...]] = (gpu.experts, cpu.experts, reference.experts)
"""Which kernel computes a call: candidates in order, each may refuse."""


class TiledExperts(ExpertsModule):
    """Experts of the layout "tiled"."""

    data: Tensor | None
    side_data: Tensor | None
    loose: LooseRecords | None

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.register_module("loose", None)
        self.shapes = shapes
        self.entries: Entries = ()
        self.tiles: dict[str, TileEntry] = {}
        self.exact: bool | None = None
        self._kinds: Kinds | None = None
        self._layer: TiledLayer | None = None
        self.register_buffer("data", None)
        self.register_buffer("side_data", None)

    def bind(
        self,
        data: Tensor,
        entries: Entries,
        sides: Tensor,
        tiles: dict[str, TileEntry],
        path: str,
        kinds: Kinds | None = None,
    ) -> None:
        """Take the residuals' blob (uint8) with its table, the sides' with theirs, and `kinds` as `PackedExperts`.

        Raises:
            PackedError: cells or permutations are none.
        """
        self.data, self.entries, self._kinds = data, entries, kinds
        self.side_data, self.tiles = sides, tiles
        read_sides(sides, tiles, len(entries), self.shapes, path)
        self._layer = self._made(data, sides)

    @property
    def layer(self) -> TiledLayer:
        """The packed weights, as views."""
        assert self.data is not None, "used before loading"
        assert self.side_data is not None
        known = None if self._layer is None else self._layer.residual
        if self._layer is None or known is None or known.data is not self.data or known.exact != self.exact:
            # Changed since it was last used.
            self._layer = self._made(self.data, self.side_data)
        return self._layer

    def _made(self, data: Tensor, side_data: Tensor) -> TiledLayer:
        compiled = trust.compiled(data.device, *subjects("tiled", self.entries))
        facts = device_facts(data, self.entries, list(self.shapes.values()), self._kinds) if compiled else None
        residual = PackedLayer(
            data=data,
            entries=self.entries,
            shapes=self.shapes,
            table=table_of(self.entries) if compiled else None,
            exact=self.exact,
            facts=facts,
        )
        sides = views(side_data, self.tiles, residual.num_experts, self.shapes)
        forms = {name: tile.form for name, tile in self.tiles.items()}
        return TiledLayer(
            residual=residual,
            sides=sides,
            side_data=side_data,
            tiles=build_tile_table(forms, residual.num_experts, self.shapes),
            facts=None if facts is None else {name: side_facts(each) for name, each in sides.items()},
        )

    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one residual decode to, (N, K) float32 on the CPU."""
        matrix = self.layer.residual.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape).cpu()

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        if self.loose is not None:
            linear = self.loose.linear
            return reference.experts(experts, self.layer, hidden_states, top_k_index, top_k_weights, linear=linear)
        return first(EXPERTS, experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def loosen(self) -> LooseRecords:
        """Scales of the residuals; what experts share stays."""
        residual = self.layer.residual
        self.loose = LooseRecords(residual.data, self.entries, list(self.shapes.values()))
        return self.loose

    def chosen_bytes(self, experts: Sequence[int]) -> int:
        """Bytes of the residuals of these experts, and of all sides."""
        layer = self.layer
        records = (layer.residual.matrix(expert, name).record.numel() for expert in experts for name in self.shapes)
        return sum(records) + sum(sides.data.numel() for sides in layer.sides.values())

    def device_call(self, experts: nn.Module) -> DeviceCall | None:
        """`moeq.layouts.tiled.gpu.run_experts`."""
        layer, facts = self.layer, self.layer.residual.facts
        if facts is None or layer.facts is None:
            return None
        forms = {name: tile.form for name, tile in self.tiles.items()}
        return DeviceCall(
            same=f"tiled {self.shapes} {facts.widths} {facts.spans} {forms}",
            hidden=self.shapes["up"][1],
            device=layer.residual.data.device,
            run=partial(gpu.run_experts, experts, layer),
        )

    def extra_repr(self) -> str:
        """Shapes and size, for print(model)."""
        size = sum(0 if part is None else part.numel() for part in (self.data, self.side_data))
        grids = {name: f"{e.form.rows}x{e.form.columns} rank {e.form.rank}" for name, e in self.tiles.items()}
        return f"experts={len(self.entries)}, shapes={self.shapes}, tiles={grids}, bytes={size}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedTiles(OpenedLayer):
    """Residuals and sides of a layer.

    Attributes:
        path: of the layer, for messages.
        residuals: the records.
        side_data: the blob of the sides.
        tiles: projection -> where its sides lie.
        layer: all of them, with proven cells and permutations, without what kernels want to know.
    """

    path: str
    residuals: OpenedRecords
    side_data: Tensor
    tiles: dict[str, TileEntry]
    layer: TiledLayer

    def dense(self, expert: int, projection: str) -> Tensor:
        """The matrix (N, K) that residual and factors stand for, float32."""
        return self.layer.dense(expert, projection)

    def kinds(self) -> Mapping[Hashable, Kinds]:
        """Those of the residuals."""
        return self.residuals.kinds()

    def fill(self, module: nn.Module, device: torch.device, common: Mapping[Hashable, Kinds]) -> None:
        """Bind `TiledExperts`."""
        assert isinstance(module, TiledExperts)
        records = self.residuals
        data, sides = records.data.to(device), self.side_data.to(device)
        module.bind(data, records.entries, sides, self.tiles, self.path, common[records.key])


class TiledLayout(Layout):
    """Residuals of low-rank factors that experts share."""

    suffixes = (*Layout.suffixes, SIDES_SUFFIX, TILES_SUFFIX)

    def check(self, layer: Entry, tables: Tables) -> None:
        """Sides fill their blob, and residuals theirs."""
        size = tables.expect(layer.path + SIDES_SUFFIX, "U8", 1).shape[0]
        name = layer.path + TILES_SUFFIX
        tables.expect(name, "I64", 2)
        parse_tile_table(tables.tensor(name), layer.num_experts, layer.named_shapes, size, tensor=name)
        check_records(layer.path, layer.num_experts, layer.ordered_shapes, tables)

    def module(self, layer: Entry) -> ExpertsModule:
        """Empty `TiledExperts`."""
        return TiledExperts(layer.named_shapes)

    def open(self, layer: Entry, tensors: Mapping[str, Tensor]) -> OpenedTiles:
        """Residuals and sides of a layer."""
        data, entries = open_records(layer.path, layer.ordered_shapes, tensors)
        residuals = OpenedRecords(shapes=layer.named_shapes, data=data, entries=entries)
        side_data, table = pair(tensors, layer.path, (SIDES_SUFFIX, TILES_SUFFIX))
        name = layer.path + TILES_SUFFIX
        tiles = parse_tile_table(table, layer.num_experts, layer.named_shapes, side_data.numel(), tensor=name)
        sides = read_sides(side_data, tiles, layer.num_experts, layer.named_shapes, layer.path)
        whole = TiledLayer(residual=residuals.layer, sides=sides)
        return OpenedTiles(path=layer.path, residuals=residuals, side_data=side_data, tiles=tiles, layer=whole)


LAYOUT: Final = TiledLayout()

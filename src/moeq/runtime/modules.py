"""Modules over packed bytes. They hold uint8 buffers only; nothing is ever unpacked into memory for good.

Where bytes come to a device, kernels get what they want to know of them, and `moeq.kernels.trust` is asked whether they
may compute there: kernels that know nothing refuse, and the torch reference serves.
"""

from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

from moeq.format import blob
from moeq.format.blob import Entries
from moeq.format.packing import decode_matrix
from moeq.format.spectral import SpectralShape
from moeq.format.tiled import TileEntry, build_tile_table, read_sides, views
from moeq.kernels import dispatch, trust
from moeq.kernels.packed import Kinds, PackedLayer, PackedMatrix, device_facts
from moeq.kernels.rows import side_facts
from moeq.kernels.spectral import SpectralLayer, spectral_tables
from moeq.kernels.tiled import TiledLayer
from moeq.spec import QuantSpec


class PackedExperts(nn.Module):
    """The handler attached to a family's experts module (`moeq.arch.hooks`).

    It is made empty, while the model is a skeleton, and bound to its bytes after loading.
    """

    data: Tensor | None

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.entries: Entries = ()
        self.exact: bool | None = None
        self._table: Tensor | None = None
        self._kinds: Kinds | None = None
        self._layer: PackedLayer | None = None
        self.register_buffer("data", None, persistent=False)

    def bind(self, data: Tensor, entries: Entries, kinds: Kinds | None = None) -> None:
        """Take the layer's blob (uint8), what its table says, and what it has in common with other layers."""
        self.data = data
        self._kinds = kinds
        self.entries = entries
        self._table = blob.table_of(entries)
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
        compiled = trust.compiled(data.device, *_subjects("grouped", self.entries))
        shapes = list(self.shapes.values())
        return PackedLayer(
            data=data,
            entries=self.entries,
            shapes=self.shapes,
            table=self._table if compiled else None,
            exact=self.exact,
            facts=device_facts(data, self.entries, shapes, self._kinds) if compiled else None,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _is_placed(self.data):
            _ = self.layer  # now, see `PackedExperts.bind`
        return self

    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one matrix decode to, (N, K) float32 on the CPU."""
        matrix = self.layer.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape).cpu()

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        return dispatch.experts(experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        """Shapes and size, for print(model)."""
        size = 0 if self.data is None else self.data.numel()
        return f"experts={len(self.entries)}, shapes={self.shapes}, bytes={size}"


class SpectralExperts(nn.Module):
    """As `PackedExperts`, for the layout "spectral"."""

    data: Tensor | None

    def __init__(self, shape: SpectralShape) -> None:
        super().__init__()
        self.shape = shape
        self.exact: bool | None = None
        self._layer: SpectralLayer | None = None
        self._compiled = False
        self.register_buffer("data", None, persistent=False)

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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _is_placed(self.data):
            _ = self.layer  # now, see `PackedExperts.bind`
        return self

    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one expert's projection decode to: its components (n, I), float32, on the CPU."""
        return self.layer.factor(expert, projection).cpu()

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        return dispatch.spectral_experts(experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        """Shape and size, for print(model)."""
        size = 0 if self.data is None else self.data.numel()
        ranks = {} if self._layer is None else {name: entry.rank for name, entry in self._layer.entries.items()}
        return f"experts={self.shape.num_experts}, inner={self.shape.inner}, ranks={ranks}, bytes={size}"


class TiledExperts(nn.Module):
    """As `PackedExperts`, for the layout "tiled"."""

    data: Tensor | None
    side_data: Tensor | None

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.entries: Entries = ()
        self.tiles: dict[str, TileEntry] = {}
        self.exact: bool | None = None
        self._kinds: Kinds | None = None
        self._layer: TiledLayer | None = None
        self.register_buffer("data", None, persistent=False)
        self.register_buffer("side_data", None, persistent=False)

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
        self._layer = self._made(data, sides)  # with the facts, see `PackedExperts.bind`

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
        compiled = trust.compiled(data.device, *_subjects("tiled", self.entries))
        facts = device_facts(data, self.entries, list(self.shapes.values()), self._kinds) if compiled else None
        residual = PackedLayer(
            data=data,
            entries=self.entries,
            shapes=self.shapes,
            table=blob.table_of(self.entries) if compiled else None,
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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _is_placed(self.data):
            _ = self.layer  # now, see `PackedExperts.bind`
        return self

    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one residual decode to, (N, K) float32 on the CPU."""
        matrix = self.layer.residual.matrix(expert, projection)
        return decode_matrix(matrix.record, matrix.spec, matrix.shape).cpu()

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        return dispatch.tiled_experts(experts, self.layer, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        """Shapes and size, for print(model)."""
        size = sum(0 if part is None else part.numel() for part in (self.data, self.side_data))
        grids = {name: f"{e.form.rows}x{e.form.columns} rank {e.form.rank}" for name, e in self.tiles.items()}
        return f"experts={len(self.entries)}, shapes={self.shapes}, tiles={grids}, bytes={size}"


class PackedLinear(nn.Module):
    """A linear layer over packed weights; stands in for nn.Linear."""

    data: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.spec: QuantSpec | None = None
        self.exact: bool | None = None
        self._matrix: PackedMatrix | None = None
        self.register_buffer("data", None, persistent=False)

    def bind(self, data: Tensor, spec: QuantSpec) -> None:
        """Take the matrix record (uint8) and its spec."""
        self.data = data
        self.spec = spec
        self._matrix = self._made(data, spec)  # with the facts, see `PackedExperts.bind`

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
        compiled = trust.compiled(data.device, *_subjects("linear", entries))
        facts = device_facts(data, entries, [shape]) if compiled else None
        return PackedMatrix(record=data, spec=spec, shape=shape, exact=self.exact, facts=facts, compiled=compiled)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _is_placed(self.data):
            _ = self.matrix  # now, see `PackedExperts.bind`
        return self

    @property
    def weight(self) -> Tensor:
        """The decoded weights (out_features, in_features), float32; for code that looks at them."""
        return decode_matrix(self.matrix.record, self.matrix.spec, self.matrix.shape)

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        flat = hidden_states.reshape(-1, self.in_features)
        out = dispatch.linear(flat, self.matrix)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and width, for print(model)."""
        bits = "?" if self.spec is None else self.spec.bits
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


def _subjects(layout: str, entries: Entries) -> tuple[str, ...]:
    """What `moeq.kernels.trust` is asked about such a layer."""
    books = any(spec.codebooks is not None for expert in entries for _, spec in expert)
    return (layout, "codebooks") if books else (layout,)


def _is_placed(data: Tensor | None) -> bool:
    """Whether there are bytes, on a device that has kernels."""
    return data is not None and data.device.type in ("cpu", "cuda")

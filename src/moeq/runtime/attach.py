"""Turns a family's skeleton into one that runs on packed bytes, and binds the bytes to it."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.checkpoint.header import read_header
from moeq.checkpoint.mapped import map_file
from moeq.errors import PackedError
from moeq.format import manifest
from moeq.format.blob import (
    DATA_SUFFIX,
    SIDES_SUFFIX,
    TABLE_SUFFIX,
    TILES_SUFFIX,
    Entries,
    Shapes,
    parse_table,
)
from moeq.format.spectral import parse_spectral_table
from moeq.format.tiled import TileEntry, parse_tile_table, read_sides
from moeq.kernels.packed import Kinds, PackedLayer, entry_kinds
from moeq.kernels.spectral import SpectralLayer, read_layer
from moeq.kernels.tiled import TiledLayer
from moeq.runtime.modules import PackedExperts, PackedLinear, SpectralExperts, TiledExperts


def prepare(model: nn.Module, layers: Iterable[manifest.PackedLayer], dense: Iterable[manifest.PackedLinear]) -> None:
    """Replace the weights of experts and packed linears by empty packed modules.

    Raises:
        PackedError: the model lacks a module that the checkpoint packs.
    """
    for layer in layers:
        experts = hooks.strip_weights(model, locate(model, layer.path))
        hooks.attach_handler(experts, _handler(layer))
    for linear in dense:
        module = find(model, linear.path)
        if not isinstance(module, nn.Linear):
            raise PackedError(f"{type(module).__name__} is packed as a linear layer", tensor=linear.path, fix=_FIX)
        parent, _, name = linear.path.rpartition(".")
        find(model, parent).add_module(name, PackedLinear(module))


def _handler(layer: manifest.PackedLayer) -> PackedExperts | SpectralExperts | TiledExperts:
    if layer.layout == "spectral":
        return SpectralExperts(layer.spectral_shape)
    if layer.layout == "tiled":
        return TiledExperts(layer.named_shapes)
    return PackedExperts(layer.named_shapes)


def bind(
    model: nn.Module,
    layers: Iterable[manifest.PackedLayer],
    dense: Iterable[manifest.PackedLinear],
    files: Iterable[Path],
) -> None:
    """Give the packed modules their bytes, mapped from `files`, on the device each module lives on.

    Raises:
        PackedError: bytes are missing, or a table contradicts them.
    """
    tensors = map_packed(files)
    layers = tuple(layers)
    grouped = {
        layer.path: _entries(tensors, layer.path, layer.ordered_shapes) for layer in layers if not _is_spectral(layer)
    }
    spectral = {
        layer.path: spectral_layer(tensors, layer, torch.device("cpu"))[1] for layer in layers if _is_spectral(layer)
    }
    kinds = _common(
        {
            layer.path: (layer.ordered_shapes, entry_kinds(grouped[layer.path][1], len(layer.ordered_shapes)))
            for layer in layers
            if not _is_spectral(layer)
        }
    )
    component_kinds = _common(
        {
            (path, name): ((bound.shape.hidden, bound.shape.inner, name), each)
            for path, bound in spectral.items()
            for name, each in bound.own_kinds().items()
        }
    )
    for layer in layers:
        packed = find(model, layer.path).get_submodule(hooks.HANDLER)
        device = _device(model, layer.path)
        if isinstance(packed, SpectralExperts):
            bound = spectral[layer.path]
            common = {name: component_kinds[layer.path, name] for name in bound.entries}
            data = bound.data.to(device)
            packed.bind(data, replace(bound, kinds=common).at(data))
            continue
        data, entries = grouped[layer.path]
        if isinstance(packed, TiledExperts):
            sides, tiles = _tiles(tensors, layer)
            packed.bind(data.to(device), entries, sides.to(device), tiles, layer.path, kinds[layer.path])
            continue
        assert isinstance(packed, PackedExperts)
        packed.bind(data.to(device), entries, kinds[layer.path])
    for linear in dense:
        data, entries = _entries(tensors, linear.path, (linear.shape,))
        module = find(model, linear.path)
        assert isinstance(module, PackedLinear)
        module.bind(data.to(_device(model, linear.path)), entries[0][0][1])


def _is_spectral(layer: manifest.PackedLayer) -> bool:
    return layer.layout == "spectral"


def _common(found: Mapping[Hashable, tuple[Hashable, Kinds]]) -> dict[Hashable, Kinds]:
    """What all of one shape have: kernels are compiled for that, once, and not for every layer."""
    every: dict[Hashable, Kinds] = {}
    for shape, kinds in found.values():
        every[shape] = every[shape] | kinds if shape in every else kinds
    return {key: every[shape] for key, (shape, _) in found.items()}


def map_packed(files: Iterable[Path]) -> dict[str, Tensor]:
    """The packed tensors of all files that hold any."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if any(name.endswith(DATA_SUFFIX) for name in read_header(path)):
            tensors.update(map_file(path))
    return tensors


def spectral_layer(
    tensors: Mapping[str, Tensor], layer: manifest.PackedLayer, device: torch.device
) -> tuple[Tensor, SpectralLayer]:
    """The blob of a spectral layer on `device`, and what its table and maps say.

    Raises:
        PackedError: bytes are missing, or contradict each other.
    """
    data, table = _pair(tensors, layer.path)
    shape = layer.spectral_shape
    entries = parse_spectral_table(table, shape, data.numel(), tensor=layer.path + TABLE_SUFFIX)
    data = data.to(device)
    return data, read_layer(data, entries, shape, layer.path)


def tiled_layer(tensors: Mapping[str, Tensor], layer: manifest.PackedLayer) -> TiledLayer:
    """A tiled layer on the CPU.

    Raises:
        PackedError: bytes are missing, or contradict each other.
    """
    data, entries = _entries(tensors, layer.path, layer.ordered_shapes)
    side_data, tiles = _tiles(tensors, layer)
    return TiledLayer(
        residual=PackedLayer(data=data, entries=entries, shapes=layer.named_shapes),
        sides=read_sides(side_data, tiles, layer.num_experts, layer.shapes, layer.path),
    )


def _tiles(tensors: Mapping[str, Tensor], layer: manifest.PackedLayer) -> tuple[Tensor, dict[str, TileEntry]]:
    data, table = _pair(tensors, layer.path, (SIDES_SUFFIX, TILES_SUFFIX))
    name = layer.path + TILES_SUFFIX
    return data, parse_tile_table(table, layer.num_experts, layer.named_shapes, data.numel(), tensor=name)


def _entries(tensors: Mapping[str, Tensor], path: str, shapes: Shapes) -> tuple[Tensor, Entries]:
    data, table = _pair(tensors, path)
    return data, parse_table(table, shapes, data.numel(), tensor=path + TABLE_SUFFIX)


def _pair(
    tensors: Mapping[str, Tensor], path: str, suffixes: tuple[str, str] = (DATA_SUFFIX, TABLE_SUFFIX)
) -> tuple[Tensor, Tensor]:
    for suffix in suffixes:
        if path + suffix not in tensors:
            raise PackedError("packed tensor missing", tensor=path + suffix, fix=_FIX)
    return tensors[path + suffixes[0]], tensors[path + suffixes[1]]


def _device(model: nn.Module, path: str) -> torch.device:
    """Where the nearest weights around `path` live: the packed bytes go there too."""
    while path:
        path = path.rpartition(".")[0]
        for parameter in find(model, path).parameters():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")


def locate(model: nn.Module, path: str) -> str:
    """The module path in `model` that `path` means, with or without the base model's prefix.

    A checkpoint written from a model with a head also loads into the bare base model.

    Raises:
        PackedError: there is none.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if candidate in modules:
            return candidate
    raise PackedError(f"the model has no module {path}", tensor=path, fix=_FIX)


def find(model: nn.Module, path: str) -> nn.Module:
    """The module that `locate` finds."""
    return model.get_submodule(locate(model, path)) if path else model


_FIX = "download or quantize the checkpoint again"

"""Turns a family's skeleton into one that runs on packed bytes, and binds the bytes to it."""

from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.arch.sorted_rows import adopt
from moeq.checkpoint.header import read_header
from moeq.checkpoint.mapped import map_file
from moeq.errors import PackedError
from moeq.format import manifest
from moeq.kernels.facts import Kinds
from moeq.layouts.base import DATA_SUFFIX
from moeq.layouts.grouped.serving import PackedLinear, Siblings, open_records
from moeq.layouts.serving import FIX, ExpertsModule, Loose, layout
from moeq.layouts.validate import SUFFIXES
from moeq.spec import stored_bytes

ANNOUNCED: Final = "bytes_to_come"
"""Buffer of a packed module that has no bytes yet."""


def prepare(model: nn.Module, layers: Iterable[manifest.PackedLayer], dense: Iterable[manifest.PackedLinear]) -> None:
    """Replace the weights of experts and packed linears by empty packed modules.

    Raises:
        PackedError: the model lacks a module that the checkpoint packs.
    """
    adopt(model)
    for layer in layers:
        if layer.members:
            for path in member_paths(layer):
                _replace_linear(model, path)
            continue
        experts = hooks.strip_weights(model, locate(model, layer.path))
        hooks.attach_handler(experts, layout(layer.layout).module(layer))
    for linear in dense:
        _replace_linear(model, linear.path)


def member_paths(layer: manifest.PackedLayer) -> Iterator[str]:
    """Module paths of the matrices of experts that are modules of their own, in storage order."""
    for expert in range(layer.num_experts):
        for projection in layer.projections:
            yield f"{layer.path}.{layer.members[projection].replace('{expert}', str(expert))}"


def _replace_linear(model: nn.Module, path: str) -> None:
    module = find(model, path)
    if not isinstance(module, nn.Linear):
        raise PackedError(f"{type(module).__name__} is packed as a linear layer", tensor=path, fix=FIX)
    parent, _, name = path.rpartition(".")
    find(model, parent).add_module(name, PackedLinear(module))


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
    layers, dense = tuple(layers), tuple(dense)
    for _, module in packed_modules(model, layers, dense):
        module._buffers.pop(ANNOUNCED, None)
    for layer in layers:
        if layer.members:
            _bind_members(model, layer, tensors)
    opened = [(layer.path, layout(layer.layout).open(layer, tensors)) for layer in layers if not layer.members]
    # Kernels are compiled for what all layers of one shape have, once, and not for every layer.
    common: dict[Hashable, Kinds] = {}
    for _, found in opened:
        for key, kinds in found.kinds().items():
            common[key] = common[key] | kinds if key in common else kinds
    for path, found in opened:
        found.fill(find(model, path).get_submodule(hooks.HANDLER), _device(model, path), common)
    for linear in dense:
        data, entries = open_records(linear.path, (linear.shape,), tensors)
        module = find(model, linear.path)
        assert isinstance(module, PackedLinear)
        module.bind(data.to(_device(model, linear.path)), entries[0][0][1])
    _join(model)


def _join(model: nn.Module) -> None:
    """Tell packed linears of one module and one width of input of each other."""
    for parent in model.modules():
        by_width: dict[int, list[PackedLinear]] = {}
        for child in parent.children():
            if isinstance(child, PackedLinear):
                by_width.setdefault(child.in_features, []).append(child)
        for members in by_width.values():
            siblings = Siblings(members)
            for position, member in enumerate(members if len(members) > 1 else ()):
                member.join(siblings, position)


def announce(
    model: nn.Module,
    layers: Iterable[manifest.PackedLayer],
    dense: Iterable[manifest.PackedLinear],
    files: Iterable[Path],
) -> dict[str, int]:
    """Let packed modules that have no bytes yet be counted by whoever shares a model out to devices.

    Each gets a buffer of one byte; the answer says how many bytes stand behind it, by the buffer's name. `bind` takes
    the buffers away.
    """
    stored: dict[str, int] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name.endswith(SUFFIXES):
                path = name.rpartition(".")[0]
                stored[path] = stored.get(path, 0) + info.stop - info.start
    names = {id(module): name for name, module in model.named_modules()}
    sizes = {}
    for path, module in packed_modules(model, layers, dense):
        module.register_buffer(ANNOUNCED, torch.empty(1, dtype=torch.uint8, device="meta"), persistent=False)
        sizes[f"{names[id(module)]}.{ANNOUNCED}"] = stored.get(path, 0)
    return sizes


def packed_modules(
    model: nn.Module, layers: Iterable[manifest.PackedLayer], dense: Iterable[manifest.PackedLinear]
) -> Iterator[tuple[str, nn.Module]]:
    """(path in the checkpoint, module) of everything that has bytes of its own."""
    for layer in layers:
        if layer.members:
            yield layer.path, find(model, next(member_paths(layer)))
        else:
            yield layer.path, find(model, layer.path).get_submodule(hooks.HANDLER)
    for linear in dense:
        yield linear.path, find(model, linear.path)


def loosen(
    model: nn.Module, layers: Iterable[manifest.PackedLayer], dense: Iterable[manifest.PackedLinear]
) -> dict[str, tuple[Loose, ...]]:
    """Let the scales of all packed modules be trained: name of a blob -> what its bytes are made of, in order."""
    found: dict[str, list[nn.Module]] = {}
    for layer in layers:
        paths = tuple(member_paths(layer)) if layer.members else ()
        modules = [find(model, path) for path in paths] or [find(model, layer.path).get_submodule(hooks.HANDLER)]
        found[layer.path] = modules
    found |= {linear.path: [find(model, linear.path)] for linear in dense}
    loosened = {path + DATA_SUFFIX: tuple(_loose(module) for module in modules) for path, modules in found.items()}
    return {name: tuple(p for p in parts if p is not None) for name, parts in loosened.items() if None not in parts}


def _loose(module: nn.Module) -> Loose | None:
    assert isinstance(module, ExpertsModule | PackedLinear)
    return module.loosen()


def _bind_members(model: nn.Module, layer: manifest.PackedLayer, tensors: dict[str, Tensor]) -> None:
    """Give each expert's linears their records of the layer's blob."""
    data, entries = open_records(layer.path, layer.ordered_shapes, tensors)
    data = data.to(_device(model, f"{layer.path}.0"))
    places = [place for expert in entries for place in expert]
    shapes = layer.ordered_shapes * layer.num_experts
    for path, (start, spec), shape in zip(member_paths(layer), places, shapes, strict=True):
        module = find(model, path)
        assert isinstance(module, PackedLinear)
        module.bind(data[start : start + stored_bytes(spec, shape)], spec)


def map_packed(files: Iterable[Path]) -> dict[str, Tensor]:
    """The packed tensors of all files that hold any."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if any(name.endswith(SUFFIXES) for name in read_header(path)):
            tensors.update(map_file(path))
    return tensors


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

    A checkpoint written from a model with a head also loads into the bare base model, and that of a model with towers
    into the class of its text part alone.

    Raises:
        PackedError: there is none.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if candidate in modules:
            return candidate
    parts = path.split(".")
    for start in range(1, len(parts)):  # a path without some names on the way to the text part
        for stop in range(start + 1, len(parts)):
            candidate = ".".join([*parts[:start], *parts[stop:]])
            if candidate in modules and parts[start:stop] and any(part.isdigit() for part in parts[stop:]):
                return candidate
    raise PackedError(f"the model has no module {path}", tensor=path, fix=FIX)


def find(model: nn.Module, path: str) -> nn.Module:
    """The module that `locate` finds."""
    return model.get_submodule(locate(model, path)) if path else model

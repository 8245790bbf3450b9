"""Layers that predict further tokens (MTP): in many checkpoints, and in none of transformers' models.

They lie behind the last decoder layer (DeepSeek, GLM: `model.layers.61.`) or apart (`mtp.`); transformers ignores them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from moeq.arch.keymap import build_keymap
from moeq.arch.meta import build_meta_model
from moeq.arch.sources import WEIGHT_DTYPES
from moeq.artifacts import Inventory
from moeq.errors import MissingTensorError, TensorError
from moeq.model_parts import MoeLayer
from moeq.spec import TensorInfo

CONFIG_KEYS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "n_predict")
"""Keys of config.json that say how many there are."""
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_APART: Final = re.compile(r"(?:^|\.)(?:mtp|nextn|mtp_layers|nextn_layers)\.")


def mtp_tensors(directory: Path, headers: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the tensors of such layers that the model has no use for."""
    model = build_meta_model(directory)
    used = {name for route in build_keymap(model, headers).routes.values() for name in route.names}
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = set()
    for name in headers:
        layer = _LAYER.search(name)
        behind = layer is not None and layers is not None and int(layer[1]) >= layers
        if name not in used and (behind or _APART.search(name)):
            found.add(name)
    return frozenset(found)


def mtp_layers(directory: Path, inventory: Inventory, headers: Mapping[str, TensorInfo]) -> tuple[MoeLayer, ...]:
    """The layers of experts among those tensors, stored as the model's own are; none if they are not.

    Args:
        directory: the checkpoint.
        inventory: of the model.
        headers: its tensors.

    Raises:
        TensorError: a tensor is not of the shape that the model's experts have.
        MissingTensorError: an expert of such a layer is absent.
    """
    known = ((layer, _inside(layer)) for layer in inventory.layers)
    own, suffixes = next(((layer, names) for layer, names in known if names), (None, {}))
    if own is None:
        return ()
    first = suffixes["down"].replace("{expert}", "0")
    found = []
    for name in sorted(mtp_tensors(directory, headers), key=_natural):
        if not name.endswith(first):
            continue
        block = name.removesuffix(first)
        sources = {key: replace(own.sources[key], name=f"{block}{suffix}") for key, suffix in suffixes.items()}
        layer = replace(
            own,
            path=f"{block}{own.path.removeprefix(own.block + '.')}",
            block=block.removesuffix("."),
            sources=sources,
            attached=False,
        )
        _check(layer, own, headers)
        found.append(layer)
    return tuple(found)


def _inside(layer: MoeLayer) -> dict[str, str]:
    """How the names of a layer's tensors go on after the layer's number; nothing if they do not have it in common."""
    stems, suffixes = set(), {}
    for projection, source in layer.sources.items():
        match = _LAYER.search(source.name)
        if match is None:
            return {}
        stems.add(source.name[: match.end()])
        suffixes[projection] = source.name[match.end() :]
    return suffixes if len(stems) == 1 else {}


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _check(layer: MoeLayer, own: MoeLayer, headers: Mapping[str, TensorInfo]) -> None:
    """All tensors are there, and like those of `own`."""
    for projection, source in layer.sources.items():
        for expert in range(layer.num_experts):
            name, like = source.tensor(expert), headers[own.sources[projection].tensor(expert)]
            if name not in headers:
                raise MissingTensorError("this expert is absent", tensor=name, fix="use --mtp keep")
            info = headers[name]
            if info.shape != like.shape or info.dtype not in WEIGHT_DTYPES:
                message = f"{info.dtype} {list(info.shape)} is unlike the {list(like.shape)} of the model's own experts"
                raise TensorError(message, file=info.file, tensor=name, fix="use --mtp keep")


def without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says there are none, at every depth."""
    return {
        key: 0 if key in CONFIG_KEYS and value else without_mtp(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }

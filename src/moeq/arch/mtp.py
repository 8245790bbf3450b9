"""Layers that predict further tokens (MTP): in many checkpoints, and in none of transformers' models.

They lie behind the last decoder layer (DeepSeek, GLM: `model.layers.61.`) or apart (`mtp.`); transformers ignores them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moeq.arch.keymap import build_keymap
from moeq.arch.meta import build_meta_model
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


def without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says there are none, at every depth."""
    return {
        key: 0 if key in CONFIG_KEYS and value else without_mtp(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }

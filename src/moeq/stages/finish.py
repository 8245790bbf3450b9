"""What makes packed shards a checkpoint: config, hook, index, plan, manifest and model card."""

import json
from pathlib import Path
from typing import Any

from moeq import codec
from moeq.artifacts import Inventory, Plan
from moeq.checkpoint.write import FileDigest, copy_sidecars, write_file_atomic, write_index
from moeq.format.manifest import Manifest, PackedLayer, PackedLinear
from moeq.recipe import Recipe
from moeq.stages.shards import Shard
from moeq.version import __version__

QUANT_METHOD = "moeq"
HOOK_NAME = "moeq_hook.py"
PLAN_NAME = "moeq_plan.json"
RECIPE_NAME = "moeq_recipe.yaml"
HOOK_TEXT = '''"""Lets transformers load this checkpoint with trust_remote_code=True and no other import.

It needs the package moeq (pip install moeq); importing it registers the quantizer.
"""

import moeq  # noqa: F401
from transformers import AutoConfig

# The stock configuration class: with it transformers picks the stock model class.
Cfg = type(AutoConfig.for_model({model_type!r}))
'''


def packed_layers(inventory: Inventory) -> tuple[PackedLayer, ...]:
    """The layers of experts as the manifest names them."""
    return tuple(
        PackedLayer(
            path=layer.path,
            num_experts=layer.num_experts,
            projections=layer.projections,
            shapes=layer.shapes,
            concatenated=layer.concatenated,
            transposed=layer.transposed,
        )
        for layer in inventory.layers
    )


def packed_linears(inventory: Inventory, plan: Plan) -> tuple[PackedLinear, ...]:
    """The packed linears as the manifest names them."""
    return tuple(
        PackedLinear(path=linear.path, shape=linear.shape) for linear in inventory.dense if linear.path in plan.dense
    )


def quantization_config(inventory: Inventory, plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The `quantization_config` of config.json: enough to load without any other file of ours."""
    bits = 8 * plan.expert_bytes / inventory.expert_parameters
    return {
        "quant_method": QUANT_METHOD,
        "format_version": Manifest.VERSION,
        "bits": round(bits, 4),
        "group_size": recipe.group_size,
        "method": plan.method,
        "moeq_version": __version__,
        "plan": PLAN_NAME,
        "plan_hash": plan.hash,
        "modules_to_not_convert": [linear.path for linear in inventory.dense if linear.path not in plan.dense],
        "layers": codec.encode(packed_layers(inventory)),
        "dense": codec.encode(packed_linears(inventory, plan)),
    }


def write_files(
    source: Path, partial: Path, inventory: Inventory, plan: Plan, recipe: Recipe, shards: tuple[Shard, ...]
) -> dict[str, FileDigest]:
    """Everything beside the shards, except manifest and model card.

    Returns:
        file -> digest.
    """
    files = copy_sidecars(source, partial, skip=("moeq.json", PLAN_NAME, HOOK_NAME, RECIPE_NAME))
    config = codec.read_json(source / "config.json")
    config["quantization_config"] = quantization_config(inventory, plan, recipe)
    config["auto_map"] = {"AutoConfig": f"{HOOK_NAME.removesuffix('.py')}.Cfg"}
    files["config.json"] = write_file_atomic(partial / "config.json", _pretty(config))
    files[HOOK_NAME] = write_file_atomic(partial / HOOK_NAME, _hook(config).encode())
    files[PLAN_NAME] = write_file_atomic(partial / PLAN_NAME, codec.canonical(plan.to_dict()) + b"\n")
    files[RECIPE_NAME] = write_file_atomic(partial / RECIPE_NAME, recipe.to_yaml().encode())
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.size for shard in shards for tensor in shard.tensors)
    index = "model.safetensors.index.json"
    files[index] = write_index(partial, weight_map, total)
    return files


def _hook(config: dict[str, Any]) -> str:
    return HOOK_TEXT.format(model_type=config["model_type"])


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

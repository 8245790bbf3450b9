"""What makes packed shards a checkpoint: config, hook, index, plan, manifest and model card."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeq import codec
from moeq.arch.mtp import without_mtp
from moeq.artifacts import Inventory, Plan
from moeq.checkpoint.locate import CONFIG_NAME, INDEX_NAME, read_config
from moeq.checkpoint.write import FileDigest, copy_sidecars, index_text, list_sidecars, write_file_atomic
from moeq.format.manifest import MANIFEST_NAME, Manifest, PackedLayer, PackedLinear
from moeq.recipe import Recipe
from moeq.report.card import PICTURE_NAME
from moeq.report.facts import BINS, FACTS_NAME
from moeq.version import __version__
from moeq.writing import card_facts
from moeq.writing.arrangement import Shard

QUANT_METHOD = "moeq"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
HOOK_NAME = "moeq_hook.py"
PLAN_NAME = "moeq_plan.json"
RECIPE_NAME = "moeq_recipe.yaml"
OWN_FILES = (MANIFEST_NAME, PLAN_NAME, HOOK_NAME, RECIPE_NAME, PICTURE_NAME, FACTS_NAME)
CARD_RESERVE = 10 * 1024
"""Bytes kept free for the model card, a long command included, and for hashes in the manifest."""
CARD_RESERVE_PER_LAYER = 100
FACTS_RESERVE, POINT_BYTES, NUMBER_BYTES = 2 * 1024, 64, 14
"""Bytes kept free for what reports show: in all, for each budget of the curve, for each number."""
FACTS_SHARE = 2000
"""At most this part of the original's bytes is kept free for them; `moeq.stages.facts` leaves out what has no room."""
POINTS, STATISTICS = 24, 3
"""Budgets of that curve, and numbers for each unit at most."""
HOOK_TEXT = '''"""Lets transformers load this checkpoint with trust_remote_code=True and no other import.

It needs the package moeq (pip install moeq); importing it registers the quantizer.
"""

import moeq  # noqa: F401
from transformers import AutoConfig

# The stock configuration class: with it transformers picks the stock model class.
Cfg = type(AutoConfig.for_model({model_type!r}))
'''
OWN_HOOK_TEXT = '''"""Lets transformers load this checkpoint with trust_remote_code=True and no other import.

It needs the package moeq (pip install moeq); importing it registers the quantizer. The model is that of its own code.
"""

import moeq  # noqa: F401

from .{module} import {name} as Cfg  # noqa: F401
'''
"""The same, for a model that brings its code."""


def packed_layers(inventory: Inventory, plan: Plan) -> tuple[PackedLayer, ...]:
    """The layers of experts as the manifest names them."""
    return tuple(
        PackedLayer(
            path=layer.path,
            num_experts=layer.num_experts,
            projections=layer.projections,
            shapes=layer.shapes,
            concatenated=layer.concatenated,
            transposed=layer.transposed,
            layout=plan.layout,
            attached=layer.attached,
            members=layer.members,
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
        "layers": codec.encode(packed_layers(inventory, plan)),
        "dense": codec.encode(packed_linears(inventory, plan)),
    }


def write_files(
    source: Path, partial: Path, inventory: Inventory, plan: Plan, recipe: Recipe, shards: tuple[Shard, ...]
) -> dict[str, FileDigest]:
    """Everything beside the shards, except manifest and model card; a picture only if there are widths to tell apart.

    Returns:
        file -> digest.
    """
    files = copy_sidecars(source, partial, skip=OWN_FILES)
    for name, text in _texts(source, inventory, plan, recipe, shards).items():
        files[name] = write_file_atomic(partial / name, text)
    if card_facts.is_mixed(inventory, plan):
        # Not the directory's name: the same input must give the same bytes wherever it lies.
        picture = card_facts.heatmap(inventory, plan, inventory.architecture)
        files[PICTURE_NAME] = write_file_atomic(partial / PICTURE_NAME, picture.encode())
    return files


def manifest(
    inventory: Inventory,
    plan: Plan,
    recipe: Recipe,
    files: Mapping[str, FileDigest],
    calibration: dict[str, Any] | None,
) -> Manifest:
    """The manifest of a checkpoint that consists of `files`."""
    return Manifest(
        moeq_version=__version__,
        method=plan.method,
        plan_hash=plan.hash,
        model_hash=inventory.model_hash,
        files=dict(files),
        layers=packed_layers(inventory, plan),
        dense=packed_linears(inventory, plan),
        recipe=codec.encode(recipe),
        calibration=calibration,
    )


def sidecar_limit(source: Path, inventory: Inventory, plan: Plan, recipe: Recipe, shards: tuple[Shard, ...]) -> int:
    """Bytes that everything beside the weight files takes at most, whatever the weights are.

    The texts are those that will be written; what is not known yet (hashes, token counts) has its
    largest length. The picture is counted as large as any plan's may be, since a budget needs this number
    before there is a plan. Only the model card is estimated.

    Raises:
        CheckpointError: the source has a link that leads out of it.
    """
    sizes = {name: path.stat().st_size for name, path in list_sidecars(source, OWN_FILES)}
    sizes |= {name: len(text) for name, text in _texts(source, inventory, plan, recipe, shards).items()}
    sizes[PICTURE_NAME] = card_facts.heatmap_limit(inventory, inventory.architecture, plan.layout)
    digest = FileDigest(bytes=10**15, sha256="0" * 64)
    files = dict.fromkeys([*sizes, *(shard.file for shard in shards)], digest)
    tokens = recipe.nsamples * recipe.seqlen
    calibration = {
        "source": recipe.calibration,
        "tokens_hash": "0" * 64,
        "texts": [
            {"name": name, "samples": tokens, "documents": 10**12, "conversations": 10**12}
            for name in (recipe.text or "").split(",") * 2
        ],
        "tokens_per_expert": [[tokens] * layer.num_experts for layer in inventory.layers],
    }
    listed = manifest(inventory, plan, recipe, files, calibration if recipe.text else None)
    readme = CARD_RESERVE + CARD_RESERVE_PER_LAYER * len(inventory.layers)
    return sum(sizes.values()) + len(codec.canonical(listed)) + readme + _facts_limit(inventory, recipe)


def _facts_limit(inventory: Inventory, recipe: Recipe) -> int:
    """Bytes that are kept free for the facts for reports: all that they need, or a small share of a small model."""
    return min(_facts_bytes(inventory, recipe), inventory.source_bytes // FACTS_SHARE)


def _facts_bytes(inventory: Inventory, recipe: Recipe) -> int:
    texts = len(recipe.text or "") + 400 * (1 + (recipe.text or "").count(","))
    if recipe.cost is None:
        return FACTS_RESERVE + texts
    layers = len(inventory.layers)
    if recipe.has_components:
        return FACTS_RESERVE + texts + POINTS * POINT_BYTES + layers * 3 * (BINS + 2) * NUMBER_BYTES
    matrices = sum(layer.num_experts * len(layer.projections) for layer in inventory.layers)
    curve = POINTS * (POINT_BYTES + matrices + 3 * layers)
    return FACTS_RESERVE + texts + curve + matrices * STATISTICS * NUMBER_BYTES


def _texts(
    source: Path, inventory: Inventory, plan: Plan, recipe: Recipe, shards: tuple[Shard, ...]
) -> dict[str, bytes]:
    """Our own files: name -> content."""
    config = read_config(source / CONFIG_NAME)
    if recipe.mtp == "drop":
        config = without_mtp(config)
    if not config.get("dtype") and not config.get("torch_dtype"):  # transformers would take it from our first tensor
        config["dtype"] = _dtype_of(config, shards)
    config["quantization_config"] = quantization_config(inventory, plan, recipe)
    own = config.get("auto_map") if inventory.apart else None
    hook = {"AutoConfig": f"{HOOK_NAME.removesuffix('.py')}.Cfg"}
    config["auto_map"] = hook if own is None else own | hook
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    return {
        "config.json": _pretty(config),
        HOOK_NAME: _hook(config, own).encode(),
        PLAN_NAME: codec.canonical(plan.to_dict()) + b"\n",
        RECIPE_NAME: recipe.to_yaml().encode(),
        INDEX_NAME: index_text(weight_map, sum(tensor.size for shard in shards for tensor in shard.tensors)),
    }


def _dtype_of(config: dict[str, Any], shards: tuple[Shard, ...]) -> str:
    """The dtype that a part of the config names, or that of most bytes which are copied."""
    parts = (value for value in config.values() if isinstance(value, dict))
    named = (part.get("dtype") or part.get("torch_dtype") for part in parts)
    sizes = Counter[str]()
    for tensor in (tensor for shard in shards if shard.layer is None for tensor in shard.tensors):
        sizes[DTYPES.get(tensor.dtype, "bfloat16")] += tensor.size
    return next((str(name) for name in named if name), sizes.most_common(1)[0][0] if sizes else "bfloat16")


def _hook(config: dict[str, Any], own: dict[str, str] | None) -> str:
    if own is not None:
        module, _, name = own["AutoConfig"].rpartition(".")
        return OWN_HOOK_TEXT.format(module=module, name=name)
    return HOOK_TEXT.format(model_type=config["model_type"])


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

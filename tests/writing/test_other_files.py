"""The picture is in the checkpoint, shows the plan, and is paid for by the budget."""

import random
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

import moeq
from moeq.allocation import plans as allocate
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Inventory, Plan, expert_bytes
from moeq.checkpoint.locate import resolve
from moeq.format.manifest import read_manifest
from moeq.layouts.grouped.shown import matrices_map
from moeq.recipe import Recipe
from moeq.report.card import PICTURE_NAME
from moeq.spec import BITS
from moeq.stages.quantize import directory_bytes
from moeq.writing import arrangement as shards
from moeq.writing import other_files as finish
from moeq.writing.card_facts import (
    calibration_facts,
    heatmap,
    heatmap_limit,
    heatmap_lines,
    is_mixed,
    layer_plans,
    stored_bits,
)

ASSETS = Path(__file__).parent.parent.parent / "assets"
DEMO = ASSETS / "demo-qwen3moe-4m"
RECIPE = Recipe(size="4000000", quantizer="rtn")


def shuffled(plan: Plan, inventory: Inventory, seed: int) -> Plan:
    """A plan as costs may make it: any width anywhere."""
    dice = random.Random(seed)
    experts = tuple(
        tuple(tuple(dice.randrange(len(BITS)) for _ in expert) for expert in layer) for layer in plan.experts
    )
    drawn = replace(plan, experts=experts)
    return replace(drawn, expert_bytes=expert_bytes(drawn, inventory))


def test_a_map_has_the_bytes_of_the_plan() -> None:
    inventory, headers = read_inventory(DEMO)
    plan = shuffled(allocate.run(inventory, headers, RECIPE), inventory, 0)
    drawn = matrices_map(inventory.layers, layer_plans(inventory, plan), stored_bits(inventory, plan))
    assert drawn.projections == ("gate", "up", "down")
    bits = sum(mean * layer.parameters for mean, layer in zip(drawn.stored, inventory.layers, strict=True))
    assert bits == pytest.approx(8 * plan.expert_bytes)
    for index, layer in enumerate(drawn.bits):
        assert layer == tuple(tuple(spec.bits for spec in expert) for expert in plan.layer_specs(index))


def test_the_limit_covers_the_picture_of_every_plan() -> None:
    """A budget asks for the limit of one plan and must not be surprised by another."""
    inventory, headers = read_inventory(DEMO)
    plain = allocate.run(inventory, headers, Recipe(bits=9))
    assert not is_mixed(inventory, plain)
    files = shards.arrange(inventory, plain, headers)
    limits = []
    for seed in range(5):
        plan = shuffled(plain, inventory, seed)
        assert is_mixed(inventory, plan)
        picture = heatmap(inventory, plan, inventory.architecture)
        without = finish.sidecar_limit(resolve(DEMO), inventory, plan, RECIPE, files)
        limits.append(without)
        assert (
            len(picture)
            <= heatmap_limit(inventory, inventory.architecture, plan.layout)
            < limits[-1] - finish.CARD_RESERVE
        )
        assert len(heatmap_lines(inventory, plan)) == len(inventory.layers) + 2
    # Plans differ in a digit of expert_bytes and of the mean bits at most, not by their pictures.
    limits.append(finish.sidecar_limit(resolve(DEMO), inventory, plain, RECIPE, files))
    assert max(limits) - min(limits) < 16


def test_a_mixed_checkpoint_shows_its_plan_within_its_size(tmp_path: Path) -> None:
    inventory, headers = read_inventory(DEMO)
    plan = shuffled(allocate.run(inventory, headers, RECIPE), inventory, 1)
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    recipe = Recipe(plan=str(tmp_path / "plan.json"), quantizer="minmax")
    report = moeq.quantize(DEMO, out, plan=recipe.plan, quantizer="minmax", device="cpu")
    text = (out / PICTURE_NAME).read_text(encoding="utf-8")
    assert text == heatmap(inventory, plan, inventory.architecture)
    assert ET.fromstring(text).get("role") == "img"
    assert PICTURE_NAME in read_manifest(out).files
    assert f"]({PICTURE_NAME})" in (out / "README.md").read_text(encoding="utf-8")
    files = shards.arrange(inventory, plan, headers)
    limit = finish.sidecar_limit(resolve(DEMO), inventory, plan, recipe, files)
    beside = directory_bytes(out) - sum((out / shard.file).stat().st_size for shard in files)
    assert report.directory_bytes == directory_bytes(out)
    assert beside <= limit


def test_one_width_needs_no_picture(tmp_path: Path) -> None:
    report = moeq.quantize(DEMO, tmp_path / "out", bits=9, quantizer="minmax", device="cpu")
    assert not (tmp_path / "out" / PICTURE_NAME).exists()
    assert PICTURE_NAME not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert report.verified.logits_finite


@pytest.mark.parametrize("size", [3_600_000, 4_345_678])
def test_a_size_is_kept_with_the_picture(size: int, tmp_path: Path) -> None:
    report = moeq.quantize(DEMO, tmp_path / "out", size=str(size), quantizer="minmax", device="cpu")
    assert (tmp_path / "out" / PICTURE_NAME).is_file()
    assert report.directory_bytes <= size
    assert report.directory_bytes > size - 40_000


def test_text_that_nothing_used_is_not_mentioned() -> None:
    assert calibration_facts(None, {}) is None
    assert calibration_facts(None, {0: [3]}, uses=("costs",)) is None

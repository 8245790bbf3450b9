"""Budgets are obeyed to the byte and used up; the uniform method fills in storage order."""

import itertools
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoo
from moeq.allocation import plans as allocate
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Inventory, Plan
from moeq.errors import BudgetError
from moeq.recipe import Recipe
from moeq.spec import BITS, GROUP_SIZES, TensorInfo, Unit, stored_bytes
from moeq.writing import arrangement as shards

ASSETS = Path(__file__).parent.parent.parent / "assets"
UNIFORM_SHAPES = ASSETS / "demo-qwen3moe-4m"


@cache
def demo() -> tuple[Inventory, dict[str, TensorInfo]]:
    return read_inventory(UNIFORM_SHAPES)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inventory, dict[str, TensorInfo]]:
    """A model whose layers differ: gate and up are not down's size."""
    directory = tmp_path_factory.mktemp("uneven") / "model"
    zoo.make_tiny("deepseek_v3", directory)
    return read_inventory(directory)


RECIPES = st.fixed_dictionaries(
    {
        "group_size": st.sampled_from(GROUP_SIZES),
        "levels": st.sampled_from(("auto", "asym", "sym", "half", "asym16")),
        "dense_bits": st.sampled_from(("16", "8", "4", "attention=6,lm_head=8")),
    }
)


def sidecars(plan: Plan) -> int:
    """Something that grows a little with the plan, as config and manifest do."""
    return 10_000 + len(str(plan.expert_bytes))


def widths(plan: Plan, inventory: Inventory) -> list[int]:
    """Code bits of all matrices in storage order."""
    return [plan.spec(unit, inventory.layers[unit.layer].projections).bits for unit, _ in inventory.units()]


def step(plan: Plan, inventory: Inventory, unit: Unit, shape: tuple[int, int]) -> int:
    """Bytes that the next width of a unit would add."""
    spec = plan.spec(unit, inventory.layers[unit.layer].projections)
    wider = next(other for other in plan.specs if other.bits == BITS[BITS.index(spec.bits) + 1])
    return stored_bytes(wider, shape) - stored_bytes(spec, shape)


@settings(max_examples=40, deadline=None)
@given(st.floats(1.2, 16), RECIPES)
def test_bits_are_all_in_and_never_exceeded(bits: float, options: dict[str, str]) -> None:
    inventory, headers = demo()
    recipe = Recipe(bits=bits, **options)
    try:
        plan = allocate.run(inventory, headers, recipe)
    except BudgetError as error:
        least = float(error.fix.split("at least ")[1].split(",")[0])
        assert least > bits
        plan = allocate.run(inventory, headers, Recipe(**{**options, "bits": least}))
        bits = least
        assert set(widths(plan, inventory)) == {1}
    plan.check_model(inventory)
    budget = bits * inventory.expert_parameters / 8
    assert plan.expert_bytes <= budget
    found = widths(plan, inventory)
    if min(found) < 8:
        unraised = [pair for pair, width in zip(inventory.units(), found, strict=True) if width == min(found)]
        cheapest = min(step(plan, inventory, unit, shape) for unit, shape in unraised)
        assert budget - plan.expert_bytes < cheapest, "what is left must be too little for any other matrix"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1_000_000, 8_800_000), RECIPES)
def test_a_size_is_obeyed_to_the_byte_and_used(size: int, options: dict[str, str]) -> None:
    inventory, headers = demo()
    recipe = Recipe(size=str(size), **options)
    try:
        plan = allocate.run(inventory, headers, recipe, sidecars)
    except BudgetError as error:
        least = int(error.fix.split("at least ")[1].split(" bytes")[0])
        assert least > size
        plan = allocate.run(inventory, headers, Recipe(**{**options, "size": str(least)}), sidecars)
        assert set(widths(plan, inventory)) == {1}
        size = least
    files = shards.arrange(inventory, plan, headers)
    total = shards.sizes(inventory, plan, files).total + sidecars(plan)
    assert total <= size
    found = widths(plan, inventory)
    if min(found) < 8:
        # Headers grow by a few digits with the blobs, never by more than a line of padding each.
        unraised = [pair for pair, width in zip(inventory.units(), found, strict=True) if width == min(found)]
        cheapest = min(step(plan, inventory, unit, shape) for unit, shape in unraised)
        assert size - total < cheapest + 64 * len(files)


@settings(max_examples=20, deadline=None)
@given(st.floats(1, 8))
def test_code_bits_count_codes_only(bits: float) -> None:
    inventory, headers = demo()
    plan = allocate.run(inventory, headers, Recipe(bits=bits, accounting="codes"))
    found = widths(plan, inventory)
    total = sum(width * rows * columns for width, (_, (rows, columns)) in zip(found, inventory.units(), strict=True))
    assert total <= bits * inventory.expert_parameters
    largest = max(rows * columns for _, (rows, columns) in inventory.units())
    assert min(found) == 8 or bits * inventory.expert_parameters - total < 2 * largest
    assert 8 * plan.expert_bytes / inventory.expert_parameters > total / inventory.expert_parameters


@pytest.mark.parametrize("bits", [1.5, 2.3, 3.0, 3.7, 4.44, 5.5, 7.9])
def test_the_first_matrices_get_the_wider_codes(bits: float) -> None:
    inventory, headers = demo()
    found = widths(allocate.run(inventory, headers, Recipe(bits=bits)), inventory)
    low, high = min(found), max(found)
    assert high == low or BITS.index(high) == BITS.index(low) + 1
    assert found == [high] * found.count(high) + [low] * (len(found) - found.count(high))


@pytest.mark.parametrize("bits", [4.5, 5.0, 6.2])
def test_uneven_shapes_use_what_is_left(bits: float, uneven: tuple[Inventory, dict[str, TensorInfo]]) -> None:
    inventory, headers = uneven
    plan = allocate.run(inventory, headers, Recipe(bits=bits, group_size=32))
    budget = bits * inventory.expert_parameters / 8
    found = widths(plan, inventory)
    left = budget - plan.expert_bytes
    assert left >= 0
    for width, (unit, shape) in zip(found, inventory.units(), strict=True):
        if width == min(found) < 8:
            assert step(plan, inventory, unit, shape) > left


def test_more_budget_is_never_less_precise() -> None:
    inventory, headers = demo()
    plans = [widths(allocate.run(inventory, headers, Recipe(bits=bits)), inventory) for bits in (2.2, 2.9, 3.6, 4.3)]
    for narrow, wide in itertools.pairwise(plans):
        assert all(first <= second for first, second in zip(narrow, wide, strict=True))
        assert narrow != wide


def test_dense_linears_follow_the_recipe() -> None:
    inventory, headers = demo()
    plan = allocate.run(inventory, headers, Recipe(bits=3, dense_bits="attention=4,lm_head=8"))
    kinds = {linear.path: linear.kind for linear in inventory.dense}
    assert set(plan.dense) == set(kinds)
    for path, index in plan.dense.items():
        assert plan.specs[index].bits == {"attention": 4, "lm_head": 8}[kinds[path]]
    assert not allocate.run(inventory, headers, Recipe(bits=3)).dense


def test_plans_are_deterministic() -> None:
    inventory, headers = demo()
    first, second = (allocate.run(inventory, headers, Recipe(bits=3.3, dense_bits="8")) for _ in range(2))
    assert first.hash == second.hash

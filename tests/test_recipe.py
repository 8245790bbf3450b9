import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moeq import codec
from moeq.errors import OptionError
from moeq.recipe import ACCOUNTINGS, DENSE_BITS, DENSE_KINDS, Recipe
from moeq.recipe_file import load_recipe
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
RECIPES = st.builds(
    Recipe,
    bits=st.floats(0.5, 16),
    accounting=st.sampled_from(ACCOUNTINGS),
    quantizer=st.none() | TEXT,
    group_size=st.sampled_from(GROUP_SIZES),
    levels=st.sampled_from(("auto", *SCALAR_LEVELS)),
    dense_bits=st.sampled_from(("16", "8", "attention=4", "attention=4,lm_head=8", "shared=6, dense=8")),
    calibration=st.none() | TEXT,
    nsamples=st.integers(1, 10**6),
    seqlen=st.integers(2, 10**6),
    seed=st.integers(0, 2**40),
    routing=st.sampled_from(("natural", "all", "2", "16")),
    act_order=st.booleans(),
    damp=st.floats(1e-6, 10),
    device=TEXT,
) | st.builds(Recipe, plan=TEXT, router=st.sampled_from((None, "none", "kl")))


@given(RECIPES)
def test_yaml_goes_round(recipe: Recipe) -> None:
    data = yaml.safe_load(recipe.to_yaml())
    assert list(data) == list(Recipe.__dataclass_fields__)
    again = Recipe(**data)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_yaml_files_go_round(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for recipe in (Recipe(bits=3), Recipe(size="8GB", routing="4", dense_bits="attention=4"), Recipe(plan="plan.json")):
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert Recipe(**load_recipe(path)) == recipe


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bits: 3", {"bits": 3.0}),
        ("size: 8000000", {"size": "8000000"}),
        ("size: 8GB\ndense-bits: 4", {"size": "8GB", "dense_bits": "4"}),
        ("bits: 3\nrouting: 4\nact-order: true", {"bits": 3.0, "routing": "4", "act_order": True}),
        ("plan: plan.json", {"plan": "plan.json"}),
        ("group-size: -1", {"group_size": -1}),
        ("bits:\nseed: 3", {"seed": 3}),
    ],
)
def test_what_people_write(text: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    found = load_recipe(path)
    assert found == wanted
    assert all(type(found[name]) is type(wanted[name]) for name in wanted)


def test_the_same_choice_is_the_same_bytes() -> None:
    plain = Recipe(bits=3, dense_bits=8, routing=4, calibration=Path("a") / "b.txt", damp=1)  # type: ignore[arg-type]
    typed = Recipe(bits=3.0, dense_bits="8", routing="4", calibration="a/b.txt", damp=1.0)
    assert plain == typed
    assert codec.digest(plain) == codec.digest(typed)
    json.dumps(codec.encode(plain))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"bits": "3"}, "bits"),
        ({"bits": True}, "bits"),
        ({"nsamples": 2.5}, "nsamples"),
        ({"nsamples": True}, "nsamples"),
        ({"seed": None}, "seed"),
        ({"act_order": 1}, "act-order"),
        ({"method": None}, "method"),
        ({"size": 8.5, "bits": None}, "size"),
        ({"device": 0}, "device"),
        ({"damp": float("nan")}, "damp"),
    ],
)
def test_wrong_types_name_the_option(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        Recipe(**{"bits": 3.0, **changes})
    assert caught.value.option == option


def test_dense_widths() -> None:
    assert Recipe(bits=3).dense() == dict.fromkeys(DENSE_KINDS, 16)
    assert Recipe(bits=3, dense_bits="4").dense() == {"attention": 4, "shared": 4, "dense": 4, "lm_head": 16}
    mixed = Recipe(bits=3, dense_bits="attention=4, lm_head=8").dense()
    assert mixed == {"attention": 4, "shared": 16, "dense": 16, "lm_head": 8}


@given(st.text(alphabet="attention=,4 816shrdlm_", max_size=24))
def test_any_text_is_dense_bits_or_refused(text: str) -> None:
    try:
        widths = Recipe(bits=3, dense_bits=text).dense()
    except OptionError as error:
        widths = dict.fromkeys(DENSE_KINDS, 16) if error.option == "dense-bits" else {}
    assert set(widths) == set(DENSE_KINDS)
    assert set(widths.values()) <= set(DENSE_BITS)


def test_levels() -> None:
    assert [Recipe(bits=3).level_set(bits) for bits in BITS] == ["half", "half", "asym", "asym", "asym", "asym", "asym"]
    assert {Recipe(bits=3, levels="sym").level_set(bits) for bits in BITS} == {"sym"}


def test_replace_ignores_none() -> None:
    recipe = Recipe(bits=3, seed=4)
    assert recipe.replace(seed=None, quantizer="rtn") == Recipe(bits=3, seed=4, quantizer="rtn")
    with pytest.raises(OptionError, match="seed"):
        recipe.replace(seed=-1)


def test_the_budget_has_the_unit_that_was_asked_for() -> None:
    assert Recipe(bits=3).budget().bits == 3
    assert Recipe(bits=3, accounting="codes").budget().code_bits == 3
    assert Recipe(size="1MB").budget().size == 10**6
    assert Recipe(size="1MB", accounting="codes").budget().size == 10**6


def test_a_method_brings_its_own_choices() -> None:
    settled = Recipe(method="gemq", bits=2.5, calibration="a.txt").settled()
    assert (settled.cost, settled.unit, settled.scope, settled.shares) == ("fisher", "matrix", "global", "c2c3")
    assert (settled.solver, settled.router, settled.quantizer) == ("auto", "none", "trellis")
    assert Recipe(method="gemq", bits=2.5, shares="none", unit="matrix").settled().shares == "none"
    plain = Recipe(bits=2.5).settled()
    assert (plain.cost, plain.unit, plain.router, plain.quantizer) == (None, None, "none", "hqq")
    assert settled.settled() == settled
    assert plain.settled() == plain
    followed = Recipe(method="gemq", plan="plan.json").settled()
    assert (followed.cost, followed.router) == (None, "none")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"method": "gemq", "bits": 2.5}, (1, 2, 3)),
        ({"method": "gemq", "bits": 2.99}, (1, 2, 3)),
        ({"method": "gemq", "bits": 3.0}, (1, 2, 3, 4)),
        ({"method": "gemq", "bits": 5.5}, (1, 2, 3, 4, 5, 6)),
        ({"method": "gemq", "bits": 16}, (1, 2, 3, 4, 5, 6, 8)),
        ({"method": "alphaq", "bits": 1.5}, (1, 2, 3, 4)),
        ({"method": "alphaq", "size": "1GB"}, (1, 2, 3, 4)),
        ({"cost": "fisher", "bits": 2}, (1, 2, 3, 4)),
        ({"method": "gemq", "bits": 2.5, "candidates": "4, 2,8"}, (2, 4, 8)),
    ],
)
def test_candidates_leave_room_for_the_budget(options: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert Recipe(**options).candidate_bits() == wanted


def test_candidates_follow_what_a_size_leaves() -> None:
    assert Recipe(method="gemq", size="1GB").candidate_bits(3.4) == (1, 2, 3, 4)
    assert Recipe(method="gemq", size="1GB").candidate_bits(2.4) == (1, 2, 3)


def test_options_of_the_cost_have_types() -> None:
    found = Recipe(
        cost="spectral-tail", cost_options="gamma=12, noise=measured,windows=256,variance=false"
    ).options_of_cost()
    assert found == {"gamma": 12, "noise": "measured", "windows": 256, "variance": False}
    assert Recipe(method="alphaq").options_of_cost() == {}


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 3, "cost_options": "gamma=12"}, "cost-options"),
        ({"bits": 3, "costs": "costs.json"}, "costs"),
        ({"bits": 3, "progressive": "4"}, "progressive"),
        ({"method": "gemq", "bits": 2, "cost_options": "gamma"}, "cost-options"),
        ({"method": "gemq", "bits": 2, "candidates": "1,2,7"}, "candidates"),
        ({"method": "gemq", "bits": 2, "candidates": "1,2,2"}, "candidates"),
        ({"method": "gemq", "bits": 2, "candidates": "two"}, "candidates"),
        ({"method": "gemq", "bits": 2, "unit": "layer"}, "unit"),
        ({"method": "gemq", "bits": 2, "scope": "world"}, "scope"),
        ({"method": "gemq", "bits": 2, "router": "mse"}, "router"),
        ({"method": "gemq", "bits": 2, "router_epochs": 0}, "router-epochs"),
        ({"method": "gemq", "bits": 2, "router_lr": 0.0}, "router-lr"),
        ({"method": "gemq", "bits": 2, "progressive": "3,3"}, "progressive"),
        ({"method": "gemq", "bits": 2, "progressive": "3,2"}, "progressive"),
        ({"method": "gemq", "bits": 2, "progressive": "a"}, "progressive"),
        ({"method": "gemq", "size": "1GB", "progressive": "3,2"}, "progressive"),
        ({"method": "gemq", "bits": 2, "round_context": True}, "round-context"),
        ({"plan": "plan.json", "bits": 2}, "bits"),
        ({"plan": "plan.json", "cost": "fisher"}, "cost"),
    ],
)
def test_contradictions_name_the_option(options: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        Recipe(**options)
    assert caught.value.option == option

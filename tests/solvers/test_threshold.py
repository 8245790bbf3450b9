"""Thresholds against brute force and HiGHS; the check values of BitsMoE's notes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from moeq.errors import InfeasibleError
from moeq.solvers.threshold import Thresholds, Units, hull, threshold


def units(
    weights: list[float], curve: list[float], sizes: list[int], groups: list[int] | None = None, toll: int = 0
) -> Units:
    groups_U = np.array(groups if groups is not None else [0] * len(weights))
    return Units(
        weights_U=np.array(weights, dtype=np.float64),
        curve_C=np.array(curve),
        bytes_C=np.array(sizes),
        groups_U=groups_U,
        tolls_G=np.full(int(groups_U.max()) + 1, toll),
    )


def brute_force(each: Units, limit: int) -> float:
    best = np.inf
    for choice in itertools.product(range(len(each.curve_C)), repeat=len(each.weights_U)):
        used = {int(group) for group, chosen in zip(each.groups_U, choice, strict=True) if chosen}
        size = sum(int(each.bytes_C[c]) for c in choice) + sum(int(each.tolls_G[group]) for group in used)
        if size <= limit:
            best = min(best, float((each.curve_C[list(choice)] * each.weights_U).sum()))
    return best


@pytest.mark.parametrize(
    ("curve", "bits", "loss"),
    [
        ([1, 0.36, 0.147, 0.0398, 0.0232], [3, 3, 3, 2, 1, 0], 4.5368),
        ([1, 0.36, 0.117, 0.0364, 0.0120], [4, 3, 2, 2, 1, 0], 4.0904),
    ],
)
def test_the_worked_examples(curve: list[float], bits: list[int], loss: float) -> None:
    found = threshold([units([32, 16, 8, 4, 2, 1], curve, [0, 1, 2, 3, 4])], 12)
    assert found.choices[0].tolist() == bits
    assert found.objective == pytest.approx(loss, abs=5e-5)
    assert found.size == 12


def test_hull_skips_what_pays_less_than_its_neighbours() -> None:
    assert hull(np.array([1.0, 0.9, 0.1, 0.2, 0.05]), np.array([0, 1, 2, 3, 4])).candidates.tolist() == [0, 2, 4]


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(weights, st.integers(0, 20), st.integers(0, 6))
def test_never_worse_than_a_step_from_the_optimum(values: list[float], limit: int, toll: int) -> None:
    curve, sizes = [1.0, 0.36, 0.117, 0.0364], [0, 2, 3, 4]
    problem = units(values, curve, sizes, groups=[i % 2 for i in range(len(values))], toll=toll)
    found = threshold([problem], limit)
    best = brute_force(problem, limit)
    assert found.size <= limit
    assert found.bound <= best * (1 + 1e-9) + 1e-12
    assert found.objective >= best * (1 - 1e-9)
    # The first step of the best unit, and the toll it may not have been able to pay, is what rounding down can lose.
    assert found.objective <= best + 2 * max(values) * (0.64 + (toll > 0))


def as_program(classes: list[Units], limit: int) -> float:
    cost = np.concatenate([np.outer(each.weights_U, each.curve_C).reshape(-1) for each in classes])
    size = np.concatenate([np.tile(each.bytes_C, len(each.weights_U)) for each in classes])
    count = sum(len(each.weights_U) for each in classes)
    one = np.zeros((count, len(cost)))
    start = row = 0
    for each in classes:
        for _ in each.weights_U:
            one[row, start : start + len(each.curve_C)] = 1
            start, row = start + len(each.curve_C), row + 1
    found = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size, -np.inf, limit)],
        options={"mip_rel_gap": 1e-9},
    )
    return float(found.fun)


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.2, 5.0])
def test_close_to_the_integer_program_over_two_classes(bits: float) -> None:
    generator = np.random.default_rng(3)
    curve, sizes = [1.0, 0.36, 0.116, 0.035, 0.0095, 0.0006], [0, 34, 66, 98, 130, 194]
    classes = [
        units(list(generator.lognormal(0, 2, 120)), curve, sizes),
        units(list(generator.lognormal(1, 1, 80)), curve, [0, 18, 34, 50, 66, 98]),
    ]
    limit = int(bits * (120 * 32 + 80 * 16))
    found = threshold(classes, limit)
    exact = as_program(classes, limit)
    assert found.size <= limit
    assert found.bound <= exact * (1 + 1e-9)
    assert exact * (1 - 1e-9) <= found.objective <= exact * 1.01


def total(found: Thresholds) -> int:
    return sum(int(choice.astype(int).sum()) for choice in found.choices)


def test_a_group_that_would_not_repay_its_toll_is_closed_and_its_bytes_are_spent() -> None:
    problem = units([100, 90, 80, 0.001, 0.002, 0.003], [1, 0.3, 0.1], [0, 10, 20], groups=[0, 0, 0, 1, 1, 1], toll=30)
    found = threshold([problem], 90)
    assert found.choices[0].tolist() == [2, 2, 2, 0, 0, 0]
    assert found.size == 90


def test_no_more_is_bought_than_helps() -> None:
    assert total(threshold([units([0, 0, 0], [1, 0.3], [0, 1])], 100)) == 0
    assert total(threshold([units([1, 1, 1], [1, 0.3], [0, 1])], 100)) == 3


def test_equal_units_are_filled_in_order() -> None:
    assert threshold([units([1.0] * 6, [1, 0.36, 0.12], [0, 1, 2])], 8).choices[0].tolist() == [2, 2, 1, 1, 1, 1]


def test_scaling_all_weights_changes_nothing() -> None:
    values = list(np.random.default_rng(0).lognormal(0, 2, 50))
    one, other = (
        threshold([units([value * scale for value in values], [1, 0.36, 0.116], [0, 3, 5])], 120)
        for scale in (1e-12, 1e9)
    )
    assert one.choices[0].tolist() == other.choices[0].tolist()


def test_a_budget_below_the_smallest_choice_names_it() -> None:
    with pytest.raises(InfeasibleError) as caught:
        threshold([units([1, 1], [0.4, 0.1], [4, 7])], 7)
    assert caught.value.smallest == 8


def test_more_budget_never_costs_more() -> None:
    problem = units(list(np.random.default_rng(1).lognormal(0, 1, 40)), [1, 0.36, 0.116, 0.035], [0, 3, 5, 7])
    losses = [threshold([problem], limit).objective for limit in range(0, 300, 7)]
    assert losses == sorted(losses, reverse=True)

"""The acceptance tests of the papers' programs, and near-optimality at the size of real models."""

import math
import time

import numpy as np
import pytest
import solving

from moeq.solvers.problem import Problem
from moeq.solvers.registry import SOLVERS, make_solver


def greedy(costs_UC: np.ndarray, raises: int) -> float:
    """AlphaQ's exact rule for consecutive bits and convex costs: the best single step, again and again."""
    choice = np.zeros(len(costs_UC), np.int64)
    rows = np.arange(len(costs_UC))
    for _ in range(raises):
        above = np.minimum(choice + 1, costs_UC.shape[1] - 1)
        gain = costs_UC[rows, choice] - costs_UC[rows, above]
        choice[gain.argmax()] = above[gain.argmax()]
    return float(costs_UC[rows, choice].sum())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("columns", "limit", "gamma", "bits"),
    [
        (3, 6, 0, (2, 2, 2)),
        (3, 6, 1, (2, 2, 2)),
        (3, 6, 5, (3, 2, 1)),
        (3, 6, 10, (3, 2, 1)),
        (4, 7, 1, (3, 2, 2)),
        (4, 7, 5, (3, 2, 2)),
        (4, 7, 10, (4, 2, 1)),
    ],
)
def test_alphaq_examples(name: str, columns: int, limit: int, gamma: float, bits: tuple[int, ...]) -> None:
    score = (5.0 / np.array([4.0, 5.0, 6.0])) ** gamma
    for variance in (1.0, 3.9e-4):
        costs = variance * score[:, None] * 4.0 ** -np.arange(1, columns + 1)
        found = make_solver(name).solve(solving.problem(costs, [range(1, columns + 1)], limit))
        assert tuple(found.choice_U + 1) == bits


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_optimal_for_consecutive_bits_and_convex_costs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    units = 10 if seed % 2 else 7
    columns = 3 if seed % 2 else 4
    costs = np.exp(2 * generator.normal(size=(units, 1))) * 4.0 ** -np.arange(1, columns + 1)
    raises = int(generator.integers(1, units * (columns - 1)))
    asked = solving.problem(costs, [range(1, columns + 1)], units + raises)
    best, _ = solving.brute_force(asked)
    assert best is not None
    assert math.isclose(greedy(costs, raises), best, rel_tol=1e-12)
    for name in SOLVERS:
        assert math.isclose(make_solver(name).solve(asked).objective, best, rel_tol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_gemq_c2c3_holds_in_every_layer_and_more_bits_never_hurt(name: str) -> None:
    before = math.inf
    for mean in (1.5, 1.75, 2.0, 2.5):
        asked = solving.experts(4, 8, 3, mean, convex=False, shares="c2c3")
        found = make_solver(name).solve(asked)
        solving.verify(asked, found)
        for layer in np.split(found.choice_U, 4):
            assert (layer == 1).any()
            assert (layer == 2).any()
        assert found.objective <= before
        # Bits that would help are not left over: this is where absolute tolerances show first.
        assert found.size == asked.limit
        before = found.objective
    exact = make_solver("dp").solve(asked)
    assert math.isclose(found.objective, exact.objective, rel_tol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shares", ["none", "c2c3", "3:20%,2+:60%"])
@pytest.mark.parametrize("convex", [True, False])
def test_the_scale_of_costs_does_not_matter(name: str, shares: str, convex: bool) -> None:
    asked = solving.experts(4, 12, 4, 2.3, convex=convex, shares=shares, seed=5)
    first = make_solver(name).solve(asked)
    for factor in (1e6, 1e-9):
        again = make_solver(name).solve(solving.scaled(asked, factor))
        np.testing.assert_array_equal(first.choice_U, again.choice_U)
        assert math.isclose(again.objective, first.objective * factor, rel_tol=1e-12)


@pytest.mark.parametrize("shares", ["none", "c2c3", "3+:40%,2:10%"])
@pytest.mark.parametrize("convex", [True, False], ids=["convex", "plain rounding"])
@pytest.mark.parametrize("stored", [False, True], ids=["bits", "bytes"])
def test_a_real_model_is_solved_to_a_millionth(shares: str, convex: bool, stored: bool) -> None:
    asked = solving.experts(48, 384, 5, 2.5, convex=convex, shares=shares)
    if stored:
        asked = solving.in_bytes(asked, 2.5)
    started = time.process_time()
    found = make_solver("auto").solve(asked)
    took = time.process_time() - started
    solving.verify(asked, found)
    assert found.gap < 1e-6
    assert took < 5


@pytest.mark.parametrize("seed", range(12))
def test_lagrangian_is_within_a_millionth_of_the_exact_solvers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shares = ("none", "c2c3", "3+:50%", "4:20%,2+:60%")[seed % 4]
    plain = solving.experts(5, 20, 4, 2.4, convex=bool(seed % 3), shares=shares, seed=seed)
    sizes = generator.integers(1, 9, (100, 1)) * np.arange(1, 5) + generator.integers(0, 4, (100, 4))
    limit = int(sizes.min(1).sum() * 0.4 + sizes.max(1).sum() * 0.6)
    asked = Problem(costs_UC=plain.costs_UC, sizes_UC=sizes, limit=limit, shares=plain.shares)
    found = make_solver("lagrangian").solve(asked)
    solving.verify(asked, found)
    exact = make_solver("milp" if seed % 4 == 3 else "dp").solve(asked)
    assert found.bound <= exact.objective * (1 + 1e-9)
    assert exact.objective <= found.objective * (1 + 1e-9)
    assert found.objective <= exact.objective * (1 + 1e-6)


def test_two_million_units() -> None:
    generator = np.random.default_rng(0)
    weight = np.exp(2.5 * generator.standard_normal(2_000_000, np.float32))
    costs = weight[:, None] * np.float32(4.0) ** -np.arange(1, 9, dtype=np.float32)
    asked = Problem(costs_UC=costs, sizes_UC=np.arange(1, 9)[None], limit=6_600_000)
    started = time.process_time()
    found = make_solver("lagrangian").solve(asked)
    assert time.process_time() - started < 20
    solving.verify(asked, found)
    assert found.size == asked.limit
    assert found.gap < 1e-9

import numpy as np
import pytest
import solving

from moeq.solvers import lagrangian, multiplier, opened, search
from moeq.solvers.multiplier import cross, nearest
from moeq.solvers.problem import Problem
from moeq.solvers.registry import make_solver


def random_problem(seed: int) -> Problem:
    generator = np.random.default_rng(seed)
    units, columns = int(generator.integers(20, 60)), int(generator.integers(2, 5))
    costs = np.exp(2 * generator.normal(size=(units, columns)))
    sizes = generator.integers(0, 30, (units, columns) if seed % 2 else (1, columns))
    full = np.broadcast_to(sizes, costs.shape)
    limit = int(generator.integers(full.min(1).sum(), full.max(1).sum() + 1))
    return Problem(costs_UC=costs, sizes_UC=sizes, limit=limit)


def dual(asked: Problem, price: float) -> float:
    return float((asked.costs_UC + price * asked.sizes_UC).min(axis=1).sum() - price * asked.limit)


@pytest.mark.parametrize("seed", range(20))
def test_the_crossing_is_the_maximum_of_the_dual(seed: int) -> None:
    asked = random_problem(seed)
    found = cross(asked.costs_UC, asked.sizes_UC, asked.limit)
    assert found.bound == pytest.approx(dual(asked, found.multiplier), rel=1e-11)
    # The dual is piecewise linear and concave: its maximum is 0 or where two candidates of one unit are even.
    sizes_UC = np.broadcast_to(asked.sizes_UC, asked.costs_UC.shape)
    gain = asked.costs_UC[:, :, None] - asked.costs_UC[:, None]
    growth = sizes_UC[:, None] - sizes_UC[:, :, None]
    even = gain[growth > 0] / growth[growth > 0]
    best = max(dual(asked, price) for price in [0.0, *even[even > 0]])
    assert found.bound == pytest.approx(best, rel=1e-11)
    assert np.take_along_axis(sizes_UC, found.choice_U[:, None], axis=1).sum() <= asked.limit


@pytest.mark.parametrize("alike", [True, False])
def test_a_sample_only_shows_where_to_look(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = solving.experts(1, 5000, 4, 2.2)
    sizes = asked.sizes_UC if alike else np.repeat(asked.sizes_UC, 5000, axis=0)
    plain = cross(asked.costs_UC, sizes, asked.limit)
    monkeypatch.setattr(multiplier, "SAMPLED", 1000)
    monkeypatch.setattr(multiplier, "SAMPLE", 500)
    monkeypatch.setattr(multiplier, "ROWS", 700)
    sampled = cross(asked.costs_UC, sizes, asked.limit)
    assert sampled.multiplier == pytest.approx(plain.multiplier, rel=1e-9)
    np.testing.assert_array_equal(sampled.choice_U, plain.choice_U)
    # A sample that misleads costs time only.
    monkeypatch.setattr(multiplier, "SPREAD", -40.0)
    misled = cross(asked.costs_UC, sizes, asked.limit)
    np.testing.assert_array_equal(misled.choice_U, plain.choice_U)


def test_tied_units_fill_the_limit_in_order() -> None:
    found = cross(np.array([[4.0, 2.0]] * 6), np.array([[1, 4]]), 16)
    assert found.choice_U.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_regrets_are_what_forcing_an_option_costs_the_dual(seed: int) -> None:
    asked = random_problem(seed)
    at = cross(asked.costs_UC, asked.sizes_UC, asked.limit)
    options = nearest(asked.costs_UC, asked.sizes_UC, at.multiplier, at.choice_U, 25)
    assert len(options.regret_N) == 25
    assert np.all(np.diff(options.regret_N) >= 0)
    assert options.rest >= options.regret_N[-1]
    value_UC = asked.costs_UC + at.multiplier * asked.sizes_UC
    regret_UC = value_UC - value_UC.min(axis=1, keepdims=True)
    np.testing.assert_allclose(
        options.regret_N, regret_UC[options.unit_N, options.candidate_N], rtol=1e-9, atol=1e-12 * value_UC.max()
    )
    regret_UC[options.unit_N, options.candidate_N] = np.inf
    regret_UC[np.arange(len(regret_UC)), at.choice_U] = np.inf
    assert options.rest == pytest.approx(regret_UC.min(), rel=1e-9)
    cut = options.first(10)
    assert len(cut.unit_N) == 10
    assert cut.rest == options.regret_N[10]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("crippled", ["cores", "widths", "work", "counters", "gap"])
def test_bounds_stay_sound_when_the_search_is_cut_short(
    seed: int, crippled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if crippled == "cores":
        monkeypatch.setattr(lagrangian, "CORES", (2, 4))
    elif crippled == "widths":
        monkeypatch.setattr(lagrangian, "WIDTHS", (1, 2))
    elif crippled == "work":
        monkeypatch.setattr(search, "WORK", 1500)
        monkeypatch.setattr(search, "NARROW", 2)
    elif crippled == "counters":
        monkeypatch.setattr(opened, "COUNTERS", 1)
    plain = random_problem(2 * seed + 1)
    members = np.split(np.arange(len(plain.costs_UC) // 4 * 4), 4)
    last = plain.costs_UC.shape[1] - 1
    shares = [solving.share(each, (last,), 2) for each in members[: seed % 4]]
    asked = Problem(
        costs_UC=plain.costs_UC,
        sizes_UC=plain.sizes_UC,
        limit=max(plain.limit, int(np.sort(plain.sizes_UC, axis=1)[:, -2:].min(1).sum())),
        shares=tuple(shares),
    )
    exact = make_solver("dp").solve(asked)
    found = lagrangian.Lagrangian(gap=0.05 if crippled == "gap" else 1e-9).solve(asked)
    solving.verify(asked, found)
    assert found.bound <= exact.objective * (1 + 1e-9)
    assert exact.bound <= found.objective

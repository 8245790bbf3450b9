"""All solvers against enumeration."""

import math

import numpy as np
import pytest
import solving
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq.errors import InfeasibleError
from moeq.solvers.problem import Problem, Share
from moeq.solvers.registry import SOLVERS, make_solver


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 7 units, costs of three kinds (wide, falling, tied and zero), any shares."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    units = draw(st.integers(1, 7))
    columns = draw(st.integers(1, 4 if units < 6 else 3))
    shape = (units, columns)
    kind = draw(st.sampled_from(["wide", "falling", "tied"]))
    if kind == "wide":
        costs = np.exp(3 * generator.normal(size=shape)) * (generator.random(shape) > 0.1)
    elif kind == "falling":
        costs = -np.sort(-np.exp(generator.normal(size=shape)), axis=1)
    else:
        costs = generator.integers(0, 4, shape).astype(float)
    if draw(st.booleans()):
        costs = costs.astype(np.float32)
    alike = draw(st.booleans())
    sizes = generator.integers(0, 12, (1 if alike else units, columns)) * draw(st.sampled_from([1, 64]))
    shares = []
    for _ in range(draw(st.integers(0, 3))):
        count = draw(st.integers(1, units))
        shares.append(
            Share(
                members=np.sort(generator.permutation(units)[:count]),
                candidates=tuple(generator.permutation(columns)[: generator.integers(1, columns + 1)].tolist()),
                count=draw(st.integers(0, count)) if draw(st.booleans()) else draw(st.integers(0, 1)),
            )
        )
    low, high = int(np.broadcast_to(sizes.min(1), units).sum()), int(np.broadcast_to(sizes.max(1), units).sum())
    limit = draw(st.integers(low - 1, high + 1))
    return Problem(costs_UC=costs, sizes_UC=sizes, limit=limit, shares=tuple(shares))


@settings(max_examples=120)
@given(asked=problems())
def test_solvers_agree_with_enumeration(asked: Problem) -> None:
    best, smallest = solving.brute_force(asked)
    for name in SOLVERS:
        if best is None:
            with pytest.raises(InfeasibleError) as raised:
                make_solver(name).solve(asked)
            assert raised.value.smallest == smallest, name
            continue
        found = make_solver(name).solve(asked)
        solving.verify(asked, found)
        assert found.bound <= best * (1 + 1e-12), name
        assert math.isclose(found.objective, best, rel_tol=1e-9, abs_tol=1e-300), name


def test_the_smallest_limit_is_itself_feasible_and_one_less_is_not() -> None:
    sizes = [[1, 2, 3], [2, 4, 7], [1, 3, 4], [2, 2, 9]]
    costs = [[8, 4, 1]] * 4
    shares = (solving.share([0, 1, 2], (2,), 1), solving.share([1, 2, 3], (1,), 2))
    for name in SOLVERS:
        with pytest.raises(InfeasibleError) as raised:
            make_solver(name).solve(solving.problem(costs, sizes, 0, *shares))
        smallest = raised.value.smallest
        # Unit 0 at column 2 (3), unit 1 smallest (2), unit 2 and unit 3 at column 1 (3 + 2).
        assert smallest == 10
        assert "without the shares" in str(raised.value)
        assert make_solver(name).solve(solving.problem(costs, sizes, smallest, *shares)).size == smallest
        with pytest.raises(InfeasibleError, match="10"):
            make_solver(name).solve(solving.problem(costs, sizes, smallest - 1, *shares))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "shares",
    [
        (solving.share([0, 1], (1,), 3),),
        (solving.share([0, 1], (), 1),),
        (solving.share([0, 1], (0,), 1), solving.share([0, 1], (1,), 2)),
        (solving.share([0, 1], (0,), 2), solving.share([1, 2], (1,), 2)),
    ],
    ids=["too many", "nothing counts", "same group", "overlapping groups"],
)
def test_shares_that_contradict_each_other(name: str, shares: tuple[Share, ...]) -> None:
    with pytest.raises(InfeasibleError, match="contradict each other") as raised:
        make_solver(name).solve(solving.problem([[3, 1]] * 3, [[1, 2]], 1000, *shares))
    assert raised.value.smallest is None


@pytest.mark.parametrize("name", SOLVERS)
def test_costs_that_are_all_zero(name: str) -> None:
    asked = solving.problem(np.zeros((5, 3)), [[1, 2, 3]], 12, solving.share([0, 1, 2], (2,), 2))
    found = make_solver(name).solve(asked)
    solving.verify(asked, found)
    assert found.objective == found.bound == found.gap == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_costs_below_the_absolute_tolerances_of_milp_solvers(name: str) -> None:
    # Decisions worth 1e-9 .. 1e-12: unscaled, HiGHS would take any of them for optimal.
    generator = np.random.default_rng(3)
    costs = np.exp(generator.normal(size=(7, 1))) * 1e-9 * 4.0 ** -np.arange(1, 4) + 1e-3
    asked = solving.problem(costs, [[1, 2, 3]], 14)
    best, _ = solving.brute_force(asked)
    assert best is not None
    assert make_solver(name).solve(asked).objective - best <= 1e-16


@pytest.mark.parametrize("name", SOLVERS)
def test_a_unit_whose_costs_dwarf_all_others(name: str) -> None:
    costs = np.exp(np.random.default_rng(4).normal(size=(7, 1))) * 4.0 ** -np.arange(1, 4)
    costs[0] *= 1e7
    asked = solving.problem(costs, [[1, 2, 3]], 15)
    best, _ = solving.brute_force(asked)
    assert best is not None
    assert make_solver(name).solve(asked).objective == pytest.approx(best, rel=1e-14)

import numpy as np
import pytest
import solving
from scipy import optimize

from moeq.solvers.prices import tighten
from moeq.solvers.problem import Problem
from moeq.solvers.registry import make_solver
from moeq.solvers.rules import compile_rules


def relaxed(asked: Problem) -> float:
    """Optimum of the linear relaxation, all at once."""
    units, columns = asked.costs_UC.shape
    rows = [np.broadcast_to(asked.sizes_UC, asked.costs_UC.shape).ravel()]
    for each in asked.shares:
        counts = np.zeros((units, columns))
        counts[np.ix_(each.members, each.candidates)] = -1
        rows.append(counts.ravel())
    scale = 1e3 / asked.costs_UC.mean()
    result = optimize.linprog(
        asked.costs_UC.ravel() * scale,
        A_ub=np.array(rows),
        b_ub=[asked.limit, *(-each.count for each in asked.shares)],
        A_eq=np.kron(np.eye(units), np.ones(columns)),
        b_eq=np.ones(units),
        bounds=(0, 1),
    )
    return float(result.fun) / scale


@pytest.mark.parametrize("shares", ["c2c3", "3+:70%", "4:30%,3:30%,2+:80%"])
@pytest.mark.parametrize("seed", range(3))
def test_prices_prove_what_the_linear_relaxation_proves(shares: str, seed: int) -> None:
    plain = solving.experts(6, 12, 4, 3.1, convex=bool(seed), shares=shares, seed=seed)
    # One more share across layers, so that no price can be found without the others.
    across = solving.share(range(0, 72, 5), (1,), 8)
    asked = Problem(costs_UC=plain.costs_UC, sizes_UC=plain.sizes_UC, limit=plain.limit, shares=(*plain.shares, across))
    dual = tighten(asked, compile_rules(asked))
    assert np.all(dual.prices_S >= 0)
    assert dual.multiplier >= 0
    assert dual.bound == pytest.approx(relaxed(asked), rel=1e-8)


@pytest.mark.parametrize("seed", [73, 74, 92, 118, 122, 128])
def test_shares_without_a_price_are_kept_too(seed: int) -> None:
    # At the best prices these shares are met for nothing; filling the limit would break them.
    generator = np.random.default_rng(seed)
    relative = np.array(solving.PLAIN_ROUNDING[:3])
    costs = np.exp(generator.normal(size=(12, 1))) * relative * np.exp(0.1 * generator.normal(size=(12, 3)))
    sizes = generator.integers(5, 30, (12, 1)) * np.arange(1, 4) + generator.integers(0, 4, (12, 3))
    limit = int(sizes.min(1).sum() * 0.5 + sizes.max(1).sum() * 0.5)
    shares = [solving.share(range(first, first + 4), (column,), 1) for first in (0, 4, 8) for column in (0, 2)]
    asked = solving.problem(costs, sizes, limit, *shares)
    found = make_solver("lagrangian").solve(asked)
    solving.verify(asked, found)
    assert found.objective == pytest.approx(make_solver("dp").solve(asked).objective, rel=1e-9)

"""Problems with known answers, for the tests of solvers."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from moeq.solvers.problem import Problem, Share, Solution
from moeq.solvers.shares import parse_shares, shares_for

PLAIN_ROUNDING = (0.36, 0.25, 0.046, 0.010, 0.0025)
"""Relative errors of plain rounding at 1, 2, ... bits: not convex, two bits gain little over one."""


def problem(costs: object, sizes: object, limit: int, *shares: Share) -> Problem:
    return Problem(
        costs_UC=np.array(costs, dtype=np.float64),
        sizes_UC=np.array(sizes, dtype=np.int64),
        limit=limit,
        shares=shares,
    )


def share(members: object, candidates: tuple[int, ...], count: int) -> Share:
    return Share(members=np.array(members, dtype=np.int64), candidates=candidates, count=count)


def brute_force(asked: Problem) -> tuple[float | None, int | None]:
    """Least cost within the limit and the shares, and least size within the shares; None if there is none."""
    units, columns = asked.costs_UC.shape
    sizes_UC = np.broadcast_to(asked.sizes_UC, (units, columns))
    choice_XU = np.array(list(itertools.product(range(columns), repeat=units)))
    fits_X = np.ones(len(choice_XU), bool)
    for each in asked.shares:
        fits_X &= np.isin(choice_XU[:, each.members], each.candidates).sum(axis=1) >= each.count
    choice_XU = choice_XU[fits_X]
    if not len(choice_XU):
        return None, None
    rows = np.arange(units)
    size_X = sizes_UC[rows, choice_XU].sum(axis=1)
    cost_X = asked.costs_UC[rows, choice_XU].astype(np.float64).sum(axis=1)[size_X <= asked.limit]
    return (float(cost_X.min()) if len(cost_X) else None), int(size_X.min())


def verify(asked: Problem, found: Solution) -> None:
    """The solution is what it says it is."""
    rows = np.arange(len(asked.costs_UC))
    sizes_UC = np.broadcast_to(asked.sizes_UC, asked.costs_UC.shape)
    assert found.choice_U.shape == rows.shape
    assert found.size == sizes_UC[rows, found.choice_U].sum() <= asked.limit
    cost = math.fsum(asked.costs_UC[rows, found.choice_U].tolist())
    assert math.isclose(found.objective, cost, rel_tol=1e-12, abs_tol=1e-300)
    assert 0 <= found.bound <= found.objective
    for each in asked.shares:
        assert np.isin(found.choice_U[each.members], each.candidates).sum() >= each.count


def experts(
    layers: int,
    per_layer: int,
    candidates: int,
    mean: float,
    *,
    convex: bool = True,
    shares: str = "none",
    seed: int = 0,
) -> Problem:
    """Costs over about five decades, sizes 1, 2, ... bits, one group of shares per layer."""
    generator = np.random.default_rng(seed)
    units = layers * per_layer
    bits = np.arange(1, candidates + 1, dtype=np.int64)
    relative = 4.0**-bits if convex else np.array(PLAIN_ROUNDING[:candidates])
    weight = np.exp(2.5 * generator.standard_normal(units)) * 1e-6
    costs = weight[:, None] * relative * np.exp(0.05 * generator.standard_normal((units, candidates)))
    groups: list[NDArray[np.int64]] = list(np.split(np.arange(units), layers))
    return Problem(
        costs_UC=costs,
        sizes_UC=bits[None],
        limit=math.floor(mean * units),
        shares=shares_for(parse_shares(shares), bits.tolist(), groups),
    )


def in_bytes(asked: Problem, mean: float) -> Problem:
    """The same with stored bytes: 16-bit scales, zeros from two bits on, some units of another shape."""
    units, columns = asked.costs_UC.shape
    bits = np.arange(1, columns + 1)
    times = np.ones(units, np.int64)
    times[-units // 50 :] = np.random.default_rng(1).integers(1, 9, len(times[-units // 50 :]))
    sizes = times[:, None] * (360448 * bits + 22528 * np.where(bits > 1, 3, 2))
    limit = math.floor(mean * 360448 * times.sum()) + 2 * 22528 * units
    return Problem(costs_UC=asked.costs_UC, sizes_UC=sizes.astype(np.int64), limit=limit, shares=asked.shares)


def scaled(asked: Problem, factor: float) -> Problem:
    return Problem(costs_UC=asked.costs_UC * factor, sizes_UC=asked.sizes_UC, limit=asked.limit, shares=asked.shares)

"""Prices of shares: the Lagrange dual where units also earn something for what they count for. No torch here.

Legend: U units, C candidates, S shares, n members of one share.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeq.solvers import highs
from moeq.solvers.core import open_core, scale_of
from moeq.solvers.multiplier import ROUNDING, Choice, block_sizes, blocks, cross, nearest, priced, take
from moeq.solvers.problem import Problem
from moeq.solvers.rules import Rules, chosen

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SWEEPS = 6
"""Rounds of guessing prices one after the other."""
ROUNDS = 40
"""Linear programs solved at most."""
OPTIONS = 4000
"""Options of the first linear program."""
CLOSE = 1e-11
"""Relative difference between a linear program and the dual that is small enough."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dual:
    """Prices, and what they prove.

    Attributes:
        multiplier: price of one unit of size.
        prices_S: what one unit that counts for a share earns.
        choice_U: what units take at these prices; it need not fit.
        bound: no choice within the limit and the shares costs less.
        costs_UC: costs less what the choices earn.
    """

    multiplier: float
    prices_S: Floats
    choice_U: Choice
    bound: float
    costs_UC: NDArray[np.floating[Any]]


def dual_of(problem: Problem, rules: Rules, multiplier: float, prices_S: Floats) -> Dual:
    """The dual at given prices: a sound bound whatever the prices, as long as none is negative."""
    costs_UC = problem.costs_UC - rules.credit(prices_S)
    line = take(costs_UC, problem.sizes_UC, multiplier)
    earned = float(prices_S @ rules.counts_S)
    value = line.cost + multiplier * (line.size - problem.limit) + earned
    magnitude = abs(line.cost) + 2 * earned + multiplier * max(line.size, problem.limit)
    return Dual(
        multiplier=multiplier,
        prices_S=prices_S,
        choice_U=line.choice_A,
        bound=value - ROUNDING * magnitude,
        costs_UC=costs_UC,
    )


def tighten(problem: Problem, rules: Rules) -> Dual:
    """Prices that make the bound as large as any prices can, within `CLOSE`.

    First one price after the other. Then linear programs over the options near the margin, whose dual
    prices are tried on all options; options that these make attractive join the next program, until
    there are none (column generation).
    """
    dual = _guess(problem, rules)
    near = nearest(dual.costs_UC, problem.sizes_UC, dual.multiplier, dual.choice_U, problem.costs_UC.size)
    if not len(near.unit_N):
        return dual
    count = OPTIONS
    scale = scale_of(problem, dual.multiplier)
    base_U = dual.choice_U.astype(np.int64)
    units = np.arange(len(base_U))
    totals = (
        float(chosen(problem.costs_UC, base_U).sum(dtype=np.float64)),
        int(chosen(problem.sizes_UC, base_U).sum()),
    )
    open_UC = np.zeros(problem.costs_UC.shape, bool)
    open_UC[near.unit_N[:count], near.candidate_N[:count]] = True
    for _ in range(ROUNDS):
        unit_N, candidate_N = np.nonzero(open_UC)
        core = open_core(problem, rules, base_U, totals, (unit_N, candidate_N), scale)
        prices = highs.relax(core.program)
        if prices is None:
            if count >= len(near.unit_N):
                break
            count *= 8
            open_UC[near.unit_N[:count], near.candidate_N[:count]] = True
            continue
        prices_S = np.zeros(rules.num_shares)
        prices_S[core.share_S] = prices.need_S / core.scale
        tried = dual_of(problem, rules, prices.room / (core.scale * core.step), prices_S)
        dual = tried if tried.bound > dual.bound else dual
        value = prices.value / core.scale + core.offset
        new_U = ~(open_UC[units, tried.choice_U] | (tried.choice_U == base_U))
        if value - dual.bound <= CLOSE * abs(value) or not new_U.any():
            break
        open_UC[units[new_U], tried.choice_U[new_U]] = True
    return dual


def _guess(problem: Problem, rules: Rules) -> Dual:
    """Prices found one after the other: the multiplier, then each share's, each the best given the others."""
    prices_S = np.zeros(rules.num_shares)
    best = None
    members = rules.members_US.tocsc()
    for _ in range(SWEEPS):
        costs_UC = problem.costs_UC - rules.credit(prices_S)
        multiplier = cross(costs_UC, problem.sizes_UC, problem.limit).multiplier
        dual = dual_of(problem, rules, multiplier, prices_S)
        if best is not None and dual.bound - best.bound <= 1e-7 * abs(best.bound):
            return dual if dual.bound > best.bound else best
        best = dual
        value_UC = np.empty(costs_UC.shape)
        for block in blocks(len(value_UC)):
            value_UC[block] = priced(costs_UC[block], block_sizes(problem.sizes_UC, block), multiplier)
        prices_S = prices_S.copy()
        for share in range(rules.num_shares):
            rows = members.indices[members.indptr[share] : members.indptr[share + 1]]
            counting_C = rules.counting_SC[share] > 0
            value_nC = value_UC[rows]
            value_nC[:, counting_C] += prices_S[share]
            prices_S[share] = _price(value_nC, counting_C, int(rules.counts_S[share]))
            value_nC[:, counting_C] -= prices_S[share]
            value_UC[rows] = value_nC
    assert best is not None
    return best


def _price(value_nC: Floats, counting_C: NDArray[np.bool_], count: int) -> float:
    """The price at which just `count` members choose what counts; halfway to where one more would."""
    if counting_C.all():
        return 0.0
    regret_n = value_nC[:, counting_C].min(axis=1) - value_nC[:, ~counting_C].min(axis=1)
    last = min(count + 1, len(regret_n))
    regret_n = np.sort(np.partition(regret_n, last - 1)[:last])
    if regret_n[count - 1] <= 0:
        return 0.0
    return float(regret_n[count - 1] + regret_n[last - 1]) / 2

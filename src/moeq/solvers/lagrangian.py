"""One price for size and one for each share, then an exact look at what they leave open. No torch here.

The dual bounds every choice from below, and a choice that takes an option of regret r costs at least the
dual's value + r. So the options of small regret (the core) decide: all else keeps what the prices give
it, the core is searched exactly, and the smaller of the core's bound and of value + regret of the
nearest option outside is a proven bound for the whole.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from moeq.solvers import highs
from moeq.solvers.check import check
from moeq.solvers.core import open_core, scale_of
from moeq.solvers.multiplier import Options, cross, nearest
from moeq.solvers.opened import open_units
from moeq.solvers.prices import Dual, tighten
from moeq.solvers.problem import Problem, Solution
from moeq.solvers.rules import Rules, compile_rules, smallest
from moeq.solvers.search import WIDTHS, Task, search
from moeq.solvers.settle import solution

CORES = (1000, 8000, 64000)
"""Options of the cores tried, one after the other, while the gap is too large."""
NODES = 200
"""Nodes after which HiGHS stops, where it is asked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Priced:
    """A problem with its prices.

    Attributes:
        problem: the problem.
        rules: its shares.
        dual: the prices.
        start: what units take at them; it need not fit.
        gap: a difference in cost that is good enough.
    """

    problem: Problem
    rules: Rules
    dual: Dual
    start: Solution
    gap: float


@final
class Lagrangian:
    """For large problems: tens of thousands of units to near optimality, tens of millions closely.

    The same problem gets the same answer, also when all costs are multiplied by a constant (unless
    costs tie to the last bits). Ties go to the lower candidate, then to units in order.

    Args:
        gap: relative gap, of the objective, that is good enough.
    """

    def __init__(self, gap: float = 1e-9) -> None:
        self._gap = gap

    def solve(self, problem: Problem) -> Solution:
        """A choice, and how far from optimal it may be.

        Raises:
            ArtifactError: the costs or sizes are malformed.
            OptionError: the limit or the shares are malformed.
            InfeasibleError: nothing fits; it says the smallest limit that would.
        """
        check(problem)
        rules = compile_rules(problem)
        least_U = smallest(problem, rules)
        dual = tighten(problem, rules) if rules.num_shares else _single(problem)
        best = start = solution(problem, dual.choice_U, dual.bound)
        if start.size > problem.limit or not rules.met(start.choice_U):
            best = solution(problem, least_U, dual.bound)
        if best.gap <= self._gap:
            return best
        priced = _Priced(problem=problem, rules=rules, dual=dual, start=start, gap=self._gap * max(0.0, dual.bound))
        options = nearest(dual.costs_UC, problem.sizes_UC, dual.multiplier, dual.choice_U, CORES[-1])
        # Shares without a price hardly ever matter: they are looked at when a choice breaks them.
        tight_S = (dual.prices_S > 0) | (rules.achieved(dual.choice_U) < rules.counts_S)
        for count in CORES if len(options.regret_N) else ():
            near = options.first(count)
            found, inside, tight_S = _search(priced, best, near, tight_S)
            bound = max(best.bound, min(inside, dual.bound + near.rest))
            choice_U = best.choice_U if found is None or found.objective >= best.objective else found.choice_U
            best = solution(problem, choice_U, bound)
            # A larger core cannot raise a bound that this one does not reach.
            if best.gap <= self._gap or inside < dual.bound + near.rest or count >= len(options.regret_N):
                break
        return best


def _single(problem: Problem) -> Dual:
    """The price of size alone, where there are no shares."""
    crossing = cross(problem.costs_UC, problem.sizes_UC, problem.limit)
    return Dual(
        multiplier=crossing.multiplier,
        prices_S=np.zeros(0),
        choice_U=crossing.choice_U,
        bound=crossing.bound,
        costs_UC=problem.costs_UC,
    )


def _search(
    priced: _Priced, best: Solution, near: Options, tight_S: NDArray[np.bool_]
) -> tuple[Solution | None, float, NDArray[np.bool_]]:
    """A choice better than `best` if opening the units of `near` gives one, their bound, the shares that matter.

    Args:
        priced: the problem with its prices.
        best: the best choice known.
        near: the options to open.
        tight_S: the shares that are known to matter.
    """
    problem, dual, start = priced.problem, priced.dual, priced.start
    known = best.objective - start.objective if best is not start else math.inf
    slack = problem.limit - start.size
    while True:
        opened = open_units(problem, priced.rules, dual, near, tight_S)
        if opened.stages is None:
            return *_integer(priced, near), tight_S
        task = Task(
            stages=opened.stages,
            num_units=len(opened.unit_K),
            slack=slack,
            multiplier=dual.multiplier,
            gap=priced.gap,
        )
        # A quick look finds a choice to measure others by, without which all would be worth keeping.
        option_K, cost, inside = None, known, dual.bound
        for width in WIDTHS:
            found = search(task, cost, width)
            option_K, cost = (option_K if found.option_K is None else found.option_K), found.cost
            inside = max(inside, start.objective + found.bound)
            if found.bound >= cost - task.gap:
                break
        if option_K is None:
            return None, inside, tight_S
        choice_U = opened.applied(start.choice_U, option_K)
        broken_S = priced.rules.achieved(choice_U) < priced.rules.counts_S
        if not broken_S.any():
            return solution(problem, choice_U, dual.bound), inside, tight_S
        tight_S = tight_S | broken_S


def _integer(priced: _Priced, near: Options) -> tuple[Solution | None, float]:
    """The same by HiGHS, for shares that are entangled too much to count along."""
    problem, start = priced.problem, priced.start
    core = open_core(
        problem,
        priced.rules,
        start.choice_U,
        (start.objective, start.size),
        (near.unit_N, near.candidate_N),
        scale_of(problem, priced.dual.multiplier),
    )
    outcome = highs.solve(core.program, nodes=NODES)
    if outcome is None:
        return None, priced.dual.bound
    return solution(problem, core.applied(start.choice_U, outcome.taken_N), start.bound), core.bound(outcome)

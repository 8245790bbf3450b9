"""Integer programming by HiGHS (scipy.optimize.milp) over all units at once. No torch here."""

from typing import final

import numpy as np

from moeq.errors import OptionError
from moeq.solvers.check import check
from moeq.solvers.core import open_core, scale_of
from moeq.solvers.highs import solve
from moeq.solvers.multiplier import cross
from moeq.solvers.problem import Problem, Solution
from moeq.solvers.rules import compile_rules, smallest
from moeq.solvers.settle import solution

LARGEST = 2_000_000
"""Options (units x candidates) at most: HiGHS takes about 2 kB for each, and minutes for so many."""


@final
class Milp:
    """The program of GEMQ (section 4 of the paper), solved to optimality.

    Costs may be 1e-7 where HiGHS' tolerances are absolute 1e-6 (papers' released recipes are not optimal
    for that reason). Each unit's costs lose their minimum, and are scaled so that a decision at the
    margin is worth about 1000. HiGHS breaks ties; the same problem on the same version gets the same
    answer.

    Args:
        gap: relative gap, of the costs above each unit's minimum, at which to stop.
    """

    def __init__(self, gap: float = 0.0) -> None:
        self._gap = gap

    def solve(self, problem: Problem) -> Solution:
        """The best choice; its bound is HiGHS' own, or the Lagrange bound where that is better.

        Raises:
            ArtifactError: the costs or sizes are malformed.
            OptionError: the limit or the shares are malformed, the problem is too large, or HiGHS gave up.
            InfeasibleError: nothing fits; it says the smallest limit that would.
        """
        check(problem)
        if problem.costs_UC.size > LARGEST:
            raise OptionError(
                f"{problem.costs_UC.size} options are too many for milp, which takes {LARGEST}",
                option="solver",
                fix="choose solver auto or lagrangian",
            )
        rules = compile_rules(problem)
        start_U = smallest(problem, rules)
        crossing = cross(problem.costs_UC, problem.sizes_UC, problem.limit)
        units, columns = problem.costs_UC.shape
        everything = (np.repeat(np.arange(units), columns), np.tile(np.arange(columns), units))
        totals = solution(problem, start_U, 0.0)
        core = open_core(
            problem,
            rules,
            start_U,
            (totals.objective, totals.size),
            everything,
            scale_of(problem, crossing.multiplier),
        )
        outcome = solve(core.program, gap=self._gap)
        # The smallest choice fits, so there is an answer.
        assert outcome is not None
        best = core.applied(start_U, outcome.taken_N)
        return solution(problem, best, max(crossing.bound, core.bound(outcome)))

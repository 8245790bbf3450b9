"""A solver for any size. No torch here."""

from typing import final

from moeq.solvers.lagrangian import Lagrangian
from moeq.solvers.milp import Milp
from moeq.solvers.problem import Problem, Solution

SMALL = 1000
"""Up to this many options HiGHS gets the whole problem."""


@final
class Auto:
    """`milp` for up to `SMALL` options (units x candidates), `lagrangian` for more."""

    def solve(self, problem: Problem) -> Solution:
        """See the solver that is taken."""
        solver = Milp() if problem.costs_UC.size <= SMALL else Lagrangian()
        return solver.solve(problem)

"""The part of a problem that is still open, once the rest is fixed to a choice. No torch here.

Legend: U units, C candidates, N options (one candidate of one open unit each), S shares.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeq.solvers import highs
from moeq.solvers.problem import Problem
from moeq.solvers.rules import Rules

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DECISION = 1000.0
"""What a typical decision is worth in the costs that HiGHS gets: its tolerances are 1e-6."""


COEFFICIENT = 1e8
"""No cost is larger for HiGHS; a unit of 1e-6 of that is still 1e-14 of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Core:
    """A program over the open units of a problem.

    Attributes:
        program: the program.
        scale: its costs are the problem's times this.
        offset: what the problem's cost is above the program's, in the problem's costs.
        step: its sizes are the problem's over this.
        share_S: which share each row of the program's shares is.
    """

    program: highs.Program
    scale: float
    offset: float
    step: int
    share_S: Ints

    def bound(self, outcome: highs.Outcome) -> float:
        """The outcome's lower bound in the problem's costs."""
        return outcome.bound / self.scale + self.offset

    def applied(self, choice_U: NDArray[np.integer], taken_N: Ints) -> NDArray[np.integer]:
        """`choice_U` with the options taken."""
        choice_U = choice_U.copy()
        at = np.flatnonzero(taken_N)
        choice_U[self.program.unit_N[at]] = self.program.candidate_N[at]
        return choice_U


def scale_of(problem: Problem, multiplier: float) -> float:
    """The factor that makes typical decisions worth about `DECISION`.

    A decision at the margin moves a unit by one step of size, worth the multiplier each; where size is
    not scarce, it is worth what candidates differ in cost.
    """
    sizes_UC = problem.sizes_UC
    worth = multiplier * float(np.ptp(sizes_UC, axis=1).mean()) / max(1, sizes_UC.shape[1] - 1)
    if worth == 0:
        worth = float(np.ptp(problem.costs_UC, axis=1).mean(dtype=np.float64))
    return DECISION / worth if worth > 0 else 1.0


def open_core(
    problem: Problem,
    rules: Rules,
    choice_U: NDArray[np.integer],
    totals: tuple[float, int],
    options: tuple[Ints, Ints],
    scale: float,
) -> Core:
    """Units that have options besides their choice are open, all others keep their choice.

    Args:
        problem: the whole problem.
        rules: its shares.
        choice_U: what units take that are not open.
        totals: cost and size of `choice_U`.
        options: unit and candidate of the further options, in any order.
        scale: see `scale_of`.
    """
    columns = problem.costs_UC.shape[1]
    open_K = np.unique(options[0])
    keys = np.unique(np.concatenate([open_K * columns + choice_U[open_K], options[0] * columns + options[1]]))
    unit_N, candidate_N = np.divmod(keys, columns)
    uniform = len(problem.sizes_UC) == 1
    cost_N = problem.costs_UC[unit_N, candidate_N].astype(np.float64)
    size_N = problem.sizes_UC[0 if uniform else unit_N, candidate_N]
    start_K = np.searchsorted(unit_N, open_K)
    each_N = np.repeat(np.arange(len(open_K)), np.diff([*start_K, len(unit_N)]))
    least_cost_K = np.minimum.reduceat(cost_N, start_K)
    least_size_K = np.minimum.reduceat(size_N, start_K)
    size_N = size_N - least_size_K[each_N]
    step = max(1, int(np.gcd.reduce(size_N)))
    above_N = cost_N - least_cost_K[each_N]
    scale = min(scale, COEFFICIENT / max(float(above_N.max()), 1e-300))
    taken_N = candidate_N == choice_U[unit_N]
    fixed_size = totals[1] - int((size_N[taken_N] + least_size_K).sum())
    fixed_cost = totals[0] - float(problem.costs_UC[open_K, choice_U[open_K]].sum(dtype=np.float64))
    incidence_SN = rules.incidence(unit_N, candidate_N)
    need_S = rules.counts_S - rules.achieved(choice_U) + incidence_SN @ taken_N.astype(np.float64)
    # Rows that the fixed units satisfy alone are no rows.
    kept_S = np.flatnonzero(need_S > 0)
    return Core(
        program=highs.Program(
            unit_N=unit_N,
            candidate_N=candidate_N,
            alike_K=np.ones(len(open_K)),
            cost_N=above_N * scale,
            size_N=(size_N // step).astype(np.float64),
            room=float((problem.limit - fixed_size - int(least_size_K.sum())) // step),
            incidence_SN=incidence_SN[kept_S],
            need_S=need_S[kept_S],
        ),
        scale=scale,
        offset=fixed_cost + float(least_cost_K.sum()),
        step=step,
        share_S=kept_S,
    )

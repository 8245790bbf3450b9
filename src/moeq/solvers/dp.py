"""The exact dynamic program: least cost for every total size (GEMQ's section 4.1, for any shares). No torch here.

Legend: U units, C candidates, Q states of counters, W widths: total sizes 0 .. W - 1 in steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from moeq.errors import OptionError
from moeq.solvers.check import check
from moeq.solvers.highs import whole_steps
from moeq.solvers.multiplier import ROUNDING
from moeq.solvers.problem import Problem, Solution
from moeq.solvers.rules import Rules, compile_rules, components, smallest, transitions
from moeq.solvers.settle import solution

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEMORY = 1 << 30
"""Bytes the tables may take by default."""
WORK = 200_000_000_000
"""Table entries computed at most: some ten minutes."""
OTHERS = "choose solver auto, lagrangian or milp, or count sizes in larger steps"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """One unit.

    Attributes:
        unit: which.
        cost_C: its costs.
        width_C: its sizes, in steps above the smallest.
        moves_CQ: state of the counters after each candidate.
        begins: it is the first of its component: counters start at state 0.
        ends: it is the last: only the last state goes on.
    """

    unit: int
    cost_C: Floats
    width_C: Ints
    moves_CQ: Ints
    begins: bool
    ends: bool


@final
class Dp:
    """Exact, by a table of the least cost for every total size.

    Sizes count in steps of their greatest common divisor, above each unit's smallest. Units that share
    conditions come one after the other, and the table has one row for each state of their counters. Only
    some rows are kept; the rest is computed again on the way back.
    Of equal choices the smaller one wins, then that with lower candidates for the units that come last.

    Args:
        memory: bytes the tables may take.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory = memory

    def solve(self, problem: Problem) -> Solution:
        """The best choice; its bound is its objective, less what rounding may have added.

        Raises:
            ArtifactError: the costs or sizes are malformed.
            OptionError: the limit or the shares are malformed, or the table would be too large.
            InfeasibleError: nothing fits; it says the smallest limit that would.
        """
        check(problem)
        rules = compile_rules(problem)
        smallest(problem, rules)
        units, columns = problem.costs_UC.shape
        widths_UC, step = whole_steps(problem.sizes_UC)
        least = int(problem.sizes_UC.min(axis=1).sum()) * (units // len(problem.sizes_UC))
        most = int(widths_UC.max(axis=1).sum()) * (units // len(widths_UC))
        width = min((problem.limit - least) // step, most) + 1
        states = max((math.prod((rules.counts_S[s] + 1).tolist()) for _, s in components(rules)), default=1)
        every = max(1, math.isqrt(8 * units))
        code = np.dtype("int16" if columns * states < 1 << 15 else "int64")
        memory = width * (states * (code.itemsize * every + 24) + 8 * states * -(-units // every))
        work = width * states * units * columns
        if memory > self._memory or work > WORK:
            raise OptionError(
                f"the table would have {width} sizes x {states} states for {units} units: {memory / 2**30:.1f} GiB"
                f" of {self._memory / 2**30:.1f}, {work / 1e9:.0f} of {WORK / 1e9:.0f} billion entries",
                option="solver",
                fix=OTHERS,
            )
        steps = list(_steps(problem, rules, widths_UC))
        choice_U = _solve(steps, width, every, code)
        found = solution(problem, choice_U, math.inf)
        return solution(problem, choice_U, found.objective * (1 - ROUNDING))


def _steps(problem: Problem, rules: Rules, widths_UC: Ints) -> Iterator[_Step]:
    """The units, those of one component one after the other, then all others."""

    def make(unit: int, moves_CQ: Ints, begins: bool, ends: bool) -> _Step:
        return _Step(
            unit=unit,
            cost_C=problem.costs_UC[unit].astype(np.float64),
            width_C=widths_UC[0 if len(widths_UC) == 1 else unit],
            moves_CQ=moves_CQ,
            begins=begins,
            ends=ends,
        )

    free = np.ones(len(problem.costs_UC), bool)
    for members, shares in components(rules):
        free[members] = False
        belongs_nS = rules.members_US[members][:, shares].toarray() > 0
        kind_n, moves, _ = transitions(belongs_nS, rules.counting_SC[shares] > 0, rules.counts_S[shares])
        for at, unit in enumerate(members):
            yield make(int(unit), moves[kind_n[at]], at == 0, at == len(members) - 1)
    still = np.zeros((problem.costs_UC.shape[1], 1), np.int64)
    for unit in np.flatnonzero(free):
        yield make(int(unit), still, True, True)


def _solve(steps: list[_Step], width: int, every: int, code: np.dtype[Any]) -> Ints:
    """The best choice (U,)."""
    table_QW = np.full((1, width), np.inf)
    table_QW[0, 0] = 0
    reach, marks = 1, []
    for index, step in enumerate(steps):
        if index % every == 0:
            marks.append((table_QW, reach))
        table_QW, reach = _advance(table_QW, reach, step)
    size, state = int(table_QW[0].argmin()), 0
    choice_U = np.zeros(len(steps), np.int64)
    for first in range((len(marks) - 1) * every, -1, -every):
        block = steps[first : first + every]
        table_QW, reach = marks.pop()
        picks = []
        for step in block:
            pick_QW = np.zeros((step.moves_CQ.shape[1], width), code)
            table_QW, reach = _advance(table_QW, reach, step, pick_QW)
            picks.append(pick_QW)
        for step, pick_QW in zip(reversed(block), reversed(picks), strict=True):
            states = step.moves_CQ.shape[1]
            if step.ends:
                state = states - 1
            candidate, state = divmod(int(pick_QW[state, size]), states)
            choice_U[step.unit] = candidate
            size -= int(step.width_C[candidate])
    return choice_U


def _advance(
    table_QW: Floats, reach: int, step: _Step, pick_QW: NDArray[np.signedinteger] | None = None
) -> tuple[Floats, int]:
    """The table after one more unit, and how many of its sizes can be reached.

    `pick_QW`, if given, receives candidate * Q + state before.
    """
    states, width = step.moves_CQ.shape[1], table_QW.shape[1]
    if step.begins and states > 1:
        first_W = table_QW[0]
        table_QW = np.full((states, width), np.inf)
        table_QW[0] = first_W
    after_QW = np.full((states, width), np.inf)
    for candidate, grown in enumerate(step.width_C):
        stop = min(reach, width - int(grown))
        if stop <= 0:
            continue
        for state in range(states):
            value_W = table_QW[state, :stop] + step.cost_C[candidate]
            goal = int(step.moves_CQ[candidate, state])
            goal_W = after_QW[goal, grown : grown + stop]
            if pick_QW is not None:
                pick_QW[goal, grown : grown + stop][value_W < goal_W] = candidate * states + state
            np.minimum(goal_W, value_W, out=goal_W)
    reach = min(width, reach + int(step.width_C.max()))
    return (after_QW[-1:] if step.ends else after_QW), reach

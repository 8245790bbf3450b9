"""From a choice to a verified Solution. No torch here."""

import math

import numpy as np
from numpy.typing import NDArray

from moeq.solvers.multiplier import block_sizes, blocks
from moeq.solvers.problem import Problem, Solution
from moeq.solvers.rules import chosen

MANY = 10_000_000
"""From this many units on, choices are int8."""


def solution(problem: Problem, choice_U: NDArray[np.integer], bound: float) -> Solution:
    """A choice with its sums; the bound is clipped to the objective, which only rounding can put below it."""
    costs, size = [], 0
    for block in blocks(len(choice_U)):
        costs.append(float(chosen(problem.costs_UC[block], choice_U[block]).sum(dtype=np.float64)))
        size += int(chosen(block_sizes(problem.sizes_UC, block), choice_U[block]).sum())
    objective = math.fsum(costs)
    narrow = len(choice_U) >= MANY and problem.costs_UC.shape[1] < 128
    return Solution(
        choice_U=choice_U.astype(np.int8 if narrow else np.int64),
        objective=objective,
        bound=max(0.0, min(bound, objective)),
        size=size,
    )

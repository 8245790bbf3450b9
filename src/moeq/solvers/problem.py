"""What solvers solve: give every unit one candidate, at least cost, within a limit. No torch here.

Legend: U units, C candidates.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """At least `count` of some units must take one of some candidates (GEMQ's c2 and c3, for example).

    Attributes:
        members: indices of the units, int64.
        candidates: columns that count.
        count: how many units at least.
    """

    members: NDArray[np.int64]
    candidates: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A multiple-choice knapsack, with minimum shares.

    Attributes:
        costs_UC: predicted harm, float32 or float64, finite, not negative.
        sizes_UC: what each choice takes of the limit, int64; (1, C) when all units are alike.
        limit: the sizes chosen may add up to this.
        shares: further conditions; groups of members may overlap.
    """

    costs_UC: NDArray[np.floating]
    sizes_UC: NDArray[np.int64]
    limit: int
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A choice and how good it is.

    Attributes:
        choice_U: candidate of each unit, int64 (int8 where there are tens of millions of units).
        objective: sum of the costs chosen.
        bound: no choice within the limit costs less.
        size: sum of the sizes chosen.
    """

    choice_U: NDArray[np.integer]
    objective: float
    bound: float
    size: int

    @property
    def gap(self) -> float:
        """How much of the objective could at most be saved, relative."""
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-300)


class Solver(Protocol):
    """Solves a problem; scales costs on its own, so that tolerances cannot bite."""

    def solve(self, problem: Problem) -> Solution:
        """The best choice found.

        Raises:
            InfeasibleError: nothing fits; it says the smallest limit that would.
        """
        ...

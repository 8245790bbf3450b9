"""The units that prices leave open, made ready for the search. No torch here.

Legend: U units, C candidates, K open units, S shares, Q states of counters, N options of one unit.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeq.solvers.multiplier import Options
from moeq.solvers.prices import Dual
from moeq.solvers.problem import Problem
from moeq.solvers.rules import Rules, components, transitions
from moeq.solvers.search import COUNTERS, Piece, Stage

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """Open units.

    Attributes:
        unit_K: which units.
        candidates: candidates of each: first what it has, then others, rising.
        stages: the units for `search`; None where shares are entangled too much for it.
    """

    unit_K: Ints
    candidates: tuple[Ints, ...]
    stages: list[Stage] | None

    def applied(self, choice_U: NDArray[np.integer], option_K: Ints) -> NDArray[np.integer]:
        """`choice_U` with these options."""
        choice_U = choice_U.copy()
        choice_U[self.unit_K] = [each[option] for each, option in zip(self.candidates, option_K, strict=True)]
        return choice_U


def open_units(problem: Problem, rules: Rules, dual: Dual, near: Options, tight_S: NDArray[np.bool_]) -> Opened:
    """Open the units that have options in `near`.

    Args:
        problem: the whole problem.
        rules: its shares.
        dual: prices, and what all units take at them.
        near: the options to open.
        tight_S: which shares to keep an eye on; those that the other units meet alone are left out too.
    """
    order = np.lexsort((near.candidate_N, near.unit_N))
    unit_K, first_K = np.unique(near.unit_N[order], return_index=True)
    has_K = dual.choice_U[unit_K].astype(np.int64)
    others = np.split(near.candidate_N[order], first_K[1:])
    candidates = tuple(np.concatenate([[has], other]) for has, other in zip(has_K, others, strict=True))
    now_SK = rules.incidence(unit_K, has_K)
    need_S = rules.counts_S - rules.achieved(dual.choice_U) + np.asarray(now_SK.sum(axis=1)).ravel().astype(np.int64)
    kept_S = np.flatnonzero(tight_S & (need_S > 0))
    inner = Rules(
        members_US=rules.members_US[unit_K][:, kept_S] if len(kept_S) else rules.members_US[:0, :0],
        counting_SC=rules.counting_SC[kept_S],
        counts_S=need_S[kept_S],
    )
    prices_S = dual.prices_S[kept_S]
    stages: list[Stage] = []
    grouped = np.zeros(len(unit_K), bool)
    for members, shares in components(inner):
        counts = inner.counts_S[shares]
        if math.prod(int(count) + 1 for count in counts) > COUNTERS:
            return Opened(unit_K=unit_K, candidates=candidates, stages=None)
        grouped[members] = True
        belongs_nS = inner.members_US[members][:, shares].toarray() > 0
        counting_SC = inner.counting_SC[shares] > 0
        kind_n, moves, counters_QS = transitions(belongs_nS, counting_SC, counts)
        pieces = []
        for member, kind, belongs_S in zip(members, kind_n, belongs_nS, strict=True):
            earned_C = (prices_S[shares] * belongs_S) @ counting_SC
            pieces.append(
                (int(member), _piece(problem, dual, unit_K[member], candidates[member], earned_C, moves[kind]))
            )
        pieces.sort(key=lambda pair: float(pair[1].regret_N[1:].min()))
        stages.append(Stage(pieces=tuple(pieces), credit_Q=counters_QS @ prices_S[shares]))
    earned_C, still = np.zeros(problem.costs_UC.shape[1]), np.zeros((problem.costs_UC.shape[1], 1), np.int64)
    single = [
        (int(at), _piece(problem, dual, unit_K[at], candidates[at], earned_C, still)) for at in np.flatnonzero(~grouped)
    ]
    single.sort(key=lambda pair: float(pair[1].regret_N[1:].min()))
    stages.extend(Stage(pieces=(pair,), credit_Q=np.zeros(1)) for pair in single)
    return Opened(unit_K=unit_K, candidates=candidates, stages=stages)


def _piece(problem: Problem, dual: Dual, unit: int, candidate_N: Ints, earned_C: Floats, moves_CQ: Ints) -> Piece:
    sizes_C = problem.sizes_UC[0 if len(problem.sizes_UC) == 1 else unit]
    growth_N = sizes_C[candidate_N] - sizes_C[candidate_N[0]]
    cost_N = problem.costs_UC[unit][candidate_N].astype(np.float64)
    cost_N -= cost_N[0]
    value_N = cost_N + dual.multiplier * growth_N - earned_C[candidate_N]
    least = float(value_N.min())
    return Piece(
        growth_N=growth_N, cost_N=cost_N, regret_N=value_N - least, least=least, moves_NQ=moves_CQ[candidate_N]
    )

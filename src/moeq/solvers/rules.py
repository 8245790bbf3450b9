"""Shares in matrix form, and the smallest choice that satisfies them. No torch here.

Legend: U units, C candidates, S shares, n members of one component of shares.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from moeq.errors import InfeasibleError
from moeq.solvers import highs
from moeq.solvers.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rules:
    """All shares of a problem.

    Attributes:
        members_US: 1 where a unit belongs to a share, sparse by unit.
        counting_SC: 1 where a candidate counts for a share.
        counts_S: how many units must.
    """

    members_US: sparse.csr_matrix
    counting_SC: Floats
    counts_S: Ints

    @property
    def num_shares(self) -> int:
        """How many shares there are."""
        return len(self.counts_S)

    def achieved(self, choice_U: NDArray[np.integer]) -> Ints:
        """How many units count for each share (S,) under a choice."""
        if not self.num_shares:
            return np.zeros(0, np.int64)
        pairs = self.members_US.tocoo()
        counts = self.counting_SC[pairs.col, choice_U[pairs.row]]
        return np.bincount(pairs.col, counts, self.num_shares).astype(np.int64)

    def met(self, choice_U: NDArray[np.integer]) -> bool:
        """Whether a choice satisfies all shares."""
        return bool(np.all(self.achieved(choice_U) >= self.counts_S))

    def credit(self, prices_S: Floats) -> Floats:
        """What each choice (U, C) earns if every unit that counts for a share earns its price."""
        return self.members_US @ (prices_S[:, None] * self.counting_SC)

    def incidence(self, unit_N: Ints, candidate_N: Ints) -> sparse.csr_matrix:
        """Which options (N, given as unit and candidate) count for which share, (S, N)."""
        if not self.num_shares:
            return sparse.csr_matrix((0, len(unit_N)))
        pairs = self.members_US[unit_N].tocoo()
        counts = self.counting_SC[pairs.col, candidate_N[pairs.row]]
        kept = counts > 0
        return sparse.csr_matrix(
            (counts[kept], (pairs.col[kept], pairs.row[kept])), shape=(self.num_shares, len(unit_N))
        )


def compile_rules(problem: Problem) -> Rules:
    """The shares of `problem` in matrix form; those that ask for nothing are left out."""
    units, columns = problem.costs_UC.shape
    shares = [share for share in problem.shares if share.count > 0]
    counting_SC = np.zeros((len(shares), columns))
    for row, share in enumerate(shares):
        counting_SC[row, list(share.candidates)] = 1
    rows = np.concatenate([np.zeros(0, np.int64), *(share.members for share in shares)])
    cols = np.repeat(np.arange(len(shares)), [len(share.members) for share in shares])
    # Without shares an index of U rows would only cost memory.
    shape = (units if shares else 0, len(shares))
    return Rules(
        members_US=sparse.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=shape),
        counting_SC=counting_SC,
        counts_S=np.array([share.count for share in shares], np.int64),
    )


def chosen(table_UC: NDArray[Any], choice_U: NDArray[np.integer]) -> NDArray[Any]:
    """The entries (U,) that a choice picks from a table (U, C), or (1, C) if all units are alike."""
    if len(table_UC) == 1:
        return table_UC[0][choice_U]
    return table_UC.reshape(-1)[np.arange(0, table_UC.size, table_UC.shape[1]) + choice_U]


def components(rules: Rules) -> list[tuple[Ints, Ints]]:
    """(units, shares) of each set of shares that are connected by common members."""
    if not rules.num_shares:
        return []
    members_US = rules.members_US
    number, label_S = connected_components(members_US.T @ members_US, directed=False)
    pairs = members_US.tocoo()
    found = []
    order = np.argsort(label_S[pairs.col], kind="stable")
    cuts = np.searchsorted(label_S[pairs.col][order], np.arange(number + 1))
    shares = np.argsort(label_S, kind="stable")
    share_cuts = np.searchsorted(label_S[shares], np.arange(number + 1))
    for index in range(number):
        units = np.unique(pairs.row[order[cuts[index] : cuts[index + 1]]]).astype(np.int64)
        found.append((units, shares[share_cuts[index] : share_cuts[index + 1]].astype(np.int64)))
    return found


def smallest(problem: Problem, rules: Rules) -> Ints:
    """The choice (U,) of least total size that satisfies all shares; ties go to the lower candidate.

    Raises:
        InfeasibleError: the shares contradict each other, or the limit is below the least total size.
    """
    sizes_UC = problem.sizes_UC
    units = len(problem.costs_UC)
    least_U = np.broadcast_to(sizes_UC.argmin(axis=1), units)
    plain = total = int(sizes_UC.min(axis=1).sum()) * (units // len(sizes_UC))
    missing_S = rules.achieved(least_U) < rules.counts_S
    if missing_S.any():
        least_U = least_U.copy()
        # Layers are alike: what one needs, the next needs too.
        known: dict[bytes, Ints] = {}
        for members, shares in components(rules):
            if missing_S[shares].any():
                least_U[members] = _cheapest(problem, rules, members, shares, known)
        total = int(chosen(sizes_UC, least_U).sum())
    if total > problem.limit:
        shares_too = f" ({plain} without the shares)" if total > plain else ""
        raise InfeasibleError(
            f"no choice fits a limit of {problem.limit}: the smallest takes {total}{shares_too}",
            smallest=total,
            fix="raise the limit" + (" or ask for fewer shares" if shares_too else ", or offer smaller candidates"),
        )
    return least_U


def _cheapest(problem: Problem, rules: Rules, members: Ints, shares: Ints, known: dict[bytes, Ints]) -> Ints:
    """The choice (n,) of least total size for one component of shares; looked up, if one like it is known."""
    rows = members if len(problem.sizes_UC) > 1 else np.zeros(len(members), np.int64)
    values_nC = problem.sizes_UC[rows].astype(np.float64)
    counts = rules.counts_S[shares]
    belongs_nS = rules.members_US[members][:, shares].toarray() > 0
    counting_SC = rules.counting_SC[shares] > 0
    key = b"|".join(part.tobytes() for part in (values_nC, belongs_nS, counting_SC, counts))
    if key not in known:
        known[key] = _least(values_nC, belongs_nS, counting_SC, counts)
    return known[key]


def _least(values_nC: Floats, belongs_nS: NDArray[np.bool_], counting_SC: NDArray[np.bool_], counts: Ints) -> Ints:
    """The choice (n,) of least total value for one component of shares."""
    for share, count in enumerate(counts):
        if count > belongs_nS[:, share].sum() or not counting_SC[share].any():
            raise _contradiction(f"a share asks for {count} of {int(belongs_nS[:, share].sum())} units")
    if len(counts) == 1:
        return _forced(values_nC, counting_SC[0], int(counts[0]))
    return _shared_out(values_nC, belongs_nS, counting_SC, counts)


def _contradiction(what: str) -> InfeasibleError:
    return InfeasibleError(
        f"the shares contradict each other: {what}",
        smallest=None,
        fix="ask for fewer units, or let more candidates count",
    )


def _forced(values_nC: Floats, counting_C: NDArray[np.bool_], count: int) -> Ints:
    """One share: the units that lose least by it are the ones that count."""
    choice_n = values_nC.argmin(axis=1)
    inside_n = np.where(counting_C, values_nC, np.inf).argmin(axis=1)
    rows = np.arange(len(values_nC))
    regret_n = values_nC[rows, inside_n] - values_nC[rows, choice_n]
    first = np.argsort(regret_n, kind="stable")[:count]
    choice_n[first] = inside_n[first]
    return choice_n


def transitions(belongs_nS: NDArray[np.bool_], counting_SC: NDArray[np.bool_], counts: Ints) -> tuple[Ints, Ints, Ints]:
    """How counters move: kind of each unit (n,), kind x candidate x state -> next state, and state -> counters.

    Units of one kind belong to the same shares. A state is a mixed-radix number of counters that stop
    at their share's count; the last state satisfies all shares.
    """
    kinds, kind_n = np.unique(belongs_nS, axis=0, return_inverse=True)
    radix = counts + 1
    states = np.stack(np.unravel_index(np.arange(math.prod(radix.tolist())), tuple(radix.tolist())), axis=1)
    steps = (kinds[:, None, :] & counting_SC.T[None]).astype(np.int64)
    after = np.minimum(states[None, None] + steps[:, :, None], counts)
    moves = np.ravel_multi_index(tuple(np.moveaxis(after, -1, 0)), tuple(radix.tolist()))
    return kind_n.reshape(-1), moves, states


def _shared_out(values_nC: Floats, belongs_nS: NDArray[np.bool_], counting_SC: NDArray[np.bool_], counts: Ints) -> Ints:
    """Several shares: an integer program of how many of the units that are alike take each candidate."""
    size, columns = values_nC.shape
    _, first, kind_n, alike_K = np.unique(
        np.concatenate([values_nC, belongs_nS], axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    kinds = len(first)
    kind_N, candidate_N = np.repeat(np.arange(kinds), columns), np.tile(np.arange(columns), kinds)
    belongs_NS = belongs_nS[first][kind_N]
    steps_KC, _ = highs.whole_steps(values_nC[first].astype(np.int64))
    outcome = highs.solve(
        highs.Program(
            unit_N=kind_N,
            candidate_N=candidate_N,
            alike_K=alike_K.astype(np.float64),
            cost_N=steps_KC.ravel().astype(np.float64),
            size_N=np.zeros(len(kind_N)),
            room=0.0,
            incidence_SN=sparse.csr_matrix((belongs_NS & counting_SC.T[candidate_N]).T.astype(np.float64)),
            need_S=counts.astype(np.float64),
        )
    )
    if outcome is None:
        raise _contradiction("together they ask for more units than there are")
    choice_n = np.empty(size, np.int64)
    order = np.argsort(kind_n.reshape(-1), kind="stable")
    choice_n[order] = np.repeat(candidate_N, outcome.taken_N)
    return choice_n

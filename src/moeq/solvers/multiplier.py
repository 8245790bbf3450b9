"""One price for size: the Lagrange dual of a multiple-choice knapsack. No torch here.

For a multiplier m >= 0 every unit takes the candidate of least cost + m * size. The sum of those minima
less m * limit bounds every choice within the limit from below (weak duality); as a function of m it is
concave and piecewise linear, so its maximum lies where two lines cross: that of a choice which fits
and that of one which does not.

Legend: U units, C candidates, A units that are not settled yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeq.solvers.rules import chosen

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Choice = NDArray[np.integer[Any]]

ROWS = 1 << 14
"""Units worked on together: their costs as float64 stay in cache."""
SAMPLED = 1 << 18
"""With more units than this, a sample tells first where to look."""
SAMPLE = 1 << 15
SPREAD = 5.0
"""The sample's limit is moved by this many standard errors either way."""
STEPS = 400
ROUNDING = 2.0**-44
"""Relative error allowed for in sums of float64: pairwise sums of 2^30 terms err by less than 2^-47."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """What all units take at one multiplier.

    Attributes:
        multiplier: price of one unit of size; infinite for the smallest choice.
        choice_A: candidate of each unit.
        cost: sum of their costs.
        size: sum of their sizes.
    """

    multiplier: float
    choice_A: Choice
    cost: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Crossing:
    """Where the dual is largest.

    Attributes:
        multiplier: price of one unit of size.
        choice_U: a choice that fits: at this multiplier optimal but for the last, tied units.
        bound: the dual's value, less what rounding may have added.
    """

    multiplier: float
    choice_U: Choice
    bound: float


def blocks(length: int) -> Iterator[slice]:
    """Slices that cover `length` units."""
    for start in range(0, length, ROWS):
        yield slice(start, min(start + ROWS, length))


def block_sizes(sizes_UC: Ints, block: slice) -> Ints:
    """The sizes of a block of units; one row when all units are alike."""
    return sizes_UC if len(sizes_UC) == 1 else sizes_UC[block]


def priced(costs_AC: NDArray[np.floating[Any]], sizes_AC: Ints, multiplier: float) -> Floats:
    """cost + multiplier * size; for an infinite multiplier the cost where size is least, else infinity."""
    if multiplier == np.inf:
        return np.where(sizes_AC == sizes_AC.min(axis=1, keepdims=True), costs_AC.astype(np.float64), np.inf)
    return costs_AC + multiplier * sizes_AC


def take(costs_AC: NDArray[np.floating[Any]], sizes_AC: Ints, multiplier: float) -> Line:
    """What units take at `multiplier`; ties go to the lower candidate."""
    choice_A: Choice = np.empty(len(costs_AC), np.dtype(np.int8 if costs_AC.shape[1] < 128 else np.int64))
    cost, size = [], 0
    for block in blocks(len(costs_AC)):
        sizes = block_sizes(sizes_AC, block)
        choice = priced(costs_AC[block], sizes, multiplier).argmin(axis=1)
        choice_A[block] = choice
        cost.append(chosen(costs_AC[block], choice).sum(dtype=np.float64))
        size += int(chosen(sizes, choice).sum())
    return Line(multiplier=multiplier, choice_A=choice_A, cost=float(np.sum(cost)), size=size)


def cross(costs_UC: NDArray[np.floating[Any]], sizes_UC: Ints, limit: int) -> Crossing:
    """Maximize the dual, and fill the limit with what is tied there.

    Units that take the same candidate at both ends of the bracket of multipliers take it everywhere
    between: they are settled, so that each step looks at fewer units.

    Args:
        costs_UC: costs; here, any sign will do.
        sizes_UC: sizes, (1, C) when all units are alike.
        limit: at least the sum of the smallest sizes.
    """
    over, fits = _ends(costs_UC, sizes_UC, limit)
    if over is None:
        return Crossing(multiplier=0.0, choice_U=fits.choice_A, bound=fits.cost - ROUNDING * abs(fits.cost))
    bracket = _Bracket(costs_AC=costs_UC, sizes_AC=sizes_UC, index_A=None, cost=0.0, room=limit, over=over, fits=fits)
    choice_U = fits.choice_A.copy()
    for step in range(STEPS):
        bracket = _settle(bracket, choice_U)
        over, fits = bracket.over, bracket.fits
        crossing = (fits.cost - over.cost) / (over.size - fits.size)
        exact = step % 2 == 0
        multiplier = crossing if exact else _between(over.multiplier, fits.multiplier, crossing)
        line = take(bracket.costs_AC, bracket.sizes_AC, multiplier)
        if exact and _tied(line, over):
            break
        bracket = replace(bracket, over=line) if line.size > bracket.room else replace(bracket, fits=line)
    index_A = slice(None) if bracket.index_A is None else bracket.index_A
    choice_U[index_A] = _filled(bracket)
    bound = bracket.cost + line.cost + line.multiplier * (line.size - bracket.room)
    magnitude = abs(bracket.cost) + abs(line.cost) + line.multiplier * limit
    return Crossing(multiplier=line.multiplier, choice_U=choice_U, bound=bound - ROUNDING * magnitude)


def _ends(costs_UC: NDArray[np.floating[Any]], sizes_UC: Ints, limit: int) -> tuple[Line | None, Line]:
    """A line that takes more than the limit (None if none does that costs least) and one that fits."""
    over = fits = None
    for probe in _probes(costs_UC, sizes_UC, limit):
        line = take(costs_UC, sizes_UC, probe)
        over, fits = (line, fits) if line.size > limit else (over, line)
    if over is None:
        line = take(costs_UC, sizes_UC, 0.0)
        if line.size <= limit:
            return None, line
        over = line
    return over, take(costs_UC, sizes_UC, np.inf) if fits is None else fits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bracket:
    """The units not settled yet, between a line that takes too much and one that fits.

    Attributes:
        costs_AC: their costs.
        sizes_AC: their sizes.
        index_A: which units they are; None for all.
        cost: costs of the settled units.
        room: what these units may take.
        over: takes more than `room`; its multiplier is the lower one.
        fits: takes at most `room`.
    """

    costs_AC: NDArray[np.floating[Any]]
    sizes_AC: Ints
    index_A: Ints | None
    cost: float
    room: int
    over: Line
    fits: Line


def _settle(bracket: _Bracket, choice_U: Choice) -> _Bracket:
    """The bracket without the units that agree at both ends, whose choice is written to `choice_U`."""
    differ_A = bracket.over.choice_A != bracket.fits.choice_A
    if differ_A.mean() > 0.7:
        return bracket
    cost, size = _sums(bracket.costs_AC, bracket.sizes_AC, bracket.fits.choice_A, ~differ_A)
    if bracket.index_A is None:
        choice_U[:] = bracket.fits.choice_A
        index_A = np.flatnonzero(differ_A)
    else:
        choice_U[bracket.index_A] = bracket.fits.choice_A
        index_A = bracket.index_A[differ_A]
    costs_AC = bracket.costs_AC[differ_A]
    sizes_AC = bracket.sizes_AC if len(bracket.sizes_AC) == 1 else bracket.sizes_AC[differ_A]

    def rest(line: Line) -> Line:
        choice_A = line.choice_A[differ_A]
        cost, size = _sums(costs_AC, sizes_AC, choice_A, slice(None))
        return Line(multiplier=line.multiplier, choice_A=choice_A, cost=cost, size=size)

    return _Bracket(
        costs_AC=costs_AC,
        sizes_AC=sizes_AC,
        index_A=index_A,
        cost=bracket.cost + cost,
        room=bracket.room - size,
        over=rest(bracket.over),
        fits=rest(bracket.fits),
    )


def _sums(
    costs_AC: NDArray[np.floating[Any]], sizes_AC: Ints, choice_A: Choice, kept_A: NDArray[np.bool_] | slice
) -> tuple[float, int]:
    """Cost and size of some units under a choice."""
    cost, size = [0.0], 0
    for block in blocks(len(costs_AC)):
        kept = kept_A[block] if isinstance(kept_A, np.ndarray) else kept_A
        cost.append(chosen(costs_AC[block], choice_A[block])[kept].sum(dtype=np.float64))
        size += int(chosen(block_sizes(sizes_AC, block), choice_A[block])[kept].sum())
    return float(np.sum(cost)), size


def _between(low: float, high: float, crossing: float) -> float:
    """A multiplier that halves the bracket on a logarithmic scale."""
    if high == np.inf:
        return 4096 * crossing
    return float(np.sqrt(low * high)) if low > 0 else high / 4096


def _tied(line: Line, over: Line) -> bool:
    """Whether the line at the crossing is no better than the lines that cross there."""
    best = line.cost + line.multiplier * line.size
    ends = over.cost + line.multiplier * over.size
    return best >= ends - ROUNDING * (abs(ends) + line.multiplier * over.size)


def _filled(bracket: _Bracket) -> Choice:
    """The choice that fits, with tied units moved to the larger candidate while there is room, in order."""
    choice_A = bracket.fits.choice_A.copy()
    larger_A = bracket.over.choice_A
    left = bracket.room - bracket.fits.size
    growth_A = chosen(bracket.sizes_AC, larger_A).astype(np.int64) - chosen(bracket.sizes_AC, choice_A)
    gain_A = chosen(bracket.costs_AC, choice_A) - chosen(bracket.costs_AC, larger_A)
    waiting = np.flatnonzero((growth_A > 0) & (gain_A > 0))
    while True:
        waiting = waiting[growth_A[waiting] <= left]
        if not waiting.size:
            return choice_A
        taken = int(np.searchsorted(np.cumsum(growth_A[waiting]), left, side="right"))
        choice_A[waiting[:taken]] = larger_A[waiting[:taken]]
        left -= int(growth_A[waiting[:taken]].sum())
        waiting = waiting[taken:]


def _probes(costs_UC: NDArray[np.floating[Any]], sizes_UC: Ints, limit: int) -> Iterator[float]:
    """Two multipliers that very likely lie close around the crossing, from a sample of many units."""
    units = len(costs_UC)
    if units <= SAMPLED:
        return
    # Without replacement a stride would do, but layers repeat with a period.
    sample = np.sort(np.random.default_rng(0).integers(units, size=SAMPLE))
    costs, sizes = costs_UC[sample], sizes_UC if len(sizes_UC) == 1 else sizes_UC[sample]
    least = int(np.broadcast_to(sizes.min(axis=1), SAMPLE).sum())
    middle = max(least, round(limit / units * SAMPLE))
    spread = float(np.std(chosen(sizes, cross(costs, sizes, middle).choice_U))) * SPREAD * SAMPLE**0.5
    for moved in (middle + spread, middle - spread):
        yield cross(costs, sizes, max(least, round(moved))).multiplier


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Options:
    """Candidates that a choice did not take, those that cost least to switch to first.

    Attributes:
        unit_N: unit.
        candidate_N: candidate.
        regret_N: how much the dual's value rises if the unit must take it; rising.
        rest: every option not listed has at least this regret.
    """

    unit_N: Ints
    candidate_N: Ints
    regret_N: Floats
    rest: float

    def first(self, count: int) -> "Options":
        """Only the first `count`."""
        if count >= len(self.regret_N):
            return self
        return Options(
            unit_N=self.unit_N[:count],
            candidate_N=self.candidate_N[:count],
            regret_N=self.regret_N[:count],
            rest=float(self.regret_N[count]),
        )


def nearest(
    costs_UC: NDArray[np.floating[Any]], sizes_UC: Ints, multiplier: float, choice_U: Choice, count: int
) -> Options:
    """The `count` options of least regret at a multiplier that `choice_U` does not take.

    Any choice that takes an option of regret r costs at least the dual's value + r.
    """
    columns = costs_UC.shape[1]
    keys, regrets, rest = [np.zeros(0, np.int64)], [np.zeros(0)], np.inf
    held = 0
    for block in blocks(len(costs_UC)):
        value = priced(costs_UC[block], block_sizes(sizes_UC, block), multiplier)
        # Less what the choice has: hardly more than the least, so that the regret is never overstated.
        at = np.arange(0, value.size, columns) + choice_U[block]
        flat = value.ravel()
        value -= flat[at][:, None]
        flat[at] = np.inf
        near = np.flatnonzero(flat < rest)
        keys.append(near + block.start * columns)
        regrets.append(flat[near])
        held += len(near)
        if held > 4 * count or block.stop == len(costs_UC):
            key, regret = np.concatenate(keys), np.concatenate(regrets)
            order = np.lexsort((key, regret))
            order = order[np.isfinite(regret[order])]
            if len(order) > count:
                rest = float(regret[order[count]])
            order = order[:count]
            keys, regrets, held = [key[order]], [regret[order]], len(order)
    unit_N, candidate_N = np.divmod(keys[0], columns)
    return Options(unit_N=unit_N, candidate_N=candidate_N, regret_N=regrets[0], rest=rest)

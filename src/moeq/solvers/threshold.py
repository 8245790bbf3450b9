"""Widths for tens of millions of units whose costs differ by a factor only: thresholds on that factor. No torch here.

Every unit u costs w_u D(b) at width b, with one curve D for all units of a class. At a price mu per byte, the best
width on the lower hull of (bytes, D) is the largest one whose step is worth it, w_u >= mu * slope: a threshold on w_u
(BitsMoE notes, section 4). Budgets are met by bisecting mu, over sorted factors; what is left over buys the best
remaining steps. A plan between two neighbouring steps of the hull is optimal up to one step.

A class may also have a toll: bytes that are due once a group of its units (a basis direction, over all experts) has
any unit above width 0. Groups whose units would not repay their toll at the price are closed, which returns it.

Legend: M classes, U units of a class, C widths, G groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moeq.errors import InfeasibleError

STEPS: Final = 96
"""Bisections of the price: from the range of floats down to neighbours."""
ROUNDS: Final = 8
"""Times the closed groups are decided anew, at most; they settle after a few."""


LAST_LOOKS: Final = 10_000
"""Steps that are looked at one by one for what is left in the end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Units:
    """Units with one curve.

    Attributes:
        weights_U: factors, not negative, float32 or float64.
        curve_C: D, by candidate; not negative.
        bytes_C: what a candidate takes, int64; the first must be the smallest.
        groups_U: the group of each unit, int64, below `len(tolls_G)`.
        tolls_G: bytes of each group that has a unit above the first candidate.
    """

    weights_U: NDArray[np.floating]
    curve_C: NDArray[np.float64]
    bytes_C: NDArray[np.int64]
    groups_U: NDArray[np.integer]
    tolls_G: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Thresholds:
    """What was chosen.

    Attributes:
        choices: class -> candidate of each unit, uint8.
        objective: sum of costs.
        bound: no choice within the limit costs less.
        size: bytes, tolls included.
    """

    choices: tuple[NDArray[np.uint8], ...]
    objective: float
    bound: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Hull:
    """The steps of a class worth taking: from `base` up, each cheaper per gain than the next.

    Attributes:
        candidates: candidate after each number of steps, the first one included.
        gains: fall of D by each step.
        sizes: bytes of each step.
    """

    candidates: NDArray[np.int64]
    gains: NDArray[np.float64]
    sizes: NDArray[np.int64]

    @property
    def slopes(self) -> NDArray[np.float64]:
        """Bytes per fall of D, rising: a unit takes a step if its weight is at least the price times this."""
        return self.sizes / self.gains


def hull(curve_C: NDArray[np.float64], bytes_C: NDArray[np.int64]) -> _Hull:
    """The lower convex hull of a curve over bytes."""
    points = [0]
    for c in np.argsort(bytes_C, kind="stable"):
        if curve_C[c] >= curve_C[points[-1]] or bytes_C[c] <= bytes_C[points[-1]]:
            continue
        while len(points) > 1:
            a, b = points[-2], points[-1]
            before = (curve_C[a] - curve_C[b]) * (bytes_C[c] - bytes_C[b])
            after = (curve_C[b] - curve_C[c]) * (bytes_C[b] - bytes_C[a])
            if before > after:
                break
            points.pop()
        points.append(int(c))
    index = np.array(points)
    return _Hull(candidates=index, gains=-np.diff(curve_C[index]), sizes=np.diff(bytes_C[index]))


def threshold(classes: Sequence[Units], limit: int) -> Thresholds:
    """Spend `limit` bytes.

    Args:
        classes: the units; all weights zero is fine, then nothing above the first candidate is bought.
        limit: bytes for all choices and tolls.

    Raises:
        InfeasibleError: even the first candidates do not fit; it says the smallest limit that would.
    """
    least = sum(int(each.bytes_C[0]) * len(each.weights_U) for each in classes)
    if least > limit:
        raise InfeasibleError("the budget is too small", smallest=least)
    hulls = [hull(each.curve_C, each.bytes_C) for each in classes]
    open_groups = [np.ones(len(each.tolls_G), dtype=bool) for each in classes]
    best: Thresholds | None = None
    bound = 0.0
    for _ in range(ROUNDS):
        found, price = _solve(classes, hulls, open_groups, limit)
        if found is not None and (best is None or found.objective < best.objective):
            best = found
        worth = [_worth(*each, price) for each in zip(classes, hulls, strict=True)]
        bound = max(bound, _dual(classes, worth, price, limit))
        again = [value_G > price * each.tolls_G for value_G, each in zip(worth, classes, strict=True)]
        if all(np.array_equal(old, new) for old, new in zip(open_groups, again, strict=True)):
            break
        open_groups = again
    assert best is not None
    return replace(best, bound=min(bound, best.objective))


def _steps(units: Units, curve: _Hull, price: float) -> NDArray[np.intp]:
    """How many steps each unit takes at a price; those without weight take none, even for nothing."""
    return np.searchsorted(price * curve.slopes, units.weights_U, side="right") * (units.weights_U > 0)


def _worth(units: Units, curve: _Hull, price: float) -> NDArray[np.float64]:
    """What the units of each group gain above the price of their steps."""
    steps_U = _steps(units, curve, price)
    gain = np.concatenate([[0.0], curve.gains.cumsum()])[steps_U] * units.weights_U.astype(np.float64)
    paid = np.concatenate([[0.0], curve.sizes.cumsum()])[steps_U] * price
    return np.bincount(units.groups_U, weights=gain - paid, minlength=len(units.tolls_G)).astype(np.float64)


def _dual(classes: Sequence[Units], worth: Sequence[NDArray[np.float64]], price: float, limit: int) -> float:
    """The Lagrangian bound: cost of the first candidates, less what groups gain net of their tolls, plus the price."""
    total = -price * limit
    for units, value_G in zip(classes, worth, strict=True):
        first = float(units.curve_C[0]) * float(units.weights_U.sum(dtype=np.float64))
        total += first + price * float(units.bytes_C[0]) * len(units.weights_U)
        total -= float(np.maximum(value_G - price * units.tolls_G, 0.0).sum())
    return total


def _solve(
    classes: Sequence[Units], hulls: Sequence[_Hull], open_groups: Sequence[NDArray[np.bool_]], limit: int
) -> tuple[Thresholds | None, float]:
    """The best choice with these groups open, and the price at which it stops."""
    inside = [
        mask_G[units.groups_U] & (units.weights_U > 0) for units, mask_G in zip(classes, open_groups, strict=True)
    ]
    sorted_weights = [np.sort(units.weights_U[mask]) for units, mask in zip(classes, inside, strict=True)]
    fixed = sum(int(units.tolls_G[mask_G].sum()) for units, mask_G in zip(classes, open_groups, strict=True))
    fixed += sum(int(units.bytes_C[0]) * len(units.weights_U) for units in classes)
    if fixed > limit:
        # Not even all tolls can be paid: a price at which the dearest groups close.
        return None, _closing_price(classes, hulls, limit)

    def size(price: float) -> int:
        total = fixed
        for weights, curve in zip(sorted_weights, hulls, strict=True):
            first = np.searchsorted(weights, price * curve.slopes, side="left")
            total += int(((len(weights) - first) * curve.sizes).sum())
        return total

    price = _bisect(size, limit, _highest(sorted_weights, hulls))
    choices, left = [], limit - size(price)
    for units, curve, mask in zip(classes, hulls, inside, strict=True):
        choices.append(np.where(mask, _steps(units, curve, price), 0))
    _spend(classes, hulls, inside, choices, left)
    return _outcome(classes, hulls, choices), price


def _highest(sorted_weights: Sequence[NDArray[np.floating]], hulls: Sequence[_Hull]) -> float:
    """A price at which nothing is bought."""
    tops = [
        float(weights[-1]) / float(curve.slopes[0])
        for weights, curve in zip(sorted_weights, hulls, strict=True)
        if len(weights) and len(curve.sizes)
    ]
    return 2.0 * max(tops, default=0.0) or 1.0


def _bisect(size: Callable[[float], int], limit: int, high: float) -> float:
    """The smallest price, up to neighbouring floats, at which `size` fits the limit."""
    if size(0.0) <= limit:
        return 0.0
    low = high * 2.0**-STEPS
    while size(low) <= limit and low > 1e-300:
        low *= 2.0**-STEPS
    for _ in range(STEPS):
        middle = float(np.sqrt(low) * np.sqrt(high))
        if not low < middle < high:
            break
        if size(middle) <= limit:
            high = middle
        else:
            low = middle
    return high


def _closing_price(classes: Sequence[Units], hulls: Sequence[_Hull], limit: int) -> float:
    """A price at which the groups that repay their tolls can be paid for."""

    def size(price: float) -> int:
        total = 0
        for units, curve in zip(classes, hulls, strict=True):
            worth_G = _worth(units, curve, price)
            open_G = worth_G > price * units.tolls_G
            steps_U = np.where(open_G[units.groups_U], _steps(units, curve, price), 0)
            total += int(units.tolls_G[open_G].sum()) + int(units.bytes_C[0]) * len(units.weights_U)
            total += int(np.concatenate([[0], curve.sizes.cumsum()])[steps_U].sum())
        return total

    return _bisect(size, limit, _highest([np.sort(each.weights_U) for each in classes], hulls))


def _spend(
    classes: Sequence[Units],
    hulls: Sequence[_Hull],
    inside: Sequence[NDArray[np.bool_]],
    choices: list[NDArray[np.intp]],
    left: int,
) -> None:
    """Buy the best next steps that fit into `left` bytes, in order of gain per byte, ties in order of units."""
    rates, owners, units_at, sizes = [], [], [], []
    for index, (units, curve, mask) in enumerate(zip(classes, hulls, inside, strict=True)):
        if not len(curve.sizes):
            continue
        open_U = np.flatnonzero(mask & (choices[index] < len(curve.sizes)))
        step_U = choices[index][open_U]
        rate_U = units.weights_U[open_U] / curve.slopes[step_U]
        # No more can be bought than the cheapest steps fit into what is left.
        most = left // int(curve.sizes.min()) + 1
        if len(rate_U) > most:
            keep = np.flatnonzero(rate_U >= np.partition(rate_U, -most)[-most])
            open_U, step_U, rate_U = open_U[keep], step_U[keep], rate_U[keep]
        rates.append(rate_U)
        owners.append(np.full(len(rate_U), index))
        units_at.append(open_U)
        sizes.append(curve.sizes[step_U])
    if not rates:
        return
    order = np.argsort(-np.concatenate(rates), kind="stable")
    owner, unit, size = (np.concatenate(part)[order] for part in (owners, units_at, sizes))
    bulk = int(np.searchsorted(size.cumsum(), left, side="right"))
    left -= int(size[:bulk].sum())
    taken = list(range(bulk))
    for offer in range(bulk, min(len(order), bulk + LAST_LOOKS)):
        if size[offer] <= left:
            taken.append(offer)
            left -= int(size[offer])
    taken_N = np.array(taken, dtype=np.int64)
    for index in range(len(classes)):
        choices[index][unit[taken_N[owner[taken_N] == index]]] += 1


def _outcome(classes: Sequence[Units], hulls: Sequence[_Hull], choices: Sequence[NDArray[np.intp]]) -> Thresholds:
    objective, size, candidates = 0.0, 0, []
    for units, curve, steps_U in zip(classes, hulls, choices, strict=True):
        chosen_U = curve.candidates[steps_U].astype(np.uint8)
        objective += float((units.curve_C[chosen_U] * units.weights_U).sum(dtype=np.float64))
        used_G = np.bincount(units.groups_U, weights=steps_U > 0, minlength=len(units.tolls_G)) > 0
        size += int(units.bytes_C[chosen_U].sum()) + int(units.tolls_G[used_G].sum())
        candidates.append(chosen_U)
    return Thresholds(choices=tuple(candidates), objective=objective, bound=0.0, size=size)

"""The best choice among a few open units, exactly: a dynamic program that forgets what cannot win. No torch here.

Start from a choice and a bound with prices. A partial choice is known by what it adds to size and to cost,
and by how far the shares of the component at hand are met. Of two that agree in the last, one that is no
smaller and no cheaper is forgotten; so is one whose bound (what the prices leave of it) reaches the best
complete choice. Units come in order of regret, shares' components first, so that the search can end as
soon as no further unit could pay. What is forgotten for lack of room lowers the bound that is returned.
Follows the core idea of Pisinger's minimal algorithm for the multiple-choice knapsack (EJOR 83, 1995).

Legend: K open units, N options of them, S shares that the rest does not meet, Q states of counters, L partial choices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WIDTHS = (300, 3_000, 50_000)
"""Partial choices kept at most after each unit: first few, for a quick look, then more."""
NARROW = WIDTHS[0]
WORK = 15_000_000
"""Partial choices looked at in all: counted, not timed, so that answers repeat."""
STEP_WORK = 500
"""What a step costs besides, in the same currency."""
COUNTERS = 1024
"""States of counters of one component at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One open unit.

    Attributes:
        growth_N: what each option adds to the size; the first is what the unit has, 0.
        cost_N: what each adds to the cost.
        regret_N: cost + multiplier * growth - prices earned, less the least of them.
        least: that least.
        moves_NQ: state of the counters after each option; (N, 1) zeros outside components.
    """

    growth_N: Ints
    cost_N: Floats
    regret_N: Floats
    least: float
    moves_NQ: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """Open units that are looked at together: those of one component, or one unit alone.

    Attributes:
        pieces: (index of the unit, unit).
        credit_Q: what the prices pay in each state of the counters; the last state meets all shares.
    """

    pieces: tuple[tuple[int, Piece], ...]
    credit_Q: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        option_K: option of each unit; None if no choice fits.
        cost: what it adds to the cost.
        bound: no choice adds less.
    """

    option_K: Ints | None
    cost: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Partials:
    """Partial choices, by state, then size; within a state cost falls as size grows."""

    growth_L: Ints
    cost_L: Floats
    state_L: Ints
    node_L: Ints


@final
class _Log:
    """How partial choices came about: a tree, in which only steps that change something are nodes."""

    def __init__(self) -> None:
        self._first = [0]
        self._steps: list[tuple[Callable[[int, Ints], None], Ints, Ints]] = []
        self._size = 1

    def add(self, write: Callable[[int, Ints], None], parents: Ints, options: Ints) -> Ints:
        """New nodes: after `parents`, `options` of a block, which `write` can spell out."""
        nodes = np.arange(self._size, self._size + len(parents))
        if len(parents):
            self._first.append(self._size)
            self._steps.append((write, parents, options.astype(np.int32)))
            self._size += len(parents)
        return nodes

    def path(self, node: int, option_K: Ints) -> None:
        """Write the options on the way to `node`."""
        while node > 0:
            index = int(np.searchsorted(self._first, node, side="right")) - 1
            write, parents, options = self._steps[index - 1]
            at = node - self._first[index]
            write(int(options[at]), option_K)
            node = int(parents[at])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What to search.

    Attributes:
        stages: components first, then single units by rising regret.
        num_units: open units.
        slack: what may be added to the size; negative if something must go.
        multiplier: price of one unit of size.
        gap: how far above the bound is good enough.
    """

    stages: list[Stage]
    num_units: int
    slack: int
    multiplier: float
    gap: float

    @property
    def floor(self) -> float:
        """What the prices say a choice adds to the cost at least."""
        least = sum(piece.least for stage in self.stages for _, piece in stage.pieces)
        return least - self.multiplier * self.slack + sum(float(stage.credit_Q[-1]) for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """One or more units that are one to the rest of the search.

    Attributes:
        growth_N: what each option adds to the size.
        cost_N: what each adds to the cost.
        offset: what is off from cost + multiplier * growth to how much an option raises the floor.
        near: how much the next best option raises the floor; minus infinity if none may be left out.
        first: options below this need no note in the log: nothing changes.
        write: writes what an option means.
        lost: what was given up inside raises the floor by at least this.
        work: partial choices looked at inside.
    """

    growth_N: Ints
    cost_N: Floats
    offset: float
    near: float
    first: int
    write: Callable[[int, Ints], None]
    lost: float = math.inf
    work: int = 0


def search(task: Task, best: float, width: int) -> Found:
    """The choice that adds least to the cost and at most `task.slack` to the size.

    Args:
        task: what to search.
        best: added cost of a choice known otherwise; infinite if none is.
        width: partial choices kept at most after each unit.
    """
    floor, slack = task.floor, task.slack
    log = _Log()
    partials = _root()
    shrink = [sum(int(piece.growth_N.min()) for _, piece in stage.pieces) for stage in task.stages]
    left, off, work = sum(shrink), 0.0, 0
    node, lost = None, math.inf
    for stage, least in zip(task.stages, shrink, strict=True):
        grouped = len(stage.credit_Q) > 1
        if not grouped:
            best, node = _complete(partials, slack, best, node)
        allowed = best - task.gap - floor
        block = _joined(stage, task.multiplier, allowed, width) if grouped else _alone(stage)
        lost = min(lost, block.lost)
        if block.near >= allowed or (not grouped and work > WORK):
            lost = min(lost, block.near)
            break
        work += STEP_WORK + block.work + len(partials.cost_L) * len(block.cost_N)
        left -= least
        off += block.offset
        grown, chosen = _extend(partials, block.growth_N, block.cost_N)
        raised_L = grown.cost_L + task.multiplier * grown.growth_L - off
        raised_L[grown.growth_L + left > slack] = math.inf
        # Out of time means fewer partial choices, not none.
        kept, dropped = _survivors(grown, raised_L, allowed, width if work <= WORK else NARROW)
        lost = min(lost, dropped)
        partials, chosen = _pick(grown, kept), chosen[kept]
        moved = chosen >= block.first
        partials.node_L[moved] = log.add(block.write, partials.node_L[moved], chosen[moved])
        if not len(kept):
            break
    best, node = _complete(partials, slack, best, node)
    option_K = None
    if node is not None:
        option_K = np.zeros(task.num_units, np.int64)
        log.path(node, option_K)
    return Found(option_K=option_K, cost=best, bound=min(best, floor + lost))


def _root() -> _Partials:
    zero = np.zeros(1, np.int64)
    return _Partials(growth_L=zero, cost_L=np.zeros(1), state_L=zero, node_L=zero)


def _alone(stage: Stage) -> _Block:
    """A unit by itself."""
    ((unit, piece),) = stage.pieces
    return _Block(
        growth_N=piece.growth_N,
        cost_N=piece.cost_N,
        offset=piece.least,
        near=float(np.min(piece.regret_N[1:], initial=math.inf)),
        first=1,
        write=_writer(unit),
    )


def _writer(unit: int) -> Callable[[int, Ints], None]:
    def write(option: int, option_K: Ints) -> None:
        option_K[unit] = option

    return write


def _joined(stage: Stage, multiplier: float, allowed: float, width: int) -> _Block:
    """The units of a component: all that they can add together while they meet its shares."""
    log = _Log()
    partials = _root()
    spent, lost, work = 0.0, math.inf, 0
    for unit, piece in stage.pieces:
        work += STEP_WORK + len(partials.cost_L) * len(piece.cost_N)
        spent += piece.least
        grown, chosen = _extend(partials, piece.growth_N, piece.cost_N, piece.moves_NQ)
        raised_L = grown.cost_L + multiplier * grown.growth_L - stage.credit_Q[grown.state_L] - spent
        kept, dropped = _survivors(grown, raised_L, allowed, width)
        lost = min(lost, dropped)
        partials, chosen = _pick(grown, kept), chosen[kept]
        moved = chosen > 0
        partials.node_L[moved] = log.add(_writer(unit), partials.node_L[moved], chosen[moved])
    partials = _pick(partials, np.flatnonzero(partials.state_L == len(stage.credit_Q) - 1))

    def write(option: int, option_K: Ints) -> None:
        log.path(int(partials.node_L[option]), option_K)

    return _Block(
        growth_N=partials.growth_L,
        cost_N=partials.cost_L,
        offset=spent + float(stage.credit_Q[-1]),
        near=-math.inf,
        first=0,
        write=write,
        lost=lost,
        work=work,
    )


def _complete(partials: _Partials, slack: int, best: float, node: int | None) -> tuple[float, int | None]:
    """The best choice so far, all other units staying as they are."""
    fits = np.flatnonzero(partials.growth_L <= slack)
    if len(fits):
        at = fits[np.argmin(partials.cost_L[fits])]
        if partials.cost_L[at] < best:
            return float(partials.cost_L[at]), int(partials.node_L[at])
    return best, node


def _extend(
    partials: _Partials, growth_N: Ints, cost_N: Floats, moves_NQ: Ints | None = None
) -> tuple[_Partials, Ints]:
    """All partial choices with each option of one more block, and which option that is."""
    options, length = len(cost_N), len(partials.cost_L)
    state_L = np.zeros(options * length, np.int64) if moves_NQ is None else moves_NQ[:, partials.state_L].ravel()
    return _Partials(
        growth_L=(partials.growth_L + growth_N[:, None]).ravel(),
        cost_L=(partials.cost_L + cost_N[:, None]).ravel(),
        state_L=state_L,
        node_L=np.tile(partials.node_L, options),
    ), np.repeat(np.arange(options), length)


def _pick(partials: _Partials, kept: Ints) -> _Partials:
    return _Partials(
        growth_L=partials.growth_L[kept],
        cost_L=partials.cost_L[kept],
        state_L=partials.state_L[kept],
        node_L=partials.node_L[kept],
    )


def _survivors(partials: _Partials, raised_L: Floats, allowed: float, width: int) -> tuple[Ints, float]:
    """Which partial choices to keep, in order, and how much those that are given up raise the floor at least.

    Those that another, kept one makes superfluous are not given up.
    """
    alive = np.flatnonzero(raised_L < allowed)
    lost = float(np.min(raised_L[raised_L >= allowed], initial=math.inf))
    rows = alive[np.argsort(partials.growth_L[alive], kind="stable")]
    state = partials.state_L[rows]
    if len(rows) and state.any():
        by_state = np.argsort(state, kind="stable")
        rows, state = rows[by_state], state[by_state]
    # Ranks, so that one running minimum serves all states: those of later states start below all others.
    rank = np.empty(len(rows), np.int64)
    rank[np.argsort(partials.cost_L[rows], kind="stable")] = np.arange(len(rows))
    rank -= state * len(rows)
    better = np.ones(len(rows), bool)
    better[1:] = rank[1:] < np.minimum.accumulate(rank)[:-1]
    rows = rows[better]
    if len(rows) > width:
        nth = np.sort(np.argsort(raised_L[rows], kind="stable")[:width])
        cut = np.ones(len(rows), bool)
        cut[nth] = False
        lost = min(lost, float(raised_L[rows[cut]].min()))
        rows = rows[nth]
    return rows, lost

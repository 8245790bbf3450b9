"""Conditions on shares of widths, as text: "c2c3", "3:1,2:1", "3+:10%". No torch here."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from moeq.errors import OptionError
from moeq.solvers.problem import Share

SYNTAX = 'write "none", "c2c3", or a list such as "3:1,2:1" or "3+:10%"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """In every group, at least so many units have some width.

    Attributes:
        bits: the width; None if `rank` says it.
        rank: 0 for the highest width there is, 1 for the second highest.
        above: larger widths count too.
        count: how many units; None if `percent` says it.
        percent: how many of a hundred units, rounded up.
    """

    bits: int | None = None
    rank: int = 0
    above: bool = False
    count: int | None = None
    percent: Fraction | None = None

    def needed(self, members: int) -> int:
        """How many of `members` units must have the width."""
        if self.count is not None:
            return self.count
        assert self.percent is not None
        return math.ceil(self.percent * members / 100)


C2C3 = (Condition(rank=1, count=1), Condition(rank=0, count=1))
"""GEMQ's constraints (c2) and (c3): a unit of the second-highest and one of the highest width in every layer."""


def parse_shares(text: str) -> tuple[Condition, ...]:
    """The conditions of `text`: "none", "c2c3", or WIDTH:COUNT, WIDTH:PERCENT%, each with WIDTH+ for "or more".

    Raises:
        OptionError: not such a text, a share above 100 %, or a width named twice.
    """
    stripped = text.strip().lower()
    if stripped in ("", "none"):
        return ()
    if stripped == "c2c3":
        return C2C3
    conditions = []
    for part in stripped.split(","):
        match = re.fullmatch(r"\s*(\d+)(\+?)\s*:\s*(\d+(?:\.\d+)?)\s*(%?)\s*", part, re.ASCII)
        if match is None or ("." in match[3] and not match[4]):
            raise _wrong(f"{part.strip()!r} is no share", SYNTAX)
        percent = Fraction(match[3]) if match[4] else None
        if percent is not None and percent > 100:
            raise _wrong(f"a share of {match[3]} % is above 100 %", "ask for at most 100 %")
        conditions.append(
            Condition(
                bits=int(match[1]),
                above=bool(match[2]),
                count=int(match[3]) if percent is None else None,
                percent=percent,
            )
        )
    if len({(condition.bits, condition.above) for condition in conditions}) < len(conditions):
        raise _wrong(f"{text.strip()!r} names a width twice", "name each width once")
    return tuple(conditions)


def shares_for(
    conditions: Sequence[Condition], bits: Sequence[int], groups: Sequence[NDArray[np.int64]]
) -> tuple[Share, ...]:
    """The shares that `conditions` mean for a problem.

    Args:
        conditions: what every group must have.
        bits: width of each candidate.
        groups: units of each group, one group per layer for example.

    Raises:
        OptionError: no candidate has the width, or a group has too few units.
    """
    widths = sorted(set(bits), reverse=True)
    resolved = [(_width(condition, widths), condition) for condition in conditions]
    shares = []
    for number, members in enumerate(groups):
        demands = [(width, each.above, each.needed(len(members))) for width, each in resolved]
        least = _least_units(demands, widths)
        if least > len(members):
            raise _wrong(
                f"the shares ask for {least} units of group {number}, which has {len(members)}",
                "ask for fewer units",
            )
        for width, above, count in demands:
            columns = tuple(at for at, each in enumerate(bits) if each == width or (above and each > width))
            if count:
                shares.append(Share(members=members, candidates=columns, count=count))
    return tuple(shares)


def _width(condition: Condition, widths: Sequence[int]) -> int:
    """The width a condition speaks of; `widths` fall."""
    if condition.bits is None:
        if condition.rank >= len(widths):
            raise _wrong("c2c3 needs candidates of two widths", 'offer another width, or write "none"')
        return widths[condition.rank]
    known = condition.bits <= widths[0] if condition.above else condition.bits in widths
    if not known:
        more = " or more" if condition.above else ""
        raise _wrong(
            f"no candidate has {condition.bits} bits{more}",
            f"name one of the widths {', '.join(str(width) for width in reversed(widths))}",
        )
    return condition.bits


def _least_units(demands: Sequence[tuple[int, bool, int]], widths: Sequence[int]) -> int:
    """How many units it takes to meet all demands (width, or more, count) of one group.

    From the highest width down: what is asked of a width alone adds to what is asked above it.
    """
    least = 0
    for width in sorted({*widths, *(width for width, _, _ in demands)}, reverse=True):
        exact = sum(count for each, above, count in demands if each == width and not above)
        least = max([least + exact, *(count for each, above, count in demands if each == width and above)])
    return least


def _wrong(message: str, fix: str) -> OptionError:
    return OptionError(message, option="shares", fix=fix)

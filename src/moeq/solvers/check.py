"""What a problem must satisfy before a solver looks at it. No torch here.

Legend: U units, C candidates.
"""

import operator

import numpy as np

from moeq.errors import ArtifactError, OptionError
from moeq.solvers.problem import Problem, Share

ROWS = 1 << 18
"""Units looked at together, so that tens of millions take little extra memory."""
EXACT = 1 << 53
"""Sizes add up to less than this, so that they stay exact as float64."""
LARGEST = 1e290
"""Costs stay below this, so that their sums stay finite."""


def check(problem: Problem) -> None:
    """Refuse a malformed problem.

    Raises:
        ArtifactError: costs or sizes of a wrong shape, type or value.
        OptionError: a limit that is no integer, or shares that name units or candidates that do not exist.
    """
    _check_costs(problem)
    _check_sizes(problem)
    try:
        operator.index(problem.limit)
    except TypeError as error:
        raise OptionError(
            f"a limit must be an integer, not {problem.limit!r}", option="bits, size", fix="round it down"
        ) from error
    for share in problem.shares:
        _check_share(share, *problem.costs_UC.shape)


def _check_costs(problem: Problem) -> None:
    costs_UC = problem.costs_UC
    if costs_UC.ndim != 2 or costs_UC.shape[0] < 1 or costs_UC.shape[1] < 1:
        raise ArtifactError(
            f"costs of shape {costs_UC.shape} are no table of units x candidates", fix="give at least one of each"
        )
    if costs_UC.dtype not in (np.float32, np.float64):
        raise ArtifactError(f"costs must be float32 or float64, not {costs_UC.dtype}", fix="convert them")
    for start in range(0, len(costs_UC), ROWS):
        rows = costs_UC[start : start + ROWS]
        # NaN fails both comparisons.
        if not (float(rows.min()) >= 0 and float(rows.max()) <= LARGEST):
            unit, candidate = np.argwhere(~((rows >= 0) & (rows.astype(np.float64) <= LARGEST)))[0]
            raise ArtifactError(
                f"the cost of unit {start + unit} under candidate {candidate} is {rows[unit, candidate]}",
                fix=f"costs must be finite, not negative and at most {LARGEST:g}: measure again",
            )


def _check_sizes(problem: Problem) -> None:
    sizes_UC = problem.sizes_UC
    units, columns = problem.costs_UC.shape
    if sizes_UC.shape not in ((units, columns), (1, columns)):
        raise ArtifactError(
            f"sizes have shape {sizes_UC.shape}, costs {(units, columns)}",
            fix=f"give sizes of shape {(units, columns)}, or {(1, columns)} when all units are alike",
        )
    if not np.issubdtype(sizes_UC.dtype, np.signedinteger):
        raise ArtifactError(f"sizes must be signed integers, not {sizes_UC.dtype}", fix="count whole bits or bytes")
    if sizes_UC.min() < 0:
        raise ArtifactError("a size is negative", fix="sizes are what a choice takes of the limit")
    if int(sizes_UC.max()) * units >= EXACT:
        raise ArtifactError(
            "the sizes add up to 2^53 or more", fix="count in a larger unit: divide all sizes by a common factor"
        )


def _check_share(share: Share, units: int, columns: int) -> None:
    fix = "make the shares for this table of costs"
    members = share.members
    if members.ndim != 1 or not np.issubdtype(members.dtype, np.integer):
        raise OptionError("the members of a share must be a list of unit numbers", option="shares", fix=fix)
    if members.size and not (members.min() >= 0 and members.max() < units):
        odd = members[(members < 0) | (members >= units)][0]
        raise OptionError(f"a share names unit {odd}, there are {units}", option="shares", fix=fix)
    if len(np.unique(members)) != len(members):
        raise OptionError("a share names a unit twice", option="shares", fix=fix)
    if not all(0 <= candidate < columns for candidate in share.candidates):
        raise OptionError(f"a share names candidates {share.candidates}, there are {columns}", option="shares", fix=fix)
    if share.count < 0:
        raise OptionError(f"a share asks for {share.count} units", option="shares", fix="ask for 0 or more")

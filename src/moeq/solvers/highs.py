"""Multiple-choice programs in the form HiGHS wants, through scipy. No torch here.

Legend: N options (one candidate of one unit each), K units or kinds of units, S shares.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse  # type: ignore[import-untyped]

from moeq.errors import OptionError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

INTEGRAL = 1e-4
"""How far from an integer a variable may be that HiGHS calls integral."""
RETRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """One option per unit, at least total cost, with `size_N` within `room` and every share met.

    Attributes:
        unit_N: which unit each option is of, not falling.
        candidate_N: which candidate it is.
        alike_K: how many units each unit stands for.
        cost_N: costs, in units in which a decision is worth about 1000, so that HiGHS' absolute
            tolerances of 1e-6 are far below it.
        size_N: sizes, integers, as small as they go.
        room: the limit.
        incidence_SN: 1 where an option counts for a share.
        need_S: how many must count.
    """

    unit_N: Ints
    candidate_N: Ints
    alike_K: Floats
    cost_N: Floats
    size_N: Floats
    room: float
    incidence_SN: sparse.csr_matrix
    need_S: Floats

    @property
    def one_each(self) -> sparse.csr_matrix:
        """1 where an option is of a unit, (K, N)."""
        rows = np.concatenate([[0], np.cumsum(np.diff(self.unit_N) > 0)])
        return sparse.csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """A solved integer program.

    Attributes:
        taken_N: how many units take each option.
        bound: HiGHS' lower bound, in the program's costs.
    """

    taken_N: Ints
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prices:
    """A solved linear relaxation.

    Attributes:
        value: its optimum, in the program's costs.
        room: what one more unit of room would save.
        need_S: what one more unit of need costs.
    """

    value: float
    room: float
    need_S: Floats


def whole_steps(sizes_UC: Ints) -> tuple[Ints, int]:
    """Sizes less the smallest of each unit, over their greatest common divisor; and that divisor."""
    steps_UC = sizes_UC - sizes_UC.min(axis=1, keepdims=True)
    step = max(1, int(np.gcd.reduce(steps_UC, axis=None)))
    return steps_UC // step, step


def solve(program: Program, *, gap: float = 0.0, nodes: int | None = None) -> Outcome | None:
    """The best choice; None if there is none, or none was found within `nodes`.

    The choice is rounded and verified. Should the rounding not fit, HiGHS is asked again for a little
    less room; the bound is that of the first answer.

    Args:
        program: what to solve.
        gap: relative gap, of the program's costs, at which to stop.
        nodes: nodes of the search tree after which to stop.

    Raises:
        OptionError: HiGHS gave up, or no answer of it is integral.
    """
    one_each = program.one_each
    room = program.room
    bound = None
    options = {"mip_rel_gap": gap, **({} if nodes is None else {"node_limit": nodes})}
    for _ in range(RETRIES):
        constraints = [
            optimize.LinearConstraint(one_each, program.alike_K, program.alike_K),
            optimize.LinearConstraint(sparse.csr_matrix(program.size_N), -np.inf, room),
        ]
        if len(program.need_S):
            constraints.append(optimize.LinearConstraint(program.incidence_SN, program.need_S, np.inf))
        result = optimize.milp(
            program.cost_N,
            integrality=np.ones(len(program.cost_N)),
            bounds=optimize.Bounds(0, np.inf),
            constraints=constraints,
            options=options,
        )
        if result.status == 2 or (result.x is None and nodes is not None and result.status == 1):
            return None
        if result.x is None:
            raise _gave_up(str(result.message))
        bound = float(result.mip_dual_bound) if bound is None else bound
        taken_N = np.rint(result.x).astype(np.int64)
        if np.abs(result.x - taken_N).max() > INTEGRAL or not np.all(one_each @ taken_N == program.alike_K):
            raise _gave_up("its answer is not integral")
        excess = float(program.size_N @ taken_N) - program.room
        if excess <= 0 and np.all(program.incidence_SN @ taken_N >= program.need_S):
            return Outcome(taken_N=taken_N, bound=bound)
        room -= max(1.0, excess)
    raise _gave_up("its answers do not fit the limit once rounded")


def _gave_up(message: str) -> OptionError:
    return OptionError(f"HiGHS found no choice: {message}", option="solver", fix="choose solver dp or lagrangian")


def relax(program: Program) -> Prices | None:
    """The linear relaxation and what its limits are worth; None if HiGHS finds no solution."""
    rows = sparse.vstack([sparse.csr_matrix(program.size_N), -program.incidence_SN], format="csr")
    one_each = program.one_each
    result = optimize.linprog(
        program.cost_N,
        A_ub=rows,
        b_ub=np.concatenate([[program.room], -program.need_S]),
        A_eq=one_each,
        b_eq=program.alike_K,
        bounds=(0, None),
        method="highs",
    )
    if result.status != 0:
        return None
    worth = np.maximum(0.0, -result.ineqlin.marginals)
    return Prices(value=float(result.fun), room=float(worth[0]), need_S=worth[1:])

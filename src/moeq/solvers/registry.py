"""All solvers by name."""

from collections.abc import Callable
from typing import Final

from moeq.errors import OptionError
from moeq.solvers.auto import Auto
from moeq.solvers.dp import Dp
from moeq.solvers.lagrangian import Lagrangian
from moeq.solvers.milp import Milp
from moeq.solvers.problem import Solver

SOLVERS: Final[dict[str, Callable[[], Solver]]] = {
    "auto": Auto,
    "milp": Milp,
    "dp": Dp,
    "lagrangian": Lagrangian,
}


def make_solver(name: str) -> Solver:
    """The solver `name`.

    Raises:
        OptionError: no such solver.
    """
    if name not in SOLVERS:
        raise OptionError(f"no solver is called {name!r}", option="solver", fix=f"choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]()

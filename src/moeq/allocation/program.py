"""From a cost table and a limit to a choice for every unit: builds the solver's problem, reads its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeq.allocation.other_linears import Row
from moeq.artifacts import CostTable, Inventory
from moeq.errors import ArtifactError, InfeasibleError
from moeq.solvers.problem import Problem, Solution
from moeq.solvers.registry import make_solver
from moeq.solvers.shares import parse_shares, shares_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How the budget may be spent.

    Attributes:
        solver: name of the solver.
        scope: "global", or "layer": each layer gets the share of the budget that its weights are of the model's.
        shares: minimum shares of widths in every layer.
        candidates: code widths that may be used.
        codes: the limit and the sizes count code bits, not stored bytes.
        dense: linears outside the experts that spend the same budget; only with scope "global", and not `codes`.
        alike: what gets one width, "layer" or "kind" of matrix in a layer; "" if every unit has its own.
    """

    solver: str
    scope: str
    shares: str
    candidates: tuple[int, ...]
    codes: bool
    dense: tuple[Row, ...] = ()
    alike: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """What was chosen.

    Attributes:
        columns: unit -> column of the table.
        dense: path of a linear of `Rules.dense` -> its choice.
        objective: predicted harm.
        bound: no choice within the rules has less.
    """

    columns: tuple[int, ...]
    dense: dict[str, int]
    objective: float
    bound: float


def choose(table: CostTable, inventory: Inventory, limit: int, rules: Rules) -> Choice:
    """Spend `limit` on the units of `table`.

    Args:
        table: costs, of this model.
        inventory: the model.
        limit: stored bytes of all units and `rules.dense`, or code bits of all units if `rules.codes`.
        rules: how.

    Raises:
        InfeasibleError: nothing fits; it says the smallest limit that would.
        ArtifactError: the table lacks the candidates asked for.
    """
    columns = _columns(table, rules.candidates)
    if rules.dense:
        # All units of a problem have as many choices: who has fewer has the last one more than once.
        columns += columns[-1:] * (max(len(row.costs) for row in rules.dense) - len(columns))
    # What must be alike is one row of the problem, the sum of its units.
    row_U = _rows(table, rules.alike)
    costs_UC = _summed(np.array(table.costs, dtype=np.float64)[:, columns], row_U)
    sizes_UC = _summed(_sizes(table, inventory, columns, rules.codes), row_U)
    dense_DC = _dense_choices(rules.dense, len(columns))
    costs_UC = np.concatenate([costs_UC, _taken([row.costs for row in rules.dense], dense_DC, np.float64)])
    sizes_UC = np.concatenate([sizes_UC, _taken([row.sizes for row in rules.dense], dense_DC, np.int64)])
    layers_U = np.array([unit.layer for unit in table.units])[np.unique(row_U, return_index=True)[1]]
    weights_U = _summed(_weights(table, inventory), row_U)
    groups = [np.flatnonzero(layers_U == layer) for layer in range(len(inventory.layers))]
    conditions = parse_shares(rules.shares)
    widths = [table.candidates[column].bits for column in columns]
    solver = make_solver(rules.solver)

    def solve(members_U: NDArray[np.int64], inside: Sequence[NDArray[np.int64]], most: int) -> Solution:
        shares = shares_for(conditions, widths, inside)
        return solver.solve(
            Problem(costs_UC=costs_UC[members_U], sizes_UC=sizes_UC[members_U], limit=most, shares=shares)
        )

    if rules.scope == "global":
        solution = solve(np.arange(len(costs_UC)), groups, limit)
        return _choice(columns, rules, row_U, solution.choice_U, solution.objective, solution.bound)
    assert not rules.dense, "they are in no layer's share"
    choice_U = np.zeros(len(weights_U), dtype=np.int64)
    objective = bound = 0.0
    total = int(weights_U.sum())
    smallest = 0
    for members_U in groups:
        weight = int(weights_U[members_U].sum())
        try:
            solution = solve(members_U, [np.arange(len(members_U))], limit * weight // total)
        except InfeasibleError as error:
            if error.smallest is None:
                raise
            smallest = max(smallest, -(-error.smallest * total // weight))
            continue
        choice_U[members_U] = solution.choice_U
        objective, bound = objective + solution.objective, bound + solution.bound
    if smallest:
        raise InfeasibleError("a layer's share of the budget is too small", smallest=smallest)
    return _choice(columns, rules, row_U, choice_U, objective, bound)


def _rows(table: CostTable, alike: str) -> NDArray[np.int64]:
    """The row of the problem that each unit belongs to, numbered in storage order."""
    if not alike:
        return np.arange(len(table.units))
    number: dict[tuple[int, str], int] = {}
    keys = [(unit.layer, unit.projection if alike == "kind" else "") for unit in table.units]
    return np.array([number.setdefault(key, len(number)) for key in keys])


def _summed(values_U: NDArray[Any], row_U: NDArray[np.int64]) -> NDArray[Any]:
    """Units -> rows of the problem."""
    total = np.zeros((int(row_U.max()) + 1, *values_U.shape[1:]), dtype=values_U.dtype)
    np.add.at(total, row_U, values_U)
    return total


def _choice(
    columns: list[int],
    rules: Rules,
    row_U: NDArray[np.int64],
    choice_U: NDArray[np.integer],
    objective: float,
    bound: float,
) -> Choice:
    units = len(choice_U) - len(rules.dense)
    dense_DC = _dense_choices(rules.dense, len(columns))
    return Choice(
        columns=tuple(columns[int(choice_U[row])] for row in row_U),
        dense={
            row.path: int(choice_C[index])
            for row, choice_C, index in zip(rules.dense, dense_DC, choice_U[units:], strict=True)
        },
        objective=objective,
        bound=bound,
    )


def _dense_choices(rows: Sequence[Row], columns: int) -> NDArray[np.int64]:
    """linear -> column of the problem -> its choice; that of leaving it alone, if its costs say nothing."""
    choices = np.zeros((len(rows), columns), dtype=np.int64)
    for choice_C, row in zip(choices, rows, strict=True):
        last = len(row.costs) - 1
        choice_C[:] = np.minimum(np.arange(columns), last) if any(row.costs) else last
    return choices


def _taken(values: Sequence[Sequence[float]], choices_DC: NDArray[np.int64], dtype: type) -> NDArray[Any]:
    rows = [np.array(row, dtype=dtype)[choice_C] for row, choice_C in zip(values, choices_DC, strict=True)]
    return np.array(rows, dtype=dtype).reshape(choices_DC.shape)


def _columns(table: CostTable, candidates: tuple[int, ...]) -> list[int]:
    known = {spec.bits: column for column, spec in enumerate(table.candidates)}
    missing = [bits for bits in candidates if bits not in known]
    if missing:
        raise ArtifactError(
            f"the costs know {', '.join(map(str, sorted(known)))} bits, not {', '.join(map(str, missing))}",
            option="costs",
            fix="measure with these --candidates, or allocate with fewer",
        )
    return [known[bits] for bits in candidates]


def _weights(table: CostTable, inventory: Inventory) -> NDArray[np.int64]:
    units = inventory.cost_units(table.unit)
    return np.array([sum(rows * columns for rows, columns in shapes) for _, shapes in units], dtype=np.int64)


def _sizes(table: CostTable, inventory: Inventory, columns: list[int], codes: bool) -> NDArray[np.int64]:
    if not codes:
        return np.array(table.sizes, dtype=np.int64)[:, columns]
    bits_C = np.array([table.candidates[column].bits for column in columns], dtype=np.int64)
    return _weights(table, inventory)[:, None] * bits_C

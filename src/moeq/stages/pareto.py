"""Solves many budgets by one table of costs: predicted cost against bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeq.allocation import curve, other_linears
from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, Inventory, Plan, expert_bytes
from moeq.costs.component_table import ComponentTable, load_table
from moeq.errors import OptionError
from moeq.notebook import Shows, Table
from moeq.recipe import Recipe
from moeq.report.curves import curve_svg
from moeq.report.tables import human_bytes
from moeq.writing import card_facts


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One budget, solved.

    Attributes:
        expert_bytes: stored bytes of all routed experts, tables included.
        expert_bits_per_weight: the same per weight.
        objective: predicted cost.
        gap: share of the objective that no other plan within the budget could save more of.
        allocation: code bits -> expert matrices.
        dense_bytes: stored bytes of the other linears that shared the budget, left alone or packed.
    """

    expert_bytes: int
    expert_bits_per_weight: float
    objective: float
    gap: float
    allocation: dict[str, int]
    dense_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoReport(Shows):
    """The curve; field names are those of the JSON document (docs/json.md)."""

    model: str
    cost: str
    unit: str
    points: tuple[ParetoPoint, ...]

    def tables(self) -> Iterator[Table]:
        """The curve, and its points."""
        rows = [
            (f"{each.expert_bits_per_weight:.4f}", human_bytes(each.expert_bytes), each.objective)
            for each in self.points
        ]
        curves = {self.cost: [(each.expert_bytes, each.objective) for each in self.points]}
        picture = curve_svg(curves, f"{self.cost} cost of {self.model}")
        yield Table(title="budgets", header=("bits/weight", "experts", "predicted cost"), rows=rows, picture=picture)


def run(model: str | Path, recipe: Recipe, points: int = 20) -> ParetoReport:
    """Plans for budgets from the smallest to the largest that the table's candidates allow.

    Args:
        model: local directory or hub id.
        recipe: `costs` names the table; method, shares, scope and candidates say how to spend.
        points: budgets, evenly spaced.

    Raises:
        OptionError: no costs were given, or too few points asked for.
        ArtifactError: the costs are of another model.
    """
    if recipe.costs is None:
        raise OptionError("it needs measured costs", option="costs", fix="make them with moeq measure")
    inventory, _ = read_inventory(open_source(model), trust_remote_code=recipe.trust_remote_code)
    table = load_table(Path(recipe.costs))
    solved = curve.solved(inventory, table, recipe, points)
    recipe = recipe.replace(cost=table.cost, unit=table.unit).settled()
    return ParetoReport(
        model=str(model),
        cost=table.cost,
        unit=table.unit,
        points=tuple(_point(inventory, table, recipe, plan) for plan in solved),
    )


def _point(inventory: Inventory, table: CostTable | ComponentTable, recipe: Recipe, plan: Plan) -> ParetoPoint:
    size = expert_bytes(plan, inventory)
    dense = 0 if isinstance(table, ComponentTable) else other_linears.chosen_bytes(table, inventory, recipe, plan)
    assert plan.objective is not None
    assert plan.bound is not None
    return ParetoPoint(
        expert_bytes=size,
        expert_bits_per_weight=8 * size / inventory.expert_parameters,
        objective=plan.objective,
        gap=max(0.0, plan.objective - plan.bound) / max(abs(plan.objective), 1e-300),
        allocation=card_facts.counts(inventory, plan),
        dense_bytes=dense,
    )

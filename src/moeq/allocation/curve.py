"""Many budgets, solved by one table of costs: predicted cost against bytes."""

from moeq.allocation import measuring, other_linears, plans
from moeq.artifacts import CostTable, Inventory, Plan
from moeq.costs.component_table import ComponentTable
from moeq.errors import ArtifactError, InfeasibleError, OptionError
from moeq.recipe import Recipe


def solved(inventory: Inventory, table: CostTable | ComponentTable, recipe: Recipe, points: int) -> list[Plan]:
    """Plans for budgets from the smallest to the largest that the table's candidates allow, evenly spaced.

    Args:
        inventory: the model.
        table: its costs.
        recipe: method, shares, scope, solver and candidates say how to spend.
        points: budgets.

    Raises:
        OptionError: too few points asked for.
        ArtifactError: the costs are of another model.
    """
    if points < 2:
        raise OptionError(f"{points} points make no curve", option="points", fix="give at least 2")
    recipe = recipe.replace(cost=table.cost, unit=table.unit).settled()
    if recipe.joining():
        measuring.check_joining(recipe)
    narrowest, widest = _range(inventory, table, recipe)
    limits = [narrowest + (widest - narrowest) * step // (points - 1) for step in range(points)]
    return [plans.plan_within(inventory, table, recipe, limit) for limit in limits]


def _range(inventory: Inventory, table: CostTable | ComponentTable, recipe: Recipe) -> tuple[int, int]:
    """Smallest and largest limit worth solving."""
    if isinstance(table, ComponentTable):
        widest = plans.widest_bytes(inventory, recipe)
    else:
        widest = sum(max(row) for row in table.sizes)
        widest += sum(max(row.sizes) for row in other_linears.rows(table, inventory, recipe))
    try:
        plans.plan_within(inventory, table, recipe, 0)
    except InfeasibleError as error:
        if error.smallest is None:
            raise
        return error.smallest, max(widest, error.smallest)
    raise ArtifactError("the table's sizes are zero", option="costs", fix="measure again")

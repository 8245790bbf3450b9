"""From an Inventory and a budget to a Plan."""

from collections.abc import Callable, Mapping

from moeq.artifacts import Inventory, Plan, expert_bytes
from moeq.budget import Budget
from moeq.errors import BudgetError
from moeq.recipe import Recipe
from moeq.spec import BITS, QuantSpec, TensorInfo, stored_bytes, table_bytes
from moeq.stages import shards

SIZE_SLACK = 128
"""Recipe, manifest and config spell out the size and numbers that depend on it."""
Uniform = tuple[tuple[tuple[int, ...], ...], ...]


def run(
    inventory: Inventory,
    headers: Mapping[str, TensorInfo],
    recipe: Recipe,
    sidecars: Callable[[Plan], int] = lambda _: 0,
) -> Plan:
    """Decide the spec of every unit.

    `uniform` gives every matrix the same width; what a fractional budget leaves over raises the
    matrices of the first layers to the next width, as the papers' uniform baseline does.

    Args:
        inventory: the model.
        headers: its tensors.
        recipe: method, budget and options.
        sidecars: bytes that the files beside the weights take at most under a plan; they count for `size`.

    Raises:
        BudgetError: the budget lies below the smallest reachable size or above the original's.
    """
    budget = recipe.budget()
    dense = _dense_specs(inventory, recipe)
    palette = tuple(QuantSpec(bits=b, group_size=recipe.group_size, levels=recipe.level_set(b)) for b in BITS)
    specs = palette + tuple(sorted(set(dense.values()) - set(palette)))
    assigned = {path: specs.index(spec) for path, spec in dense.items()}

    def make(widths: Uniform) -> Plan:
        plan = Plan(
            model_hash=inventory.model_hash,
            method=recipe.method,
            specs=specs,
            experts=widths,
            dense=assigned,
            expert_bytes=0,
        )
        sized = expert_bytes(plan, inventory)
        return Plan(
            model_hash=plan.model_hash,
            method=plan.method,
            specs=specs,
            experts=widths,
            dense=assigned,
            expert_bytes=sized,
        )

    def weigh(width: int, shape: tuple[int, int]) -> int:
        if budget.code_bits is not None:
            return palette[width].bits * shape[0] * shape[1]
        return stored_bytes(palette[width], shape)

    limit = _limit(inventory, headers, budget, make, sidecars)
    plan = make(_fill(inventory, weigh, limit, budget))
    plan.validate()
    return plan


def _dense_specs(inventory: Inventory, recipe: Recipe) -> dict[str, QuantSpec]:
    widths = recipe.dense()
    return {
        linear.path: QuantSpec(
            bits=widths[linear.kind], group_size=recipe.group_size, levels=recipe.level_set(widths[linear.kind])
        )
        for linear in inventory.dense
        if widths[linear.kind] < 16
    }


def _limit(
    inventory: Inventory,
    headers: Mapping[str, TensorInfo],
    budget: Budget,
    make: Callable[[Uniform], Plan],
    sidecars: Callable[[Plan], int],
) -> int:
    """What the matrices may weigh together, in the unit of `weigh`."""
    tables = sum(table_bytes(layer.num_experts, len(layer.projections)) for layer in inventory.layers)
    if budget.code_bits is not None:
        return int(budget.code_bits * inventory.expert_parameters)
    if budget.bits is not None:
        return int(budget.bits * inventory.expert_parameters / 8) - tables
    assert budget.size is not None
    if budget.size >= inventory.source_bytes:
        raise BudgetError(
            f"{budget.size} bytes is not below the original's {inventory.source_bytes}",
            option="size",
            fix="give a smaller size; nothing needs quantizing for this one",
        )
    # No other plan needs longer numbers in headers and sidecars than the widest.
    widest = make(_uniform(inventory, len(BITS) - 1))
    files = shards.arrange(inventory, widest, headers)
    others = shards.sizes(inventory, widest, files).total - widest.expert_bytes
    return budget.size - others - sidecars(widest) - tables


def _uniform(inventory: Inventory, width: int) -> Uniform:
    return tuple(((width,) * len(layer.projections),) * layer.num_experts for layer in inventory.layers)


def _fill(inventory: Inventory, weigh: Callable[[int, tuple[int, int]], int], limit: int, budget: Budget) -> Uniform:
    """The largest common width that fits, then one more for leading matrices while they fit."""
    shapes = [shape for _, shape in inventory.units()]
    totals = [sum(weigh(width, shape) for shape in shapes) for width in range(len(BITS))]
    fitting = [width for width, total in enumerate(totals) if total <= limit]
    if not fitting:
        raise _too_small(inventory, budget, totals[0] - limit)
    low = fitting[-1]
    left = limit - totals[low]
    rows = []
    for layer in inventory.layers:
        experts = []
        for _ in range(layer.num_experts):
            widths = []
            for projection in layer.projections:
                shape = layer.shapes[projection]
                step = weigh(low + 1, shape) - weigh(low, shape) if low + 1 < len(BITS) else left + 1
                raised = step <= left
                left -= step if raised else 0
                widths.append(low + raised)
            experts.append(tuple(widths))
        rows.append(tuple(experts))
    return tuple(rows)


def _too_small(inventory: Inventory, budget: Budget, missing: int) -> BudgetError:
    if budget.size is not None:
        least = f"{budget.size + missing + SIZE_SLACK} bytes"
        return BudgetError(
            f"{budget.size} bytes cannot be reached", option="size", fix=f"give at least {least}, or lower --dense-bits"
        )
    bits = budget.bits if budget.bits is not None else budget.code_bits
    assert bits is not None
    unit = 8 if budget.bits is not None else 1
    # Rounded up, so that the number in the message is itself feasible.
    least_bits = -(-(bits * inventory.expert_parameters + missing * unit) * 1000 // inventory.expert_parameters) / 1000
    return BudgetError(
        f"{bits:g} bits per expert weight cannot be reached: scales and padding count too",
        option="bits",
        fix=f"give at least {least_bits:.3f}, a larger --group-size, or --accounting codes",
    )

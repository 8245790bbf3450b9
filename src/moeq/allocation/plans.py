"""From an Inventory and a budget to a Plan."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from moeq.allocation import block_types, components, other_linears, program, tile_forms
from moeq.artifacts import CostTable, Inventory, Plan, expert_bytes
from moeq.budget import Budget
from moeq.costs.component_table import ComponentTable
from moeq.errors import ArtifactError, BudgetError, InfeasibleError
from moeq.recipe import Recipe
from moeq.spec import BITS, EXPERT, QuantSpec, TensorInfo, Unit, stored_bytes
from moeq.writing import arrangement, compressed_tensors

SIZE_SLACK = 128
"""Recipe, manifest and config spell out the size and numbers that depend on it."""
HASH_LENGTH = 64
Uniform = tuple[tuple[tuple[int, ...], ...], ...]


def run(
    inventory: Inventory,
    headers: Mapping[str, TensorInfo],
    recipe: Recipe,
    sidecars: Callable[[Plan], int] = lambda _: 0,
    table: CostTable | ComponentTable | None = None,
) -> Plan:
    """Decide the spec of every unit.

    `uniform` gives every matrix the same width; what a fractional budget leaves over raises the
    matrices of the first layers to the next width, as the papers' uniform baseline does. Methods with
    a cost solve a program over the costs of `table`; without one they get uniform's plan, as a draft
    of the same size.

    Args:
        inventory: the model.
        headers: its tensors.
        recipe: method, budget and options.
        sidecars: bytes that the files beside the weights take at most under a plan; they count for `size`.
        table: costs of the units.

    Raises:
        BudgetError: the budget lies below the smallest reachable size or above the original's.
        ArtifactError: the table is of another model, or lacks candidates.
    """
    budget = recipe.budget()
    recipe = recipe.settled()
    draft = _draft(inventory, recipe)
    if table is not None:
        _check_table(table, inventory.attached, draft)
    limit = _limit(inventory, headers, budget, draft, recipe, sidecars)
    main = inventory.attached
    part = main  # what is being solved: every part gets its share of the budget
    share = limit * main.expert_parameters // inventory.expert_parameters
    try:
        plan = _solved(main, replace(draft, experts=draft.experts[: len(main.layers)]), table, recipe, budget, share)
        if len(main.layers) < len(inventory.layers):
            part, share = replace(inventory, layers=inventory.layers[len(main.layers) :]), limit - share
            plan = _sized(
                inventory,
                replace(plan, experts=plan.experts + _fill(part, draft, share, budget, alike=recipe.served.alike)),
            )
    except InfeasibleError as error:
        if error.smallest is None:
            raise
        # What a part lacks, the whole lacks in proportion.
        missing = -(-(error.smallest - share) * inventory.expert_parameters // part.expert_parameters)
        raise _too_small(inventory, draft, budget, missing) from error
    plan = block_types.named(inventory, plan)
    plan.validate()
    return plan


def _solved(
    inventory: Inventory,
    draft: Plan,
    table: CostTable | ComponentTable | None,
    recipe: Recipe,
    budget: Budget,
    limit: int,
) -> Plan:
    """The plan of the layers that the program is about.

    Raises:
        InfeasibleError: nothing fits.
    """
    if recipe.has_components:
        assert not isinstance(table, CostTable)
        plan = components.solve(inventory, draft, table, recipe, limit, codes=budget.code_bits is not None)
        return plan if table is None else replace(plan, costs_hash=table.hash)
    if table is None:
        draft, left = _draft_dense(inventory, draft, recipe, limit)
        filled = _fill(inventory, draft, left, budget, beside=limit - left, alike=recipe.served.alike)
        plain = replace(draft, experts=filled, unit=None, cost=None, costs_hash=None, objective=None, bound=None)
        return _sized(inventory, plain)
    assert isinstance(table, CostTable)
    return _solve(inventory, draft, table, recipe, budget, limit)


def _check_table(table: CostTable | ComponentTable, inventory: Inventory, draft: Plan) -> None:
    table.check_model(inventory)
    for spec in table.candidates:
        if spec not in draft.specs:
            raise ArtifactError(
                f"the costs are of {spec.bits} bits, group size {spec.group_size}, levels {spec.levels}, "
                "which this run would not use",
                option="costs",
                fix="measure with the same --quantizer, --group-size and --levels",
            )


def _draft_dense(inventory: Inventory, draft: Plan, recipe: Recipe, limit: int) -> tuple[Plan, int]:
    """The draft with the linears that join as wide as leaves the experts something, and what it leaves them."""
    linears = other_linears.linears(inventory, recipe)
    least = sum(stored_bytes(draft.specs[0], shape) for _, shape in inventory.units())
    for width in reversed(range(len(other_linears.specs(recipe)))):
        left = limit - sum(other_linears.packed_bytes(linear, other_linears.specs(recipe)[width]) for linear in linears)
        if left >= least or width == 0:
            break
    return other_linears.packed(inventory, draft, recipe, width), left


def spendable_bits(
    inventory: Inventory, headers: Mapping[str, TensorInfo], recipe: Recipe, sidecars: Callable[[Plan], int]
) -> float:
    """Mean bits per expert weight that the budget leaves at most, in the unit it counts in."""
    budget, recipe = recipe.budget(), recipe.settled()
    limit = _limit(inventory, headers, budget, _draft(inventory, recipe), recipe, sidecars)
    return _spendable(inventory, recipe, budget, limit)


def _spendable(inventory: Inventory, recipe: Recipe, budget: Budget, limit: int) -> float:
    limit -= other_linears.least_bytes(inventory, recipe)
    return limit * (1 if budget.code_bits is not None else 8) / inventory.expert_parameters


def candidate_specs(recipe: Recipe, budget: float | None = None) -> tuple[QuantSpec, ...]:
    """The specs a unit may get, by rising width; `budget` as in `Recipe.candidate_bits`."""
    if recipe.has_components:
        return components.specs_of(recipe)
    return tuple(recipe.spec(bits) for bits in recipe.candidate_bits(budget))


def _draft(inventory: Inventory, recipe: Recipe) -> Plan:
    """A plan of the widest codes, with palette and dense linears as they will be; those that join at their widest."""
    if recipe.serve == "vllm-native":
        for unit, shape in inventory.units():
            compressed_tensors.check_spec(str(unit), recipe.spec(BITS[-1]), shape)
    dense = _dense_specs(inventory, recipe)
    if recipe.serve == "gguf":
        block_types.check(inventory, dense)
    if recipe.has_components:
        longest = -1.2345678901234567e-300
        spectral = components.draft(inventory, recipe, dense)
        return replace(spectral, costs_hash=HASH_LENGTH * "0", objective=longest, bound=longest)
    palette = tuple(recipe.spec(bits) for bits in BITS)
    others = {*dense.values(), *(other_linears.specs(recipe) if recipe.joining() else ())}
    specs = palette + tuple(sorted(others - set(palette)))
    draft = Plan(
        model_hash=inventory.model_hash,
        method=recipe.method,
        specs=specs,
        experts=_uniform(inventory, len(BITS) - 1),
        dense={path: specs.index(spec) for path, spec in dense.items()},
        expert_bytes=0,
        tiles=tile_forms.forms(inventory, recipe),
    )
    if recipe.cost is not None:
        # Whatever the solver will say, it does not take more bytes in the plan's file than this.
        longest = -1.2345678901234567e-300
        draft = replace(
            draft, unit="matrix", cost=recipe.cost, costs_hash=HASH_LENGTH * "0", objective=longest, bound=longest
        )
    return _sized(inventory, other_linears.packed(inventory, draft, recipe))


def _sized(inventory: Inventory, plan: Plan) -> Plan:
    return replace(plan, expert_bytes=expert_bytes(plan, inventory))


def _weigher(draft: Plan, budget: Budget) -> Callable[[int, tuple[int, int]], int]:
    def weigh(width: int, shape: tuple[int, int]) -> int:
        if budget.code_bits is not None:
            return draft.specs[width].bits * shape[0] * shape[1]
        return stored_bytes(draft.specs[width], shape)

    return weigh


def _solve(inventory: Inventory, draft: Plan, table: CostTable, recipe: Recipe, budget: Budget, limit: int) -> Plan:
    codes = budget.code_bits is not None
    candidates = recipe.candidate_bits(_spendable(inventory, recipe, budget, limit))
    rows = other_linears.rows(table, inventory, recipe)
    return _within(inventory, draft, table, recipe, limit, rules_of(recipe, candidates, rows, codes))


def rules_of(
    recipe: Recipe, candidates: tuple[int, ...], dense: tuple[other_linears.Row, ...] = (), codes: bool = False
) -> program.Rules:
    """The rules that a settled recipe sets."""
    return program.Rules(
        solver=str(recipe.solver),
        scope=str(recipe.scope),
        shares=str(recipe.shares),
        candidates=candidates,
        codes=codes,
        dense=dense,
        alike=recipe.served.alike,
    )


def widest_bytes(inventory: Inventory, recipe: Recipe) -> int:
    """What all units take under the widest candidates, tables included."""
    return _draft(inventory, recipe).expert_bytes


def plan_within(
    inventory: Inventory, table: CostTable | ComponentTable, recipe: Recipe, limit: int, *, freely: bool = False
) -> Plan:
    """The plan whose expert matrices, and linears that join, take at most `limit` bytes, by a settled recipe's rules.

    `freely` leaves out that units get one width together.

    Raises:
        InfeasibleError: nothing fits; it says the smallest limit that would.
    """
    draft = _draft(inventory, recipe)
    _check_table(table, inventory, draft)
    if isinstance(table, ComponentTable):
        return components.solve(inventory, draft, table, recipe, limit, codes=False)
    widths = tuple(spec.bits for spec in table.candidates)
    chosen = widths if recipe.candidates is None else recipe.candidate_bits()
    rules = rules_of(recipe, chosen, other_linears.rows(table, inventory, recipe))
    if freely:
        rules = replace(rules, alike="")
    return block_types.named(inventory, _within(inventory, draft, table, recipe, limit, rules))


def _within(
    inventory: Inventory, draft: Plan, table: CostTable, recipe: Recipe, limit: int, rules: program.Rules
) -> Plan:
    choice = program.choose(table, inventory, limit, rules)
    specs = draft.specs
    index = {
        unit: specs.index(table.candidates[column]) for unit, column in zip(table.units, choice.columns, strict=True)
    }
    whole = table.unit == "expert"
    experts = tuple(
        tuple(
            tuple(
                index[Unit(layer=number, expert=expert, projection=EXPERT if whole else projection)]
                for projection in layer.projections
            )
            for expert in range(layer.num_experts)
        )
        for number, layer in enumerate(inventory.layers)
    )
    return _sized(
        inventory,
        replace(
            other_linears.decided(draft, recipe, choice.dense),
            experts=experts,
            unit=table.unit,
            cost=table.cost,
            costs_hash=table.hash,
            objective=choice.objective,
            bound=choice.bound,
        ),
    )


def _dense_specs(inventory: Inventory, recipe: Recipe) -> dict[str, QuantSpec]:
    widths = recipe.dense()
    return {
        linear.path: recipe.dense_spec(widths[linear.kind]) for linear in inventory.dense if widths[linear.kind] < 16
    }


def _limit(
    inventory: Inventory,
    headers: Mapping[str, TensorInfo],
    budget: Budget,
    widest: Plan,
    recipe: Recipe,
    sidecars: Callable[[Plan], int],
) -> int:
    """What the matrices, and linears that join, may weigh together, in the unit that the budget counts in."""
    fixed = sum(widest.layer(index, layer).fixed_bytes for index, layer in enumerate(inventory.layers))
    if budget.code_bits is not None:
        return int(budget.code_bits * inventory.expert_parameters)
    if budget.bits is not None:
        return int(budget.bits * inventory.expert_parameters / 8) - fixed
    assert budget.size is not None
    if budget.size >= inventory.source_bytes:
        raise BudgetError(
            f"{budget.size} bytes is not below the original's {inventory.source_bytes}",
            option="size",
            fix="give a smaller size; nothing needs quantizing for this one",
        )
    # No other plan needs longer numbers in headers and sidecars than the widest.
    files = arrangement.arrange(inventory, widest, headers)
    others = arrangement.sizes(inventory, widest, files).total - widest.expert_bytes
    others -= sum(
        other_linears.packed_bytes(linear, widest.specs[widest.dense[linear.path]])
        for linear in other_linears.linears(inventory, recipe)
    )
    others += other_linears.copied_overhead(inventory, headers, widest, recipe)
    return budget.size - others - sidecars(widest) - fixed


def _uniform(inventory: Inventory, width: int) -> Uniform:
    return tuple(((width,) * len(layer.projections),) * layer.num_experts for layer in inventory.layers)


def _fill(
    inventory: Inventory, draft: Plan, limit: int, budget: Budget, beside: int = 0, *, alike: str = ""
) -> Uniform:
    """The largest common width that fits, then one more for leading matrices, or layers, while they fit.

    Raises:
        InfeasibleError: the narrowest does not fit; with it `beside` is to be paid.
    """
    weigh = _weigher(draft, budget)
    shapes = [shape for _, shape in inventory.units()]
    totals = [sum(weigh(width, shape) for shape in shapes) for width in range(len(BITS))]
    fitting = [width for width, total in enumerate(totals) if total <= limit]
    if not fitting:
        raise InfeasibleError("not even the narrowest codes fit", smallest=totals[0] + beside)
    low = fitting[-1]
    left = limit - totals[low]
    rows = []
    for layer in inventory.layers:
        if alike and low + 1 < len(BITS):
            shapes = [layer.shapes[name] for name in layer.projections]
            step = layer.num_experts * sum(weigh(low + 1, shape) - weigh(low, shape) for shape in shapes)
            raised = step <= left
            left -= step if raised else 0
            rows.append(((low + raised,) * len(shapes),) * layer.num_experts)
            continue
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


def _too_small(inventory: Inventory, draft: Plan, budget: Budget, missing: int) -> BudgetError:
    smaller = "a smaller --rank, " if any(form.rank for layer in draft.tiles for form in layer.values()) else ""
    if budget.size is not None:
        least = f"{budget.size + missing + SIZE_SLACK} bytes"
        return BudgetError(
            f"{budget.size} bytes cannot be reached",
            option="size",
            fix=f"give at least {least}, {smaller}or lower --dense-bits",
        )
    bits = budget.bits if budget.bits is not None else budget.code_bits
    assert bits is not None
    unit = 8 if budget.bits is not None else 1
    # Rounded up, so that the number in the message is itself feasible.
    least_bits = -(-(bits * inventory.expert_parameters + missing * unit) * 1000 // inventory.expert_parameters) / 1000
    return BudgetError(
        f"{bits:g} bits per expert weight cannot be reached: scales and padding count too",
        option="bits",
        fix=f"give at least {least_bits:.3f}, {smaller}a larger --group-size, or --accounting codes",
    )

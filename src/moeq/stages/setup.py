"""Decides a run before it begins: the model, the plan, the files; measures costs where the method needs them."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moeq import codec
from moeq.artifacts import CostTable, Inventory, Plan
from moeq.checkpoint.read import resolve
from moeq.costs.component_table import ComponentTable, Table, load_table
from moeq.errors import ArtifactError, OptionError
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import Recipe
from moeq.spec import TensorInfo
from moeq.stages import allocate, card, choices, finish, inspect, joining, measure
from moeq.stages import shards as layout
from moeq.stages.packing import Progress

COSTS_NAME = ".moeq-costs"
"""Measured costs of an unfinished run, so that one that goes on need not measure again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run, decided but not begun; `plan` stops here.

    Attributes:
        source: the input directory.
        inventory: what it holds.
        headers: its tensors.
        recipe: all options, quantizer included.
        plan: the spec of every unit; while costs are not measured, a draft of the same size.
        shards: the files to write.
        decided: `plan` is not a draft.
        table: the costs that `plan` came from, where packing needs them too: those of components hold the bases.
    """

    source: Path
    inventory: Inventory
    headers: dict[str, TensorInfo]
    recipe: Recipe
    plan: Plan
    shards: tuple[layout.Shard, ...]
    decided: bool
    table: ComponentTable | None = None

    @property
    def sizes(self) -> layout.Sizes:
        """Bytes of the weight files."""
        return layout.sizes(self.inventory, self.plan, self.shards)

    @property
    def disk_bytes(self) -> int:
        """Upper bound of all files."""
        beside = finish.sidecar_limit(self.source, self.inventory, self.plan, self.recipe, self.shards)
        return self.sizes.total + beside


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocateReport:
    """What was decided; field names are those of the JSON document (docs/json.md).

    Attributes:
        output: file that the plan was written to.
        gap: share of the objective that a better plan could at most save; None if no solver made the plan.
        allocation: code bits -> expert matrices that get them.
        linears: code bits -> packed linears outside the experts; all others stay as they are.
        layers: MoE layer -> mean stored bits per expert weight.
    """

    output: str
    method: str
    plan_hash: str
    unit: str | None
    cost: str | None
    objective: float | None
    bound: float | None
    gap: float | None
    stored_bytes: int
    expert_bytes: int
    expert_bits_per_weight: float
    allocation: dict[str, int]
    linears: dict[str, int]
    layers: tuple[float, ...]
    map: tuple[str, ...]


def report(decided: Setup, output: str) -> AllocateReport:
    """What `decided` holds, for people."""
    inventory, plan = decided.inventory, decided.plan
    linears = Counter(plan.specs[index].bits for index in plan.dense.values())
    gap = None
    if plan.objective is not None and plan.bound is not None:
        gap = max(0.0, plan.objective - plan.bound) / max(abs(plan.objective), 1e-300)
    return AllocateReport(
        output=output,
        method=plan.method,
        plan_hash=plan.hash,
        unit=plan.unit,
        cost=plan.cost,
        objective=plan.objective,
        bound=plan.bound,
        gap=gap,
        stored_bytes=decided.sizes.total,
        expert_bytes=plan.expert_bytes,
        expert_bits_per_weight=8 * plan.expert_bytes / inventory.expert_parameters,
        allocation=card.counts(inventory, plan),
        linears={str(bits): count for bits, count in sorted(linears.items())},
        layers=card.stored_bits(inventory, plan),
        map=card.heatmap_lines(inventory, plan),
    )


def setup(model: str | Path, recipe: Recipe, table: Table | None = None) -> Setup:
    """Read headers, decide the plan, lay out the files. No weights are read but a few samples.

    Args:
        model: local directory or hub id.
        recipe: all options.
        table: costs, for methods that have one; those of `recipe.costs` by default.

    Raises:
        CheckpointError, BudgetError, ArtifactError: as the stages do.
    """
    source = resolve(model)
    inventory, headers = inspect.run(source)
    recipe = recipe.settled()
    make_quantizer(str(recipe.quantizer), **choices.quantizer_options(recipe))  # refuses names that nobody knows
    if recipe.joining():
        measure.check_joining(recipe)
    if recipe.plan is not None:
        plan = Plan.load(Path(recipe.plan))
        plan.check_model(inventory)
        recipe = recipe.replace(method=plan.method)
        table = _table_of(plan, recipe)
    else:
        if table is None and recipe.costs is not None:
            table = load_table(Path(recipe.costs))
            if (table.cost, table.unit) != (recipe.cost, recipe.unit):
                raise ArtifactError(
                    f"these are {table.cost} costs of each {table.unit}, not {recipe.cost} costs of each {recipe.unit}",
                    file=Path(recipe.costs),
                    option="costs",
                    fix=f"add --cost {table.cost} --unit {table.unit}, or measure again",
                )
        plan = allocate.run(inventory, headers, recipe, sidecars_of(source, inventory, headers, recipe), table)
    files = layout.arrange(inventory, plan, headers)
    return Setup(
        source=source,
        inventory=inventory,
        headers=headers,
        recipe=recipe,
        plan=plan,
        shards=files,
        decided=recipe.cost is None or table is not None,
        table=table if isinstance(table, ComponentTable) else None,
    )


def _table_of(plan: Plan, recipe: Recipe) -> ComponentTable | None:
    """The costs that a plan of components was made from: they hold the bases. No other plan needs any."""
    if plan.components is None:
        if recipe.costs is not None:
            raise OptionError("it has no effect with this plan", option="costs", fix="drop one of the two")
        return None
    if recipe.costs is None:
        raise OptionError(
            "a plan of components needs the bases of the costs that it was made from",
            option="costs",
            fix="add --costs with the file that moeq allocate was given",
        )
    table = load_table(Path(recipe.costs))
    if not isinstance(table, ComponentTable) or table.hash != plan.costs_hash:
        raise ArtifactError(
            "the plan was made from other costs", file=Path(recipe.costs), option="costs", fix="allocate again"
        )
    return table


def decided(model: str | Path, recipe: Recipe) -> Setup:
    """As `setup`, but never a draft.

    Raises:
        OptionError: the method ranks units, and no costs were given.
    """
    if recipe.plan is None and recipe.settled().cost is not None and recipe.costs is None:
        raise OptionError("it needs measured costs", option="costs", fix="make them with moeq measure")
    return setup(model, recipe)


def sidecars_of(
    source: Path, inventory: Inventory, headers: Mapping[str, TensorInfo], recipe: Recipe
) -> Callable[[Plan], int]:
    """Plan -> bytes that the files beside the weights take at most."""

    def sidecars(draft: Plan) -> int:
        shards = layout.arrange(inventory, draft, headers)
        return finish.sidecar_limit(source, inventory, draft, recipe, shards)

    return sidecars


def decide(draft: Setup, partial: Path, progress: Progress | None, context: str | None = None) -> Setup:
    """Measure the costs, unless an interrupted run did, and make the plan.

    Args:
        draft: from `setup`.
        partial: the output's directory, where measured costs are kept until it is complete.
        progress: called as work is done.
        context: packed checkpoint to measure on, instead of the recipe's own.
    """
    bits = allocate.spendable_bits(
        draft.inventory,
        draft.headers,
        draft.recipe,
        sidecars_of(draft.source, draft.inventory, draft.headers, draft.recipe),
    )
    recipe = draft.recipe if context is None else replace(draft.recipe, context=context, progressive=None)
    what = measure.subject(draft.source, draft.inventory, draft.headers, recipe, bits)
    path = partial / COSTS_NAME
    table = _measured(path, what)
    if table is None:
        table = measure.table(what, progress, scratch=partial, output=path)
        if isinstance(table, CostTable):
            table.save(path)
    return setup(draft.source, draft.recipe, table)


def _measured(path: Path, what: measure.Subject) -> Table | None:
    """What an interrupted run measured, if it is what this one would measure."""
    if not path.is_file():
        return None
    try:
        found = load_table(path)
    except ArtifactError:  # killed while it was written
        return None
    linears = found.dense if isinstance(found, CostTable) else ()
    same = (found.model_hash, found.cost, found.unit, found.candidates, codec.encode(found.provenance), linears)
    recipe = what.recipe
    dense = tuple(linear.path for linear in joining.linears(what.inventory, recipe))
    facts = codec.encode(what.provenance)
    wanted = (what.inventory.model_hash, recipe.cost, recipe.unit, what.candidates, facts, dense)
    return found if same == wanted else None

"""Decides a run before it begins: the model, the plan, the files; measures costs where the method needs them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from moeq import codec
from moeq.allocation import measuring, other_linears, plans
from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.arch.meta import build_meta_model
from moeq.arch.mtp import mtp_layers, mtp_tensors
from moeq.arch.sorted_rows import weighted_beforehand
from moeq.artifacts import CostTable, Inventory, Plan
from moeq.costs.component_table import ComponentTable, Table, load_table
from moeq.costs.registry import make_cost
from moeq.errors import ArtifactError, OptionError
from moeq.fleet import HERE, Fleet
from moeq.methods import OWN_LEVELS, method
from moeq.progress import Progress
from moeq.quantizers.registry import QUANTIZERS
from moeq.recipe import Recipe
from moeq.spec import QuantSpec, TensorInfo
from moeq.writing import arrangement, other_files
from moeq.writing.decision import Decision
from moeq.writing.quantizer_choice import chosen_quantizer, settled

COSTS_NAME = ".moeq-costs"
"""Measured costs of an unfinished run, so that one that goes on need not measure again."""


def draft(model: str | Path, recipe: Recipe, table: Table | None = None) -> Decision:
    """Read headers, decide the plan, lay out the files. No weights are read but a few samples.

    Args:
        model: local directory or hub id.
        recipe: all options.
        table: costs, for methods that have one; those of `recipe.costs` by default.

    Raises:
        CheckpointError, BudgetError, ArtifactError: as the stages do.
    """
    source = open_source(model)
    inventory, headers = read_inventory(source, trust_remote_code=recipe.trust_remote_code)
    asked, fit, recipe = recipe.quantizer, recipe.compensate, settled(recipe)
    if inventory.apart:
        _check_apart(recipe)
    elif recipe.router != "none" and weighted_beforehand(build_meta_model(source)):
        raise OptionError(
            f"the routers of {inventory.model_type} cannot be tuned: its tokens are weighted before experts see them",
            option="router",
            fix="leave them as they are (--router none)",
        )
    if recipe.mtp == "pack":
        inventory = replace(inventory, layers=inventory.layers + mtp_layers(source, inventory, headers))
    if recipe.mtp == "drop":
        dropped = mtp_tensors(source, headers)
        headers = {name: info for name, info in headers.items() if name not in dropped}
    chosen_quantizer(recipe)  # refuses names that nobody knows
    if recipe.joining():
        measuring.check_joining(recipe)
    if recipe.plan is not None:
        plan = Plan.load(Path(recipe.plan))
        plan.check_model(inventory)
        recipe = _with_quantizer(recipe.replace(method=plan.method), asked, plan.specs)
        recipe = settled(replace(recipe, compensate=fit))  # as the method of the plan has it
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
        if isinstance(table, CostTable):
            recipe = _with_quantizer(recipe, asked, table.candidates)
        plan = plans.run(inventory, headers, recipe, sidecars_of(source, inventory, headers, recipe), table)
    files = arrangement.arrange(inventory, plan, headers)
    return Decision(
        source=source,
        inventory=inventory,
        headers=headers,
        recipe=recipe,
        plan=plan,
        shards=files,
        decided=recipe.cost is None or table is not None,
        table=table if isinstance(table, ComponentTable) else None,
    )


def _check_apart(recipe: Recipe) -> None:
    """Experts that are modules of their own are rounded one by one and without data: raise OptionError otherwise."""
    needed = {
        "method": method(recipe.method).alone,
        "cost": recipe.cost is None or make_cost(recipe.cost).needs == "weights",
        "calibration": recipe.text is None,
        "quantizer": not chosen_quantizer(recipe).needs_hessian,
        "router": recipe.router == "none",
        "dense-bits": set(recipe.dense().values()) == {16} and not recipe.joining(),
        "mtp": recipe.mtp == "keep",
    }
    for option, possible in needed.items():
        if not possible:
            raise OptionError(
                "transformers does not have this model, so that only its experts are packed, and without data",
                option=option,
                fix="use --method uniform or alphaq with --quantizer hqq, and no calibration text",
            )


def _with_quantizer(recipe: Recipe, asked: str | None, specs: Iterable[QuantSpec]) -> Recipe:
    """With the quantizer that specs ask for: codes of trellises and of codebooks are chosen by those of the same name.

    Blocks of ggml have two, one of them for runs without text.

    Raises:
        OptionError: another one was asked for.
    """
    own = next((spec.levels for spec in specs if spec.levels in QUANTIZERS), None)
    makers = [name for name in OWN_LEVELS if name.removesuffix("-rtn") == own]
    if own is not None and asked not in (None, own, *makers):
        message = f"{asked} does not choose codes of the level set {own}, which this plan or these costs have"
        raise OptionError(message, option="quantizer", fix=f"leave it away, or give {own}")
    if makers:
        own = asked or (makers[0] if recipe.text else makers[-1])
    return recipe.replace(quantizer=own)


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


def sidecars_of(
    source: Path, inventory: Inventory, headers: Mapping[str, TensorInfo], recipe: Recipe
) -> Callable[[Plan], int]:
    """Plan -> bytes that the files beside the weights take at most."""

    def sidecars(plan: Plan) -> int:
        files = arrangement.arrange(inventory, plan, headers)
        return other_files.sidecar_limit(source, inventory, plan, recipe, files)

    return sidecars


def decide(
    first: Decision, partial: Path, progress: Progress | None, context: str | None = None, fleet: Fleet = HERE
) -> Decision:
    """Measure the costs, unless an interrupted run did, and make the plan.

    Args:
        first: from `draft`.
        partial: the output's directory, where measured costs are kept until it is complete.
        progress: called as work is done.
        context: packed checkpoint to measure on, instead of the recipe's own.
        fleet: who measures.
    """
    bits = plans.spendable_bits(
        first.inventory,
        first.headers,
        first.recipe,
        sidecars_of(first.source, first.inventory, first.headers, first.recipe),
    )
    recipe = first.recipe if context is None else replace(first.recipe, context=context, progressive=None)
    what = measuring.subject(first.source, first.inventory.attached, first.headers, recipe, bits)
    path = partial / COSTS_NAME
    table = _measured(path, what)
    if table is None:
        table = measuring.table(what, progress, scratch=partial, output=path, fleet=fleet)
        if isinstance(table, CostTable):
            table.save(path)
    return draft(first.source, first.recipe, table)


def _measured(path: Path, what: measuring.Subject) -> Table | None:
    """What an interrupted run measured, if it is what this one would costs."""
    if not path.is_file():
        return None
    try:
        found = load_table(path)
    except ArtifactError:  # killed while it was written
        return None
    linears = found.dense if isinstance(found, CostTable) else ()
    same = (found.model_hash, found.cost, found.unit, found.candidates, codec.encode(found.provenance), linears)
    recipe = what.recipe
    dense = tuple(linear.path for linear in other_linears.linears(what.inventory, recipe))
    facts = codec.encode(what.provenance)
    wanted = (what.inventory.model_hash, recipe.cost, recipe.unit, what.candidates, facts, dense)
    return found if same == wanted else None

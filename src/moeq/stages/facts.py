"""Writes what `moeq report` shows beside plan and manifest, while it is still known."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from moeq import codec
from moeq.allocation import curve
from moeq.allocation.decide import COSTS_NAME
from moeq.artifacts import CostTable, Inventory, Plan
from moeq.checkpoint.write import write_file_atomic
from moeq.costs.component_table import ComponentTable, Table, load_table
from moeq.errors import InfeasibleError
from moeq.recipe import Recipe
from moeq.report.card import RouterFacts
from moeq.report.facts import BINS, FACTS_NAME, CurvePoint, ReportFacts
from moeq.report.trials import Trial
from moeq.spec import EXPERT, Unit
from moeq.stages.quantize_report import directory_bytes
from moeq.writing.decision import Decision
from moeq.writing.other_files import POINTS, STATISTICS

DIGITS: Final = 5
"""Significant digits of numbers that are only looked at."""
SOLVER: Final = "lagrangian"
"""For curves: within a few percent of the optimum, in a third of the time or less."""


def write(
    decision: Decision,
    partial: Path,
    *,
    stored_bytes: int,
    quality: dict[str, float] | None,
    by_text: dict[str, dict[str, float]],
    note: str | None,
    router: RouterFacts | None,
) -> None:
    """Write the facts of a checkpoint that is complete but for its name."""
    facts = ReportFacts(
        model_hash=decision.inventory.model_hash,
        plan_hash=decision.plan.hash,
        source_bytes=decision.inventory.source_bytes,
        stored_bytes=stored_bytes,
        quality=quality or {},
        quality_by_text=by_text,
        quality_note=note or "",
        router=router,
    )
    path = partial / COSTS_NAME if (partial / COSTS_NAME).is_file() else decision.recipe.costs
    if decision.plan.cost is not None and path is not None:
        facts = _with_costs(facts, decision, load_table(Path(path)))
    _save(partial, facts, decision.recipe)


def add_trials(directory: Path, trials: tuple[Trial, ...], note: str, recipe: Recipe) -> None:
    """What method auto compared, which is known when the checkpoint is complete. Times are left out."""
    if (directory / FACTS_NAME).is_file():
        facts = ReportFacts.load(directory / FACTS_NAME)
        timeless = tuple(replace(trial, seconds=0.0) for trial in trials)
        _save(directory, replace(facts, trials=timeless, trials_note=note), recipe)


def carry_over(source: Path, directory: Path, router: RouterFacts) -> None:
    """The facts of a checkpoint whose routers were tuned after it had been packed: what was measured before is gone."""
    if (source / FACTS_NAME).is_file():
        note = "what was measured before the routers were tuned does not hold any more; run moeq eval"
        facts = ReportFacts.load(source / FACTS_NAME)
        facts = replace(facts, quality={}, quality_by_text={}, quality_note=note, trials=(), router=router)
        _save(directory, facts, None)


def _save(directory: Path, facts: ReportFacts, recipe: Recipe | None) -> None:
    """Write them, with a budget of bytes as much of them as it has room for: nothing needs them but reports."""
    facts.validate()
    path = directory / FACTS_NAME
    size = recipe.budget().size if recipe is not None and recipe.plan is None else None
    path.unlink(missing_ok=True)
    room = None if size is None else size - directory_bytes(directory)
    fewer = replace(facts, statistics={})
    for each in (facts, fewer, replace(fewer, curve=(), spectra={})):
        text = codec.canonical(each.to_dict()) + b"\n"
        if room is None or len(text) <= room:
            write_file_atomic(path, text)
            return


def _with_costs(facts: ReportFacts, decision: Decision, table: Table) -> ReportFacts:
    attached = decision.inventory.attached
    try:
        plans = curve.solved(attached, table, _quick(decision.recipe, table), POINTS)
    except InfeasibleError:  # shares that only some budgets can have
        plans = []
    facts = replace(facts, curve=tuple(_point(plan) for plan in plans))
    if isinstance(table, ComponentTable):
        return replace(facts, spectra=_spectra(table))
    chosen = {name: table.statistics[name] for name in table.statistics if name not in ("tokens", "weight_sum")}
    statistics = {"harm": _harms(attached, table, decision.plan), **dict(list(chosen.items())[: STATISTICS - 1])}
    return replace(facts, statistics={name: tuple(map(_short, values)) for name, values in statistics.items()})


def _quick(recipe: Recipe, table: Table) -> Recipe:
    """The recipe for a curve: nothing is fixed by a plan, and the quick solver is used, which knows no shares.

    Thresholds of components are quick as they are.
    """
    recipe = replace(recipe, plan=None)
    return replace(recipe, solver=SOLVER, shares="none") if isinstance(table, CostTable) else recipe


def _point(plan: Plan) -> CurvePoint:
    assert plan.objective is not None
    widths = tuple(
        "".join(str(plan.specs[index].bits) for expert in layer for index in expert) for layer in plan.experts
    )
    return CurvePoint(expert_bytes=plan.expert_bytes, objective=_short(plan.objective), widths=widths)


def _harms(inventory: Inventory, table: CostTable, plan: Plan) -> tuple[float, ...]:
    """Unit -> predicted harm of what it got."""

    def got(unit: Unit) -> float:
        layer = inventory.layers[unit.layer]
        projection = layer.projections[0] if unit.projection == EXPERT else unit.projection
        spec = plan.spec(replace(unit, projection=projection), layer.projections)
        return rows[unit][table.candidates.index(spec)] if spec in table.candidates else 0.0

    rows = dict(zip(table.units, table.costs, strict=True))
    return tuple(got(unit) for unit in table.units)


def _spectra(table: ComponentTable) -> dict[str, tuple[float, ...]]:
    found = {}
    for index in range(len(table.facts.layers)):
        for projection in ("gate", "up", "down"):
            energy_H = table.layer(index, projection).energy_EH.double().mean(0).numpy()
            runs = np.array_split(energy_H, min(BINS, len(energy_H)))
            found[f"{index}.{projection}"] = tuple(_short(float(run.mean())) for run in runs)
    return found


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

"""`moeq measure`: from a checkpoint to a table of costs that serves many budgets."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeq import codec
from moeq.allocation.measuring import subject, table
from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable
from moeq.checkpoint.write import write_file_atomic
from moeq.costs.component_table import ComponentTable
from moeq.fleet import HERE, Fleet
from moeq.progress import Progress
from moeq.recipe import Recipe


def run(
    model: str | Path,
    recipe: Recipe,
    progress: Progress | None = None,
    output: Path | None = None,
    fleet: Fleet = HERE,
) -> CostTable | ComponentTable:
    """Measure the recipe's cost.

    Args:
        model: local directory or hub id.
        recipe: method or cost, unit, candidates, calibration; a budget is not needed.
        progress: called as work is done.
        output: where the costs are to be written; those of components are written anyway, by default to a temporary
            file.
        fleet: who measures: layers where weights are enough, else the texts.

    Raises:
        OptionError: the method has no cost, or an option is wrong.
        CheckpointError, CalibrationError: the model or the text cannot be used.
    """
    source = open_source(model)
    inventory, headers = read_inventory(source, trust_remote_code=recipe.trust_remote_code)
    found = table(subject(source, inventory, headers, recipe), progress, output=output, fleet=fleet)
    if output is not None and isinstance(found, CostTable):
        write_file_atomic(output, codec.canonical(found.to_dict()) + b"\n")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureReport:
    """What was measured; field names are those of the JSON document (docs/json.md).

    Attributes:
        output: file that the costs were written to.
        units: how many there are.
        linears: how many other linears may join them.
        candidates: code widths.
        totals: code width -> predicted harm of giving every unit this width.
        statistics: name -> least, median and largest value over units.
        provenance: what the numbers depend on.
    """

    output: str
    model_hash: str
    cost: str
    unit: str
    units: int
    linears: int
    candidates: tuple[int, ...]
    totals: dict[str, float]
    statistics: dict[str, tuple[float, float, float]]
    provenance: dict[str, Any]


def report(table: CostTable | ComponentTable, output: str) -> MeasureReport:
    """What a table holds, for people."""
    if isinstance(table, ComponentTable):
        return _component_report(table, output)
    return MeasureReport(
        output=output,
        model_hash=table.model_hash,
        cost=table.cost,
        unit=table.unit,
        units=len(table.units),
        linears=len(table.dense),
        candidates=tuple(spec.bits for spec in table.candidates),
        totals={
            str(spec.bits): sum(row[column] for row in table.costs) for column, spec in enumerate(table.candidates)
        },
        statistics={
            name: (min(values), statistics.median(values), max(values)) for name, values in table.statistics.items()
        },
        provenance=table.provenance,
    )


def _component_report(table: ComponentTable, output: str) -> MeasureReport:
    facts = table.facts
    totals = dict.fromkeys(("0", *(str(spec.bits) for spec in facts.candidates)), 0.0)
    spread: dict[str, list[float]] = {}
    for index in range(len(facts.layers)):
        for name, value in facts.spread[index].items():
            spread.setdefault(f"spread_{name}", []).append(value)
            spread.setdefault(f"dropping_{name}", []).append(facts.drop[index][name])
            part = table.layer(index, name)
            weight = float(part.weight_EH.double().sum())
            totals["0"] += weight * facts.drop[index][name]
            for spec, loss in zip(facts.candidates, part.curve_C.tolist(), strict=True):
                totals[str(spec.bits)] += weight * loss
    return MeasureReport(
        output=output,
        model_hash=facts.model_hash,
        cost=facts.cost,
        unit="component",
        linears=0,
        units=sum(3 * experts * hidden for experts, hidden, _ in facts.layers),
        candidates=(0, *(spec.bits for spec in facts.candidates)),
        totals=totals,
        statistics={
            name: (min(values), statistics.median(values), max(values)) for name, values in sorted(spread.items())
        },
        provenance=facts.provenance,
    )

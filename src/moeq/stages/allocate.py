"""`moeq allocate`: spends a budget by measured costs."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moeq.allocation import decide
from moeq.errors import OptionError
from moeq.recipe import Recipe
from moeq.writing import card_facts
from moeq.writing.decision import Decision


def run(model: str | Path, recipe: Recipe) -> Decision:
    """The plan that a recipe and its costs lead to, with all that follows from it.

    Raises:
        OptionError: the method ranks units, and no costs were given.
        CheckpointError, BudgetError, ArtifactError: the model, the budget or the costs cannot be used.
    """
    if recipe.plan is None and recipe.settled().cost is not None and recipe.costs is None:
        raise OptionError("it needs measured costs", option="costs", fix="make them with moeq measure")
    return decide.draft(model, recipe)


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


def report(decided: Decision, output: str) -> AllocateReport:
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
        allocation=card_facts.counts(inventory, plan),
        linears={str(bits): count for bits, count in sorted(linears.items())},
        layers=card_facts.stored_bits(inventory, plan),
        map=card_facts.heatmap_lines(inventory, plan),
    )

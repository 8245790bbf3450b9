"""From costs of spectral components and a budget to a Plan: thresholds, in true bytes (BitsMoE, section 4).

What the budget pays for: the codes and scales of components, the basis directions that any expert keeps, the maps,
tables and padding. A direction that no expert keeps is left out of the basis, and its bytes are spent on components.

Legend: E experts, H hidden size = directions, I expert width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moeq.artifacts import Inventory, Plan, expert_bytes
from moeq.costs.component_table import ComponentTable
from moeq.costs.spectral_energy import JOINT, check_gated
from moeq.errors import ArtifactError, InfeasibleError, OptionError
from moeq.layouts.spectral.shape import (
    ComponentPlan,
    Form,
    Widths,
    basis_bytes,
    component_bytes,
    kept_directions,
    padding_limit,
    spectral_table_bytes,
    widths_text,
)
from moeq.model_parts import MoeLayer
from moeq.recipe import Recipe
from moeq.solvers.lagrangian import Lagrangian
from moeq.solvers.problem import Problem
from moeq.solvers.threshold import Units, threshold
from moeq.spec import ALIGN, QuantSpec

PROJECTIONS: Final = ("gate", "up", "down")
FITS: Final = 6
"""Times that padding not needed is spent, at most."""
Weights = Mapping[str, NDArray[np.floating]]
"""projection -> factors (E, H)."""


def specs_of(recipe: Recipe) -> tuple[QuantSpec, ...]:
    """How components of each candidate width above 0 are stored."""
    return tuple(
        QuantSpec(bits=bits, group_size=recipe.group_size, levels=recipe.component_levels(bits), layout="spectral")
        for bits in recipe.candidate_bits()
        if bits
    )


def draft(inventory: Inventory, recipe: Recipe, dense: Mapping[str, QuantSpec]) -> Plan:
    """A plan in which every component gets the widest candidate: no other needs more bytes.

    Raises:
        OptionError: the model's experts have no gate, or only 0 bits are allowed.
    """
    for layer in inventory.layers:
        check_gated(layer.projections, layer.path)
    specs = specs_of(recipe)
    if not specs:
        raise OptionError("every component would be dropped", option="candidates", fix="allow a width above 0")
    options = recipe.options_of_cost()
    widest = specs[-1].bits
    layers = tuple(
        {
            name: widths_text(np.full((layer.num_experts, layer.shapes["down"][0]), widest, np.uint8))
            for name in PROJECTIONS
        }
        for layer in inventory.layers
    )
    bits = options.get("basis_bits", 8)
    plan = Plan(
        model_hash=inventory.model_hash,
        method=recipe.method,
        specs=(*specs, *sorted(set(dense.values()))),
        experts=(),
        components=ComponentPlan(basis_bits=bits, joint=bool(options.get("joint", JOINT)), layers=layers),
        expert_bytes=0,
        unit="component",
        cost=recipe.cost,
    )
    plan = replace(plan, dense={path: plan.specs.index(spec) for path, spec in dense.items()})
    return replace(plan, expert_bytes=expert_bytes(plan, inventory))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chosen:
    """Widths of all layers, and what they cost."""

    widths: tuple[dict[str, Widths], ...]
    objective: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Question:
    """What is to be solved, whatever the limit.

    Attributes:
        inventory: the model.
        form: how it is stored.
        table: costs; None gives all components the same.
        widths: candidates, rising.
        codes: count code bits of components instead of bytes.
    """

    inventory: Inventory
    form: Form
    table: ComponentTable | None
    widths: tuple[int, ...]
    codes: bool

    def weigh(self, layer: MoeLayer, width: int) -> int:
        """What a component of a layer takes at a width."""
        inner = layer.shapes["down"][1]
        if self.codes:
            return width * inner
        return component_bytes(self.form.slabs[width], inner) if width else 0

    def toll(self, layer: MoeLayer, projection: str) -> int:
        """What a basis direction of a projection takes, its column in the map included."""
        if self.codes:
            return 0
        shared = self.form.joint and projection == "up"
        experts, hidden = layer.num_experts, layer.shapes["down"][0]
        row = 0 if shared else -(-basis_bytes(self.form.basis_bits, hidden, hidden) // hidden)
        return row + -(-3 * experts // 8)


def solve(
    inventory: Inventory, plan: Plan, table: ComponentTable | None, recipe: Recipe, limit: int, *, codes: bool
) -> Plan:
    """The plan that spends `limit` best.

    Args:
        inventory: the model.
        plan: from `draft`.
        table: costs of the components; None treats all alike.
        recipe: scope and candidates.
        limit: bytes of all layers without their tables, or code bits.
        codes: the limit counts code bits of components.

    Raises:
        InfeasibleError: nothing fits; it says the smallest limit that would.
        ArtifactError: the table lacks candidates, or has another form than this run asks for.
    """
    widths = recipe.candidate_bits()
    if table is not None:
        _check(table, plan, widths)
    question = _Question(inventory=inventory, form=plan.form, table=table, widths=widths, codes=codes)
    if codes:
        return _planned(plan, inventory, _choose(question, recipe, limit))
    tables = len(inventory.layers) * spectral_table_bytes(len(PROJECTIONS))
    padding = sum(padding_limit(plan.form, len(PROJECTIONS), layer.num_experts) for layer in inventory.layers)
    spend = limit - padding
    try:
        best = _planned(plan, inventory, _choose(question, recipe, spend))
    except InfeasibleError as error:
        raise InfeasibleError("the budget is too small", smallest=(error.smallest or 0) + padding) from error
    # Padding that turned out not to be needed is spent; how much more there will be cannot be told in advance.
    step = limit - (best.expert_bytes - tables)
    for _ in range(FITS):
        found = _planned(plan, inventory, _choose(question, recipe, spend + step))
        left = limit - (found.expert_bytes - tables)
        if left < 0:
            step //= 2
        else:
            best, spend, step = found, spend + step, left
        if step < ALIGN:
            break
    return best


def _check(table: ComponentTable, plan: Plan, widths: tuple[int, ...]) -> None:
    known = set(table.candidates)
    for width in widths:
        if width and plan.form.slabs[width] not in known:
            spec = plan.form.slabs[width]
            raise ArtifactError(
                f"the costs do not know {width} bits, group size {spec.group_size}, levels {spec.levels}",
                option="costs",
                fix="measure with the same --candidates, --group-size, --levels and --quantizer",
            )
    facts = table.facts
    if (facts.basis_bits, facts.joint) != (plan.form.basis_bits, plan.form.joint):
        raise ArtifactError(
            f"the costs are of another basis (basis-bits={facts.basis_bits}, joint={str(facts.joint).lower()})",
            option="costs",
            fix="give the same --cost-options that they were measured with",
        )


def _planned(plan: Plan, inventory: Inventory, chosen: _Chosen) -> Plan:
    assert plan.components is not None
    layers = tuple({name: widths_text(widths[name]) for name in PROJECTIONS} for widths in chosen.widths)
    found = replace(
        plan,
        components=replace(plan.components, layers=layers),
        objective=chosen.objective,
        bound=chosen.bound,
    )
    return replace(found, expert_bytes=expert_bytes(found, inventory))


def _choose(question: _Question, recipe: Recipe, limit: int) -> _Chosen:
    layers = list(range(len(question.inventory.layers)))
    if (recipe.scope or "global") == "global":
        return _solve(question, layers, limit)
    total = question.inventory.expert_parameters
    parts = [
        _solve(question, [index], limit * question.inventory.layers[index].parameters // total) for index in layers
    ]
    return _Chosen(
        widths=tuple(part.widths[0] for part in parts),
        objective=sum(part.objective for part in parts),
        bound=sum(part.bound for part in parts),
    )


def _solve(question: _Question, layers: Sequence[int], limit: int) -> _Chosen:
    if question.table is not None and question.table.facts.exact:
        return _solve_exact(question, layers, limit)
    classes, owners = [], []
    forced = 0
    for index in layers:
        layer = question.inventory.layers[index]
        groups = (("gate", "up"), ("down",)) if question.form.joint else (("gate",), ("up",), ("down",))
        for names in groups:
            units, toll = _class(question, index, layer, names)
            # Without 0 bits every direction is there, whatever is chosen.
            forced += 0 if 0 in question.widths else toll
            classes.append(units)
            owners.append((index, names))
    try:
        found = threshold(classes, limit - forced)
    except InfeasibleError as error:
        raise InfeasibleError("the budget is too small", smallest=(error.smallest or 0) + forced) from error
    widths: dict[int, dict[str, Widths]] = {index: {} for index in layers}
    palette = np.array(question.widths, dtype=np.uint8)
    for (index, names), choice in zip(owners, found.choices, strict=True):
        shape = question.inventory.layers[index].num_experts, -1
        for name, part in zip(names, np.split(palette[choice], len(names)), strict=True):
            widths[index][name] = part.reshape(shape)
    return _Chosen(widths=tuple(widths[index] for index in layers), objective=found.objective, bound=found.bound)


def _class(question: _Question, index: int, layer: MoeLayer, names: tuple[str, ...]) -> tuple[Units, int]:
    """The components of projections that share a basis, and what all its directions take together."""
    experts, hidden = layer.num_experts, layer.shapes["down"][0]
    columns = [_curve(question, index, name) for name in names]
    toll = sum(question.toll(layer, name) for name in names)
    open_toll = toll if 0 in question.widths else 0
    weights = [
        np.ones(experts * hidden, np.float32)
        if question.table is None
        else question.table.weights(index, name).reshape(-1)
        for name in names
    ]
    units = Units(
        weights_U=np.concatenate(weights),
        curve_C=np.mean(columns, axis=0),
        bytes_C=np.array([question.weigh(layer, width) for width in question.widths], dtype=np.int64),
        groups_U=np.tile(np.arange(hidden), experts * len(names)),
        tolls_G=np.full(hidden, open_toll, dtype=np.int64),
    )
    return units, toll * hidden


def _curve(question: _Question, index: int, name: str) -> NDArray[np.float64]:
    """D by candidate; at 0 bits what the table says of dropping."""
    if question.table is None:
        return np.array([4.0**-width for width in question.widths])
    known = {spec.bits: i for i, spec in enumerate(question.table.candidates)}
    curve_C = question.table.layer(index, name).curve_C.numpy()
    drop = question.table.facts.drop[index][name]
    return np.array([curve_C[known[width]] if width else drop for width in question.widths])


def _solve_exact(question: _Question, layers: Sequence[int], limit: int) -> _Chosen:
    """Costs of each component's own: the same program with prices per component instead of a shared curve.

    Bases are paid for as a whole first; then those of directions that nobody kept are returned and spent.
    """
    assert question.table is not None
    known = {spec.bits: i for i, spec in enumerate(question.table.candidates)}
    costs, sizes, tolls = [], [], []
    for index in layers:
        layer = question.inventory.layers[index]
        for name in PROJECTIONS:
            part = question.table.layer(index, name)
            assert part.errors_EHC is not None
            errors_UC = part.errors_EHC.flatten(0, 1).numpy()
            dropped_U = part.weight_EH.flatten().numpy() * question.table.facts.drop[index][name]
            costs.append(
                np.stack([errors_UC[:, known[width]] if width else dropped_U for width in question.widths], axis=1)
            )
            row = np.array([question.weigh(layer, width) for width in question.widths], dtype=np.int64)
            sizes.append(np.broadcast_to(row, costs[-1].shape))
            tolls.append(question.toll(layer, name))
    costs_UC, sizes_UC = np.concatenate(costs), np.concatenate(sizes)
    hidden = [question.inventory.layers[index].shapes["down"][0] for index in layers for _ in PROJECTIONS]
    everything = sum(toll * count for toll, count in zip(tolls, hidden, strict=True))
    fixed = everything
    widths: tuple[dict[str, Widths], ...] = ()
    solution = None
    for _ in range(FITS):
        try:
            found = Lagrangian().solve(Problem(costs_UC=costs_UC, sizes_UC=sizes_UC, limit=limit - fixed))
        except InfeasibleError as error:
            raise InfeasibleError("the budget is too small", smallest=(error.smallest or 0) + fixed) from error
        shaped = _shaped(question, layers, found.choice_U)
        kept = [kept_directions(each, joint=question.form.joint) for each in shaped]
        used = sum(
            toll * int(kept_H.sum())
            for toll, kept_H in zip(tolls, (each[name] for each in kept for name in PROJECTIONS), strict=True)
        )
        if used > fixed:
            break
        solution, widths = found, shaped
        if used == fixed:
            break
        fixed = used
    assert solution is not None
    return _Chosen(widths=widths, objective=solution.objective, bound=0.0)


def _shaped(question: _Question, layers: Sequence[int], choice_U: NDArray[np.integer]) -> tuple[dict[str, Widths], ...]:
    palette = np.array(question.widths, dtype=np.uint8)
    result, start = [], 0
    for index in layers:
        layer = question.inventory.layers[index]
        shape = layer.num_experts, layer.shapes["down"][0]
        count = shape[0] * shape[1]
        each = {}
        for name in PROJECTIONS:
            each[name] = palette[choice_U[start : start + count]].reshape(shape)
            start += count
        result.append(each)
    return tuple(result)

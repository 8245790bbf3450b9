"""The files that stages hand to each other: Inventory, CostTable, Plan, EvalResult.

Each is frozen, versioned and has one `validate()`, called when it is made and when it is read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from moeq.codec import Artifact
from moeq.errors import ArtifactError
from moeq.layouts.base import LayerChoice, LayerPlan, part
from moeq.layouts.spectral.shape import ComponentPlan, Form, Widths, parse_widths
from moeq.layouts.tiled.shape import TileForm, fits
from moeq.model_parts import DenseLinear, MoeLayer
from moeq.notebook import Shows, Table
from moeq.spec import EXPERT, QuantSpec, Unit, stored_bytes, table_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory(Artifact):
    """What a source checkpoint holds, as far as moeq needs to know.

    Attributes:
        model_type: the transformers model type.
        architecture: the transformers model class.
        model_hash: identifies config, tensor names and shapes, and samples of the weights.
        layers: the layers of routed experts, in order; those that no module of the model has come last.
        dense: the other linears that may be quantized.
        source_bytes: bytes of all tensors of the source.
        parameters: elements of all tensors of the source.
        element_bytes: bytes of one expert weight in the source.
    """

    KIND: ClassVar[str] = "inventory"

    model_type: str
    architecture: str
    model_hash: str
    layers: tuple[MoeLayer, ...]
    dense: tuple[DenseLinear, ...]
    source_bytes: int
    parameters: int
    element_bytes: int

    def validate(self) -> None:
        """Raise ArtifactError if the inventory contradicts itself."""
        if not self.layers:
            raise ArtifactError("an inventory needs at least one MoE layer")
        for layer in self.layers:
            if set(layer.shapes) != set(layer.sources) or "down" not in layer.shapes or "up" not in layer.shapes:
                raise ArtifactError("shapes and sources must name the same projections", tensor=layer.path)
            if not 1 <= layer.top_k <= layer.num_experts:
                raise ArtifactError(f"top_k {layer.top_k} of {layer.num_experts} experts", tensor=layer.path)
            if min(size for shape in layer.shapes.values() for size in shape) < 1:
                raise ArtifactError("an expert matrix has no elements", tensor=layer.path)

    @property
    def attached(self) -> "Inventory":
        """That of the layers which the model has modules for: what can be calibrated and measured."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.attached))

    @property
    def apart(self) -> bool:
        """Whether experts are modules of their own, in a model that transformers does not have."""
        return any(layer.members for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts of the model."""
        return sum(layer.parameters for layer in self.layers)

    def units(self) -> Iterator[tuple[Unit, tuple[int, int]]]:
        """Every matrix of every expert in storage order, with its shape (N, K)."""
        for index, layer in enumerate(self.layers):
            for expert in range(layer.num_experts):
                for projection in layer.projections:
                    yield Unit(layer=index, expert=expert, projection=projection), layer.shapes[projection]

    def cost_units(self, unit: str) -> Iterator[tuple[Unit, tuple[tuple[int, int], ...]]]:
        """The units of a cost table in storage order, each with the shapes of its matrices.

        Args:
            unit: "matrix" or "expert".
        """
        if unit == "matrix":
            yield from ((each, (shape,)) for each, shape in self.units())
            return
        for index, layer in enumerate(self.layers):
            shapes = tuple(layer.shapes[projection] for projection in layer.projections)
            for expert in range(layer.num_experts):
                yield Unit(layer=index, expert=expert, projection=EXPERT), shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable(Artifact):
    """Predicted harm and stored bytes of each unit under each candidate.

    Attributes:
        model_hash: the model measured.
        cost: name of the cost.
        unit: "expert" or "matrix".
        provenance: what the numbers depend on (tokens hash, seed, versions, options).
        units: the units, in storage order (projection `moeq.spec.EXPERT` when they are experts).
        candidates: the specs a unit may get, by rising stored size.
        costs: unit -> candidate -> predicted harm, not negative.
        sizes: unit -> candidate -> stored bytes.
        statistics: name -> one number per unit that the costs come from (alpha, tokens, ...).
        dense: paths of other linears that may join the program.
        dense_candidates: the specs these may get, by rising stored size.
        dense_costs: linear -> dense candidate -> predicted harm; a last column for leaving it as it is, 0. A row of
            zeros says that nothing was learned of the linear (no token came by): it is left as it is.
        dense_sizes: linear -> dense candidate -> stored bytes, its table included; last those of the source.
    """

    KIND: ClassVar[str] = "cost-table"

    model_hash: str
    cost: str
    unit: str
    provenance: dict[str, Any]
    units: tuple[Unit, ...]
    candidates: tuple[QuantSpec, ...]
    costs: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    statistics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    dense_candidates: tuple[QuantSpec, ...] = ()
    dense_costs: tuple[tuple[float, ...], ...] = ()
    dense_sizes: tuple[tuple[int, ...], ...] = ()

    def validate(self) -> None:
        """Raise ArtifactError on NaN, negative costs, ragged rows or duplicate units."""
        again = "measure again"
        columns, dense_columns = len(self.candidates), len(self.dense_candidates)
        if self.unit not in ("expert", "matrix"):
            raise ArtifactError(f"a cost table cannot have units {self.unit!r}", fix=again)
        if len(set(self.units)) != len(self.units) or len(set(self.dense)) != len(self.dense):
            raise ArtifactError("a cost table names a unit twice", fix=again)
        if not columns or any(len(set(specs)) != len(specs) for specs in (self.candidates, self.dense_candidates)):
            raise ArtifactError("the candidates of a cost table must be different specs, at least one", fix=again)
        for rows, what, keys, width in (
            (self.costs, "costs", self.units, columns),
            (self.sizes, "sizes", self.units, columns),
            (self.dense_costs, "dense_costs", self.dense, dense_columns + 1),
            (self.dense_sizes, "dense_sizes", self.dense, dense_columns + 1),
        ):
            if len(rows) != len(keys) or any(len(row) != width for row in rows):
                raise ArtifactError(f"{what} must have one row per unit and one column per candidate", fix=again)
        for name, values in self.statistics.items():
            if len(values) != len(self.units):
                raise ArtifactError(f"statistic {name!r} must have one number per unit", fix=again)
        for key, row in (*zip(self.units, self.costs, strict=True), *zip(self.dense, self.dense_costs, strict=True)):
            if not all(math.isfinite(cost) and cost >= 0 for cost in row):
                raise ArtifactError(f"unit {key} has a cost that is negative or not finite", fix=again)

    def check_model(self, inventory: Inventory) -> None:
        """Raise ArtifactError unless this table was measured on exactly this model."""
        if self.model_hash != inventory.model_hash:
            message = f"the costs are of model {self.model_hash[:12]}, this is {inventory.model_hash[:12]}"
            raise ArtifactError(message, option="costs", fix="measure this model")
        wanted = tuple(unit for unit, _ in inventory.cost_units(self.unit))
        if self.units != wanted:
            odd = sorted(set(wanted) ^ set(self.units))
            message = "the costs cover other units than the model has: "
            message += f"unit {odd[0]} is in one only" if odd else "their order differs"
            raise ArtifactError(message, option="costs", fix="measure again")
        for (unit, shapes), row in zip(inventory.cost_units(self.unit), self.sizes, strict=True):
            if row != tuple(sum(stored_bytes(spec, shape) for shape in shapes) for spec in self.candidates):
                raise ArtifactError(f"unit {unit} does not take these sizes", option="costs", fix="measure again")
        linears = {linear.path: linear.shape for linear in inventory.dense}
        for path, row in zip(self.dense, self.dense_sizes, strict=True):
            if path not in linears:
                message = f"the costs name {path!r}, which is no linear of the model"
                raise ArtifactError(message, option="costs", fix="measure again")
            table = table_bytes(1, 1)
            if row[:-1] != tuple(stored_bytes(spec, linears[path]) + table for spec in self.dense_candidates):
                raise ArtifactError(f"linear {path} does not take these sizes", option="costs", fix="measure again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Artifact):
    """Which spec every unit gets.

    Attributes:
        model_hash: the model planned for.
        method: name of the method that made the plan.
        specs: the palette; the assignments below index it.
        experts: layer -> expert -> projection (storage order) -> index into `specs`; empty if there are `components`.
        components: the widths of spectral components, for the layout "spectral"; `specs` then has one spec of this
            layout for each width that a component may have.
        dense: path of a linear -> index into `specs`; absent linears stay 16-bit.
        expert_bytes: stored bytes of all routed experts, tables included.
        unit: what a choice was made for: "expert", "matrix" or "component"; None if all were treated alike.
        cost: name of the cost that ranked the units, if one did.
        costs_hash: hash of the cost table.
        objective: predicted harm, if a solver made the plan.
        bound: the solver's proven lower bound of the objective.
        tiles: layer -> projection -> form of its sides, for the layout "tiled"; the specs are then the residuals'.
    """

    KIND: ClassVar[str] = "plan"

    model_hash: str
    method: str
    specs: tuple[QuantSpec, ...]
    experts: tuple[tuple[tuple[int, ...], ...], ...]
    dense: dict[str, int] = field(default_factory=dict)
    expert_bytes: int
    unit: str | None = None
    cost: str | None = None
    costs_hash: str | None = None
    objective: float | None = None
    bound: float | None = None
    components: ComponentPlan | None = None
    tiles: tuple[dict[str, TileForm], ...] = ()

    def validate(self) -> None:
        """Raise ArtifactError if an assignment points outside the palette."""
        used = {index for layer in self.experts for expert in layer for index in expert} | set(self.dense.values())
        if self.components is not None and (self.experts or self.tiles):
            raise ArtifactError("a plan has widths either of matrices or of components", fix="allocate again")
        nothing = not used and self.components is None
        if nothing or (used and (min(used) < 0 or max(used) >= len(self.specs))):
            raise ArtifactError("a plan assigns a spec outside its palette", fix="allocate again")

    @property
    def layout(self) -> str:
        """How the experts are stored, one of `moeq.spec.LAYOUTS`."""
        if self.components is not None:
            return "spectral"
        return "tiled" if self.tiles else self.specs[self.experts[0][0][0]].layout

    @property
    def form(self) -> Form:
        """How components are stored."""
        assert self.components is not None
        dense = set(self.dense.values())
        slabs = {spec.bits: spec for index, spec in enumerate(self.specs) if index not in dense}
        return Form(basis_bits=self.components.basis_bits, joint=self.components.joint, slabs=slabs)

    def widths(self, index: int, layer: MoeLayer) -> dict[str, Widths]:
        """projection -> widths of the components of a layer, (E, H).

        Raises:
            ArtifactError: they are not those of a layer of this shape, or have no spec.
        """
        assert self.components is not None
        texts = self.components.layers[index]
        if set(texts) != set(layer.projections):
            raise ArtifactError("the plan has components of other projections", tensor=layer.path, fix="allocate again")
        shape = layer.num_experts, layer.shapes["down"][0]
        return {name: parse_widths(texts[name], shape) for name in layer.projections}

    def spec(self, unit: Unit, projections: tuple[str, ...]) -> QuantSpec:
        """The spec of one unit, `projections` being those of its layer."""
        return self.specs[self.experts[unit.layer][unit.expert][projections.index(unit.projection)]]

    def layer(self, index: int, layer: MoeLayer) -> LayerPlan:
        """What is decided about one layer; `layer` is the same of the inventory."""
        details: Any = None
        if self.components is not None:
            details = self.form, self.widths(index, layer)
        elif self.tiles:
            details = self.tiles[index]
        choice = LayerChoice(
            specs=self.layer_specs(index) if self.experts else (),
            shapes={name: layer.shapes[name] for name in layer.projections},
            details=details,
        )
        found: LayerPlan = part(self.layout, "shape").planned(choice)
        return found

    def layer_specs(self, layer: int) -> tuple[tuple[QuantSpec, ...], ...]:
        """expert -> projection (storage order) -> spec."""
        return tuple(tuple(self.specs[index] for index in expert) for expert in self.experts[layer])

    def check_model(self, inventory: Inventory) -> None:
        """Raise ArtifactError unless this plan was made for exactly this model."""
        if self.model_hash != inventory.model_hash:
            message = f"the plan is for model {self.model_hash[:12]}, this is {inventory.model_hash[:12]}"
            raise ArtifactError(message, option="plan", fix="allocate a plan for this model")
        wanted = [[len(layer.projections)] * layer.num_experts for layer in inventory.layers]
        if self.components is not None:
            covered = len(self.components.layers) == len(inventory.layers)
        else:
            covered = [[len(expert) for expert in layer] for layer in self.experts] == wanted
        if not covered or (self.tiles and not _tiles_fit(self.tiles, inventory)):
            raise ArtifactError("the plan covers other experts than the model has", option="plan", fix="allocate again")
        unknown = sorted(set(self.dense) - {linear.path for linear in inventory.dense})
        if unknown:
            message = f"the plan rounds {unknown[0]!r}, which is no linear of the model"
            raise ArtifactError(message, option="plan", fix="allocate again")
        if self.expert_bytes != expert_bytes(self, inventory):
            raise ArtifactError("the plan's expert_bytes disagrees with its specs", option="plan", fix="allocate again")


def _tiles_fit(tiles: tuple[dict[str, TileForm], ...], inventory: Inventory) -> bool:
    pairs = zip(tiles, inventory.layers, strict=False)
    return len(tiles) == len(inventory.layers) and all(fits(a, b.num_experts, b.shapes) for a, b in pairs)


def expert_bytes(plan: Plan, inventory: Inventory) -> int:
    """Stored bytes of all routed experts under `plan`, layer tables included."""
    return sum(plan.layer(index, layer).stored_bytes for index, layer in enumerate(inventory.layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult(Artifact, Shows):
    """Measured quality of a model.

    Attributes:
        subject: the model measured.
        reference: the model compared to, if any.
        metrics: name -> value; documented in docs/json.md.
        tokens: predicted tokens measured.
        provenance: texts, seeds, versions, options.
    """

    KIND: ClassVar[str] = "eval-result"

    subject: str
    reference: str | None
    metrics: dict[str, float]
    tokens: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise ArtifactError on values that are not finite."""
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ArtifactError(f"metric {name!r} is not finite", fix="check the model and the text")
        if self.tokens < 0:
            raise ArtifactError("tokens must not be negative")

    def tables(self) -> Iterator[Table]:
        """The metrics."""
        against = f" against {self.reference}" if self.reference else ""
        yield Table(title=f"{self.subject}{against}", header=("metric", "value"), rows=[*self.metrics.items()])

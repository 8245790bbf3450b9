"""Measures a cost on an opened model: settles what is measured, and fills the table."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature as inspect_signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moeq import codec
from moeq.allocation import other_linears, plans
from moeq.allocation.domains import COMBINED, ComponentsOfTexts, by_text, combined
from moeq.artifacts import CostTable, Inventory
from moeq.calibration.backprop import Labels
from moeq.calibration.opening import open_stream, packed_matrices, read_source
from moeq.calibration.spill import SpillPool
from moeq.calibration.tap import Hear
from moeq.calibration.tokens import TokenBatch, first_samples
from moeq.checkpoint.read import Reader
from moeq.costs.base import Asked, Cost, LayerCosts, LayerView, LinearView, WeightsCost
from moeq.costs.component_table import ComponentFacts, ComponentTable, ProjectionCosts, write_table
from moeq.costs.options import check_choice, check_number
from moeq.costs.registry import COSTS, make_cost
from moeq.costs.spectral_energy import SpectralEnergy
from moeq.costs.stand_ins import noise_ratio, stand_in
from moeq.errors import OptionError
from moeq.fleet import HERE, Fleet
from moeq.format.manifest import read_manifest
from moeq.model_parts import DenseLinear, MatrixSource
from moeq.progress import Progress
from moeq.recipe import Recipe
from moeq.runtime.load import pick_device
from moeq.spec import QuantSpec, TensorInfo, stored_bytes
from moeq.version import __version__
from moeq.writing.calibration_text import calibration_tokens
from moeq.writing.quantizer_choice import dense_name, quantizer_options

SAMPLES = 48
"""Sequences that costs with gradients are measured on, if there are more: their ranks hardly change beyond."""
OWN_OPTIONS = ("labels", "samples", "texts")
"""Options of a cost that say what it is measured on; the cost itself does not see them."""
LABELS = ("text", "sampled")
"""What the gradients' loss predicts: the text's own next tokens, or tokens drawn from the model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """What is measured, and how.

    Attributes:
        source: the original checkpoint.
        inventory: what it holds.
        headers: its tensors.
        recipe: settled: cost, its options, unit.
        candidates: the specs a unit may get.
        tokens: calibration tokens, if the cost needs any.
    """

    source: Path
    inventory: Inventory
    headers: dict[str, TensorInfo]
    recipe: Recipe
    candidates: tuple[QuantSpec, ...]
    tokens: TokenBatch | None

    @property
    def provenance(self) -> dict[str, Any]:
        """What the numbers depend on."""
        recipe = self.recipe
        context = None if recipe.context is None else read_manifest(Path(recipe.context))
        facts: dict[str, Any] = {
            "options": codec.encode(recipe.options_of_cost()),
            "seed": recipe.seed,
            "tokens_hash": None if self.tokens is None else self.tokens.hash,
            "source": None if self.tokens is None else self.tokens.source,
            "context": None if context is None else codec.digest(context),
            "moeq_version": __version__,
        }
        if recipe.joining():
            facts["dense"] = {"kinds": list(recipe.joining()), "quantizer": dense_name(recipe), "gain": recipe.gain}
        if context is not None and context.model_hash != self.inventory.model_hash:
            raise OptionError(
                "it was not made from this model", option="context", fix="give a packed checkpoint of this model"
            )
        return facts


def subject(
    source: Path, inventory: Inventory, headers: dict[str, TensorInfo], recipe: Recipe, budget: float | None = None
) -> Subject:
    """Settle what is to be measured; reads the calibration text.

    Args:
        source: the original checkpoint.
        inventory: what it holds.
        headers: its tensors.
        recipe: the options.
        budget: mean bits that candidates must reach above.
    """
    recipe = recipe.settled()
    if recipe.cost is None:
        raise OptionError(
            f"method {recipe.method} ranks nothing", option="cost", fix="choose a --cost, or a method that has one"
        )
    cost, _ = _make(recipe)
    _combination(recipe)
    if recipe.joining():
        check_joining(recipe)
    tokens = None
    if cost.needs != "weights":
        tokens, _ = calibration_tokens(source, recipe, f"cost {recipe.cost}")
        tokens = None if tokens is None else first_samples(tokens, _samples(recipe))
    return Subject(
        source=source,
        inventory=inventory,
        headers=headers,
        recipe=recipe,
        candidates=plans.candidate_specs(recipe, budget),
        tokens=tokens,
    )


def table(
    what: Subject,
    progress: Progress | None = None,
    scratch: Path | None = None,
    output: Path | None = None,
    fleet: Fleet = HERE,
) -> CostTable | ComponentTable:
    """Measure; see `run`.

    Args:
        what: from `subject`.
        progress: called as work is done.
        scratch: where activations may be spilled; the system's temporary directory by default.
        output: where costs of components are written.
        fleet: who measures.
    """
    recipe, tokens = what.recipe, what.tokens
    how = _combination(recipe)
    if tokens is None or len(tokens.domains) < 2 or how == "pooled":
        return _pooled(what, progress, scratch, output, fleet)
    if fleet is HERE or recipe.has_components:
        tables = [_pooled(replace(what, tokens=batch), progress, scratch, None) for batch in by_text(tokens)]
    else:
        batches = list(by_text(tokens))
        tables = []
        for found in fleet.spread(partial(_of_text, what, scratch), batches):
            tables.append(found)
            if progress is not None:
                progress("texts", len(tables), len(batches))
    names = tuple(domain.name for domain in tokens.domains)
    shares = [tokens.domain_N.count(number) / len(tokens.domain_N) for number in range(len(names))]
    components = [table for table in tables if isinstance(table, ComponentTable)]
    if components:
        together = ComponentsOfTexts(components, shares, how)
        return _stored(replace(together.facts(), provenance=what.provenance), together.layers(), output)
    matrices = [table for table in tables if isinstance(table, CostTable)]
    return replace(combined(matrices, names, shares, how), provenance=what.provenance)


def _of_text(what: Subject, scratch: Path | None, tokens: TokenBatch) -> CostTable | ComponentTable:
    return _pooled(replace(what, tokens=tokens), None, scratch, None)


def _pooled(
    what: Subject, progress: Progress | None, scratch: Path | None, output: Path | None, fleet: Fleet = HERE
) -> CostTable | ComponentTable:
    """One table of all tokens."""
    recipe, inventory = what.recipe, what.inventory
    device = pick_device(recipe.device)
    cost, labels = _make(recipe)
    joined = other_linears.linears(inventory, recipe)
    linears = other_linears.linear_cost(recipe, _options(recipe)) if joined else None
    candidates = tuple(map(stand_in, what.candidates)) if _stands_in(recipe) else what.candidates
    with Reader(what.source, what.headers) as reader:
        view = partial(_view, what, reader, candidates, device)
        views = [_linear_view(reader, linear, recipe, device) for linear in joined]
        if cost.needs == "weights":
            for each in views:
                assert linears is not None
                linears.visit(each, None)
            layers = range(len(inventory.layers))
            away = fleet is not HERE and isinstance(cost, WeightsCost)
            parts = fleet.spread(partial(_of_layer, what, candidates), layers) if away else None
            for layer in layers:
                if parts is None:
                    cost.visit(view(layer), None)
                else:
                    assert isinstance(cost, WeightsCost)
                    cost.take(next(parts))
                if progress is not None:
                    progress("layers", layer + 1, len(inventory.layers))
        else:
            hears = {} if linears is None else {each.path: partial(linears.visit, each) for each in views}
            _stream(what, cost, labels, view, hears, device, progress, scratch)
    if isinstance(cost, SpectralEnergy):
        return _write(what, cost, output)
    num_tokens = 0 if what.tokens is None else what.tokens.ids_NT.numel()
    return _with_linears(_assemble(what, cost.result()), what, {} if linears is None else linears.result(num_tokens))


def _view(
    what: Subject, reader: Reader, candidates: tuple[QuantSpec, ...], device: torch.device, index: int
) -> LayerView:
    layer = what.inventory.layers[index]
    return LayerView(
        index=index,
        layer=layer,
        read=partial(read_source, reader, layer),
        candidates=candidates,
        unit=str(what.recipe.unit),
        device=device,
    )


def _of_layer(what: Subject, candidates: tuple[QuantSpec, ...], index: int) -> Cost | SpectralEnergy:
    """The recipe's cost after it saw the weights of one layer."""
    cost, _ = _make(what.recipe)
    with Reader(what.source, what.headers) as reader:
        cost.visit(_view(what, reader, candidates, pick_device(what.recipe.device), index), None)
    return cost


def _linear_view(reader: Reader, linear: DenseLinear, recipe: Recipe, device: torch.device) -> LinearView:
    source = MatrixSource(name=linear.source, stacked=False)
    return LinearView(
        path=linear.path,
        block=linear.block,
        read=partial(reader.matrix, source, 0, linear.shape),
        candidates=other_linears.specs(recipe),
        device=device,
    )


def _with_linears(table: CostTable, what: Subject, costs: Mapping[str, tuple[float, ...]]) -> CostTable:
    """The table with rows of the linears that join; of zeros where nothing was heard of one."""
    joined = other_linears.linears(what.inventory, what.recipe)
    if not joined:
        return table
    specs = other_linears.specs(what.recipe)
    found = replace(
        table,
        dense=tuple(linear.path for linear in joined),
        dense_candidates=specs,
        dense_costs=tuple((*costs.get(linear.path, (0.0,) * len(specs)), 0.0) for linear in joined),
        dense_sizes=tuple(other_linears.sizes(linear, what.recipe, what.headers) for linear in joined),
    )
    found.validate()
    return found


def check_joining(recipe: Recipe) -> None:
    """Raise OptionError unless other linears may join the experts of a settled recipe."""
    other_linears.linear_cost(recipe, _options(recipe))


def _write(what: Subject, cost: SpectralEnergy, output: Path | None) -> ComponentTable:
    """The costs of components, in their file."""
    layers = list(cost.layers())
    facts = ComponentFacts(
        model_hash=what.inventory.model_hash,
        cost=str(what.recipe.cost),
        provenance=what.provenance,
        candidates=what.candidates,
        basis_bits=cost.basis_bits,
        joint=cost.joint,
        exact=cost.exact,
        drop=cost.dropping(),
        layers=tuple((layer.num_experts, *layer.shapes["down"]) for layer in what.inventory.layers),
        spread=tuple({name: part.spread for name, part in layer.items()} for layer in layers),
        tokens=cost.tokens(),
    )
    return _stored(facts, layers, output)


def _stored(facts: ComponentFacts, layers: Iterable[dict[str, ProjectionCosts]], output: Path | None) -> ComponentTable:
    home = None if output is not None else Path(tempfile.mkdtemp(prefix="moeq-costs-"))
    path = output if home is None else home / "costs.safetensors"
    assert path is not None
    write_table(path, facts, layers)
    return ComponentTable(path, home)


def _stream(
    what: Subject,
    cost: Cost | SpectralEnergy,
    labels: Labels,
    view: Callable[[int], LayerView],
    hears: Mapping[str, Hear],
    device: torch.device,
    progress: Progress | None,
    scratch: Path | None,
) -> None:
    assert what.tokens is not None
    recipe = what.recipe
    directory = what.source if recipe.context is None else Path(recipe.context)
    rounded = packed_matrices(directory) if recipe.round_context else None

    def visit(layer: int, experts: nn.Module, asked: Asked) -> None:
        assert experts is asked.experts
        seen = view(layer)
        cost.visit(seen if rounded is None else replace(seen, read=rounded(layer)), asked)

    with (
        tempfile.TemporaryDirectory(dir=scratch, prefix=".moeq-") as work,
        open_stream(directory, what.inventory, device=device, scratch=Path(work), progress=progress) as stream,
    ):
        if isinstance(cost, SpectralEnergy):
            cost.keep_bases_in(SpillPool(Path(work), in_memory=0))
        gradients = cost.needs == "gradients"
        stream.run(what.tokens.ids_NT, visit, gradients=gradients, labels=labels, seed=recipe.seed, linears=hears)


def _combination(recipe: Recipe) -> str:
    """How the costs of several texts are combined; bases for the inputs are made by all texts together."""
    options = recipe.options_of_cost()
    shared = recipe.has_components and options.get("metric") == "inputs"
    how = options.get("texts", "pooled" if shared else "mean")
    check_choice("texts", how, ("pooled",) if shared else COMBINED)
    return str(how)


def _samples(recipe: Recipe) -> int:
    """How many sequences the recipe's cost is measured on; 0 for all."""
    given = recipe.options_of_cost().get("samples", SAMPLES if recipe.cost == "fisher" else 0)
    check_number("samples", given, whole=True)
    return int(given)


def _make(recipe: Recipe) -> tuple[Cost | SpectralEnergy, Labels]:
    """The recipe's cost, and the labels that gradients are taken for.

    What the recipe says for all stages (seed, length of sequences, options of the quantizer) goes to costs that ask for
    it and were not told otherwise.
    """
    labels: Labels = recipe.options_of_cost().get("labels", "text")
    if labels not in LABELS:
        raise OptionError(
            f"{labels!r} is not supported", option="cost-options", fix=f"choose one of {', '.join(LABELS)}"
        )
    return make_cost(str(recipe.cost), **_options(recipe)), labels


def _options(recipe: Recipe) -> dict[str, Any]:
    """The options that the recipe's cost is made with."""
    name = str(recipe.cost)
    options = {key: value for key, value in recipe.options_of_cost().items() if key not in OWN_OPTIONS}
    if name in COSTS:
        wanted = inspect_signature(COSTS[name]).parameters
        if recipe.has_components and not str(recipe.quantizer).startswith("gptq"):
            options.setdefault("perturb", recipe.quantizer)
        if recipe.served.dataless:  # making up for errors takes about the same share off at every width
            options = {key: recipe.served.dataless for key in ("perturb", "quantizer") if key in wanted} | options
        common: dict[str, Any] = {"seed": recipe.seed, "seqlen": recipe.seqlen}
        perturb = options.get("perturb", wanted["perturb"].default if "perturb" in wanted else None)
        common |= quantizer_options(recipe, str(perturb))
        options = {key: value for key, value in common.items() if key in wanted} | options
    return options


def _stands_in(recipe: Recipe) -> str:
    """What rounds plain levels in the place of trellises; empty if the cost rounds to these themselves, or nothing."""
    options, wanted = _options(recipe), inspect_signature(COSTS[str(recipe.cost)]).parameters
    chosen = {name: options.get(name, parameter.default) for name, parameter in wanted.items()}
    found = str(chosen.get("perturb", chosen.get("quantizer", "")))
    if recipe.quantizer != "trellis" or chosen.get("noise") == "paper":
        return ""
    return "" if found == "trellis" else found


def _assemble(what: Subject, layers: list[LayerCosts]) -> CostTable:
    units = list(what.inventory.cost_units(str(what.recipe.unit)))
    names = sorted({name for layer in layers for name in layer.statistics})
    rounder = _stands_in(what.recipe)
    ratio_C = np.array([noise_ratio(spec, rounder) if rounder else 1.0 for spec in what.candidates])
    found = CostTable(
        model_hash=what.inventory.model_hash,
        cost=str(what.recipe.cost),
        unit=str(what.recipe.unit),
        provenance=what.provenance,
        units=tuple(unit for unit, _ in units),
        candidates=what.candidates,
        costs=tuple(tuple(map(float, row * ratio_C)) for layer in layers for row in layer.costs_UC),
        sizes=tuple(
            tuple(sum(stored_bytes(spec, shape) for shape in shapes) for spec in what.candidates) for _, shapes in units
        ),
        statistics={
            name: tuple(float(value) for layer in layers for value in layer.statistics[name]) for name in names
        },
    )
    found.validate()
    return found

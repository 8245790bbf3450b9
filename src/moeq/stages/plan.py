"""`moeq plan`: what a run would do and need, before any weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeq.allocation import decide, measuring, other_linears, plans
from moeq.arch.meta import build_meta_model
from moeq.arch.mtp import mtp_tensors
from moeq.artifacts import CostTable
from moeq.calibration.opening import block_paths
from moeq.calibration.tokens import Domain
from moeq.checkpoint.read import read_headers
from moeq.checkpoint.rounded.registry import FORMATS
from moeq.costs.component_table import load_table
from moeq.costs.registry import make_cost
from moeq.errors import OptionError
from moeq.notebook import Shows, Table
from moeq.quantizers.registry import QUANTIZERS
from moeq.recipe import Recipe
from moeq.report.tables import human_bytes
from moeq.spec import WHOLE_ROW
from moeq.stages import auto
from moeq.writing import card_facts, weight_families
from moeq.writing.calibration_text import tokens_for
from moeq.writing.decision import Decision
from moeq.writing.quantizer_choice import chosen_quantizer

READ_WRITE_BYTES_PER_SECOND = 0.5e9
"""A modest disk; only for the rough time estimate."""
ALONE = 0.05
"""What one process does by itself, of the time that one core takes for all: a guess (docs/scale.md)."""
BASE_RAM = 600 * 2**20
"""The interpreter with torch and transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """What a run with --ray would need; estimates (docs/scale.md).

    Attributes:
        count: workers of one core each.
        seconds: of rounding and writing, measuring of costs included.
        ram_bytes: of one worker.
        moved_bytes: what workers read and write in files that all see: weights, inputs, results.
        useful: workers that have something to do all the time; more change nothing.
    """

    count: int
    seconds: float
    ram_bytes: int
    moved_bytes: int
    useful: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport(Shows):
    """What `moeq quantize` with the same options would do; field names are those of the JSON document.

    Attributes:
        families: sizes by kind of tensor.
        allocation: code bits -> expert matrices that get them; empty while costs must still be measured.
        tiles: projection -> what its experts share in tiles, in words; empty if the layout has none.
        calibration: what would be used of each calibration text.
        decided: the plan is the one that quantize would follow; false if costs must be measured first.
        quantized: kinds of linears that are quantized beside the experts.
        untouched: kinds of tensors that stay as they are.
        ram_bytes: estimate of peak memory, without quality measurement.
        disk_bytes: what the output directory will take.
        seconds: rough estimate on two CPU cores.
        efforts: of method auto: effort -> rough seconds; empty for others.
        workers: what it takes when work is spread, None if nobody asked.
        warnings: what the user should know before starting.
    """

    model: str
    model_type: str
    architecture: str
    method: str
    quantizer: str
    plan_hash: str
    layers: int
    experts_per_layer: int
    expert_parameters: int
    source_bytes: int
    stored_bytes: int
    expert_bytes: int
    expert_bits_per_weight: float
    families: dict[str, weight_families.Family]
    allocation: dict[str, int]
    tiles: dict[str, str]
    calibration: tuple[Domain, ...]
    decided: bool
    quantized: tuple[str, ...]
    untouched: tuple[str, ...]
    ram_bytes: int
    disk_bytes: int
    seconds: float
    efforts: dict[str, float]
    workers: Workers | None
    warnings: tuple[str, ...]

    def tables(self) -> Iterator[Table]:
        """Sizes by family."""
        yield weight_families.table(
            f"{self.architecture}: {human_bytes(self.source_bytes)} -> {human_bytes(self.stored_bytes)}", self.families
        )


def run(model: str | Path, recipe: Recipe, workers: int | None = None) -> PlanReport:
    """Everything `moeq quantize` decides before it reads weights.

    Args:
        model: local directory or hub id.
        recipe: all options.
        workers: how many there would be with --ray.

    Raises:
        CheckpointError, BudgetError, OptionError: as `moeq quantize` would.
    """
    decision = decide.draft(model, recipe)
    recipe = auto.within(recipe, decision) if auto.tries(recipe) else recipe
    expected = auto.efforts(decision)
    inventory, plan = decision.inventory, decision.plan
    tokens, _ = tokens_for(decision.source, decision.recipe, chosen_quantizer(decision.recipe))
    if not decision.decided:
        measuring.subject(decision.source, inventory, decision.headers, decision.recipe)
    if tokens is not None and QUANTIZERS[str(decision.recipe.quantizer)].needs_hessian:
        block_paths(inventory, build_meta_model(decision.source))
    rows = weight_families.families(inventory, decision.headers, plan)
    packed = {linear.kind for linear in inventory.dense if linear.path in plan.dense}
    return PlanReport(
        model=str(decision.source),
        model_type=inventory.model_type,
        architecture=inventory.architecture,
        method=plan.method,
        quantizer=str(decision.recipe.quantizer),
        plan_hash=plan.hash,
        layers=len(inventory.layers),
        experts_per_layer=inventory.layers[0].num_experts,
        expert_parameters=inventory.expert_parameters,
        source_bytes=inventory.source_bytes,
        stored_bytes=decision.sizes.total,
        expert_bytes=plan.expert_bytes,
        expert_bits_per_weight=8 * plan.expert_bytes / inventory.expert_parameters,
        families=rows,
        allocation=card_facts.counts(inventory, plan) if decision.decided else {},
        tiles=card_facts.shared(inventory, plan),
        calibration=() if tokens is None else tokens.domains,
        decided=decision.decided,
        quantized=("experts", *sorted(packed)),
        untouched=tuple(sorted((set(rows) | {"other"}) - packed - {"experts"})),
        ram_bytes=_ram(decision),
        disk_bytes=decision.disk_bytes,
        seconds=_moving_seconds(decision) + (expected[recipe.effort or auto.USUAL] if expected else _seconds(decision)),
        efforts=expected,
        workers=None if workers is None else _workers(decision, workers),
        warnings=_warnings(decision),
    )


def _ram(decision: Decision) -> int:
    inventory, recipe = decision.inventory, decision.recipe
    largest = max(rows * columns for layer in inventory.layers for rows, columns in layer.shapes.values())
    scratch = max(decision.plan.layer(index, layer).scratch_bytes for index, layer in enumerate(inventory.layers))
    if not QUANTIZERS[str(recipe.quantizer)].needs_hessian:
        return BASE_RAM + 24 * largest + scratch
    tokens = recipe.nsamples * recipe.seqlen
    hidden = inventory.layers[0].shapes["down"][0]
    widest = max(columns for layer in inventory.layers for _, columns in layer.shapes.values())
    block = sum(2 * linear.shape[0] * linear.shape[1] for linear in inventory.dense if linear.block) // max(
        1, len({linear.block for linear in inventory.dense if linear.block})
    )
    # Inputs, answers and two streams of hidden states; one Hessian with its factors; one expert; one block.
    return BASE_RAM + tokens * hidden * 14 + 5 * 4 * widest**2 + 24 * largest + block + scratch


def _workers(decision: Decision, count: int) -> Workers:
    """Experts of a layer are rounded side by side where there is text, layers where there is none."""
    if count < 1:
        raise OptionError(f"{count} is too small", option="workers", fix="give 1 or more")
    inventory, recipe = decision.inventory, decision.recipe
    layers = inventory.layers
    seconds = 2 * _seconds(decision)  # on one core
    largest = max(rows * columns for layer in layers for rows, columns in layer.shapes.values())
    expert = max(sum(rows * columns for rows, columns in layer.shapes.values()) for layer in layers)
    ram = BASE_RAM + 24 * largest
    moved = 2 * inventory.expert_parameters  # weights, read once by one worker or another
    if not QUANTIZERS[str(recipe.quantizer)].needs_hessian:
        pieces = len(layers)
        moved += decision.plan.expert_bytes
    else:
        pieces = min(layer.num_experts for layer in layers)
        widest = max(columns for layer in layers for _, columns in layer.shapes.values())
        ram += 5 * 4 * widest**2 + 4 * expert
        tokens, hidden = recipe.nsamples * recipe.seqlen, layers[0].shapes["down"][0]
        # Of the inputs, which are mapped, a worker reads the rows of its experts; codes come back a byte each, answers
        # as they are.
        rows = sum(layer.top_k + min(count, layer.top_k) for layer in layers)
        moved += inventory.expert_parameters + 2 * tokens * hidden * rows
    rounds = -(-pieces // count) / pieces
    spread = seconds * rounds
    if not decision.decided and recipe.cost is not None:
        spread += auto.MEASURING * seconds / (count if make_cost(recipe.cost).needs == "weights" else 1)
    return Workers(
        count=count,
        seconds=_moving_seconds(decision) + spread + ALONE * seconds,
        ram_bytes=ram,
        moved_bytes=moved,
        useful=pieces,
    )


def _moving_seconds(decision: Decision) -> float:
    return (decision.inventory.source_bytes + decision.sizes.total) / READ_WRITE_BYTES_PER_SECOND


def _seconds(decision: Decision) -> float:
    return decision.inventory.expert_parameters / QUANTIZERS[str(decision.recipe.quantizer)].weights_per_second


def _rounded(decision: Decision) -> list[str]:
    """What becomes of weights that were rounded before and are not packed now."""
    rounded = {name: info for name, info in decision.headers.items() if info.rounded is not None}
    if not rounded:
        return []
    copied = {tensor.name for shard in decision.shards if shard.layer is None for tensor in shard.tensors}
    kept = [info for name, info in rounded.items() if name in copied]
    now = sum(info.stop - info.start for info in kept)
    before = sum(part.stop - part.start for info in kept for part in info.stored)
    titles = sorted({FORMATS[info.rounded.form].title for info in rounded.values() if info.rounded is not None})
    text = f"the source is {' and '.join(titles)}: {len(rounded)} weights are decoded"
    if kept:
        text += (
            f"; {len(kept)} that are not packed are kept in bfloat16, {now} bytes instead of {before} (--dense-bits 8)"
        )
    return [text]


def _constrained(decision: Decision) -> list[str]:
    """What it costs in predicted loss that all experts of a layer are alike; known where costs are."""
    recipe, plan = decision.recipe, decision.plan
    if not recipe.served.alike or plan.objective is None or not decision.decided or recipe.costs is None:
        return []
    table = load_table(Path(recipe.costs))
    assert isinstance(table, CostTable)
    beside = other_linears.chosen_bytes(table, decision.inventory, recipe, plan)
    free = plans.plan_within(decision.inventory, table, recipe, plan.expert_bytes + beside, freely=True)
    if not free.objective:
        return []
    more = 100 * (plan.objective / free.objective - 1)
    what = {"layer": "a layer", "kind": "gate, for up and for down of a layer"}[recipe.served.alike]
    return [f"--serve {recipe.serve}: one width for {what} costs {more:.1f} % of predicted loss at the same bytes"]


def _warnings(decision: Decision) -> tuple[str, ...]:
    found, recipe = [], decision.recipe
    if not decision.decided:
        found.append(
            f"the plan is decided when {decision.recipe.cost} costs are measured; sizes are those of the budget"
        )
    found += _rounded(decision) + _constrained(decision)
    extra = {} if decision.inventory.apart else mtp_tensors(decision.source, read_headers(decision.source))
    if extra:
        words = {
            "keep": "copied as they are; --mtp pack packs their experts, --mtp drop leaves them out",
            "pack": "copied as they are, but for their experts",
            "drop": "left out",
        }[recipe.mtp]
        found.append(
            f"{len(extra)} tensors of layers that predict further tokens, which transformers ignores, are {words}"
        )
    bits = 8 * decision.plan.expert_bytes / decision.inventory.expert_parameters
    if bits < 4 and decision.plan.components is None and not QUANTIZERS[str(recipe.quantizer)].needs_hessian:
        found.append("below 4 bits a calibrated quantizer (--quantizer gptq --calibration FILE) keeps far more quality")
    widths = {columns for layer in decision.inventory.layers for _, columns in layer.shapes.values()}
    if recipe.group_size != WHOLE_ROW and any(columns % recipe.group_size for columns in widths):
        found.append(
            f"group size {recipe.group_size} does not divide {min(w for w in widths if w % recipe.group_size)}: "
            "the last group of each row is shorter"
        )
    return tuple(found)

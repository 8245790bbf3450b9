"""`moeq plan`: what a run would do and need, before any weight is read."""

from dataclasses import dataclass
from pathlib import Path

from moeq.recipe import Recipe
from moeq.spec import WHOLE_ROW
from moeq.stages import card, summary
from moeq.stages import setup as setup_stage
from moeq.stages.setup import Setup

READ_WRITE_BYTES_PER_SECOND = 0.5e9
"""A modest disk; only for the rough time estimate."""
WEIGHTS_PER_SECOND = {
    "minmax": 600e6,
    "rtn": 400e6,
    "hqq": 250e6,
    "alternating": 20e6,
    "gptq": 4e6,
    "gptq-mc": 4e6,
    "vector": 0.7e6,
}
"""Rounded weights per second on two CPU cores; only for the rough time estimate."""
CALIBRATED = ("gptq", "vector")
"""Beginnings of the names of quantizers that see the inputs."""
BASE_RAM = 600 * 2**20
"""The interpreter with torch and transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What `moeq quantize` with the same options would do; field names are those of the JSON document.

    Attributes:
        families: sizes by kind of tensor.
        allocation: code bits -> expert matrices that get them; empty while costs must still be measured.
        tiles: projection -> what its experts share in tiles, in words; empty if the layout has none.
        decided: the plan is the one that quantize would follow; false if costs must be measured first.
        quantized: kinds of linears that are quantized beside the experts.
        untouched: kinds of tensors that stay as they are.
        ram_bytes: estimate of peak memory, without quality measurement.
        disk_bytes: what the output directory will take.
        seconds: rough estimate on two CPU cores.
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
    families: dict[str, summary.Family]
    allocation: dict[str, int]
    tiles: dict[str, str]
    decided: bool
    quantized: tuple[str, ...]
    untouched: tuple[str, ...]
    ram_bytes: int
    disk_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def run(model: str | Path, recipe: Recipe) -> PlanReport:
    """Everything `moeq quantize` decides before it reads weights.

    Raises:
        CheckpointError, BudgetError, OptionError: as `moeq quantize` would.
    """
    setup = setup_stage.setup(model, recipe)
    inventory, plan = setup.inventory, setup.plan
    rows = summary.families(inventory, setup.headers, plan)
    packed = {linear.kind for linear in inventory.dense if linear.path in plan.dense}
    sizes = setup.sizes
    return PlanReport(
        model=str(setup.source),
        model_type=inventory.model_type,
        architecture=inventory.architecture,
        method=plan.method,
        quantizer=str(setup.recipe.quantizer),
        plan_hash=plan.hash,
        layers=len(inventory.layers),
        experts_per_layer=inventory.layers[0].num_experts,
        expert_parameters=inventory.expert_parameters,
        source_bytes=inventory.source_bytes,
        stored_bytes=sizes.total,
        expert_bytes=plan.expert_bytes,
        expert_bits_per_weight=8 * plan.expert_bytes / inventory.expert_parameters,
        families=rows,
        allocation=card.counts(inventory, plan) if setup.decided else {},
        tiles=card.tiles(plan),
        decided=setup.decided,
        quantized=("experts", *sorted(packed)),
        untouched=tuple(sorted((set(rows) | {"other"}) - packed - {"experts"})),
        ram_bytes=_ram(setup),
        disk_bytes=setup.disk_bytes,
        seconds=_seconds(setup),
        warnings=_warnings(setup),
    )


def _ram(setup: Setup) -> int:
    inventory, recipe = setup.inventory, setup.recipe
    largest = max(rows * columns for layer in inventory.layers for rows, columns in layer.shapes.values())
    # Tiles need all experts of a projection at once, in float32, twice while they are fitted.
    tiled = max(layer.num_experts for layer in inventory.layers) * 8 * largest if setup.plan.tiles else 0
    if not str(recipe.quantizer).startswith(CALIBRATED):
        return BASE_RAM + 24 * largest + tiled
    tokens = recipe.nsamples * recipe.seqlen
    hidden = inventory.layers[0].shapes["down"][0]
    widest = max(columns for layer in inventory.layers for _, columns in layer.shapes.values())
    block = sum(2 * linear.shape[0] * linear.shape[1] for linear in inventory.dense if linear.block) // max(
        1, len({linear.block for linear in inventory.dense if linear.block})
    )
    # Inputs, answers and two streams of hidden states; one Hessian with its factors; one expert; one block.
    return BASE_RAM + tokens * hidden * 14 + 5 * 4 * widest**2 + 24 * largest + block + tiled


def _seconds(setup: Setup) -> float:
    inventory = setup.inventory
    moved = (inventory.source_bytes + setup.sizes.total) / READ_WRITE_BYTES_PER_SECOND
    return moved + inventory.expert_parameters / WEIGHTS_PER_SECOND[str(setup.recipe.quantizer)]


def _warnings(setup: Setup) -> tuple[str, ...]:
    found = []
    if not setup.decided:
        found.append(f"the plan is decided when {setup.recipe.cost} costs are measured; sizes are those of the budget")
    bits = 8 * setup.plan.expert_bytes / setup.inventory.expert_parameters
    recipe = setup.recipe
    if bits < 4 and setup.plan.components is None and not str(recipe.quantizer).startswith(CALIBRATED):
        found.append("below 4 bits a calibrated quantizer (--quantizer gptq --calibration FILE) keeps far more quality")
    widths = {columns for layer in setup.inventory.layers for _, columns in layer.shapes.values()}
    if recipe.group_size != WHOLE_ROW and any(columns % recipe.group_size for columns in widths):
        found.append(
            f"group size {recipe.group_size} does not divide {min(w for w in widths if w % recipe.group_size)}: "
            "the last group of each row is shorter"
        )
    return tuple(found)

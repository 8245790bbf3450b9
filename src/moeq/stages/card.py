"""From a run to the facts of its model card."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from moeq.artifacts import PROJECTIONS, Inventory, Plan, side_bytes
from moeq.calibration.experts import MIN_TOKENS
from moeq.calibration.tokens import TokenBatch
from moeq.components import blob_bytes, kept_directions, spectral_table_bytes
from moeq.report.card import CalibrationFacts, CardFacts, RouterFacts
from moeq.report.heatmap import AllocationMap, allocation_svg, allocation_text, svg_limit
from moeq.report.spectrum import BINS, SpectrumMap, spectrum_limit, spectrum_svg, spectrum_text
from moeq.spec import stored_bytes, table_bytes
from moeq.version import __version__


def allocation(inventory: Inventory, plan: Plan) -> tuple[dict[int, int], ...]:
    """MoE layer -> code bits -> expert matrices, or components."""
    if plan.components is not None:
        return tuple(_component_counts(inventory, plan, index) for index in range(len(inventory.layers)))
    return tuple(
        dict(Counter(spec.bits for expert in plan.layer_specs(index) for spec in expert))
        for index in range(len(inventory.layers))
    )


def counts(inventory: Inventory, plan: Plan) -> dict[str, int]:
    """Code bits -> expert matrices (or components) that get them, by rising width."""
    total: Counter[int] = Counter()
    for layer in allocation(inventory, plan):
        total.update(layer)
    return {str(bits): total[bits] for bits in sorted(total)}


def tiles(plan: Plan) -> dict[str, str]:
    """Projection -> what is shared in tiles, in words; empty for other layouts."""
    words: dict[str, list[str]] = {}
    for layer in plan.tiles:
        for name, form in layer.items():
            factors = f"rank {form.rank} in {form.rows} x {form.columns} tiles" if form.rank else "no factors"
            rotated = "" if form.orders == "none" else f", a rotation for each {form.orders}"
            words.setdefault(name, []).append(factors + rotated)
    return {name: " or ".join(dict.fromkeys(each)) for name, each in words.items()}


def is_mixed(plan: Plan) -> bool:
    """Whether expert matrices (or components) differ in width, so that a picture shows something."""
    if plan.components is not None:
        return True
    return len({plan.specs[index].bits for layer in plan.experts for expert in layer for index in expert}) > 1


def allocation_map(inventory: Inventory, plan: Plan) -> AllocationMap:
    """The plan as pictures show it; drafts and finished plans alike."""
    names = tuple(name for name in PROJECTIONS if any(name in layer.shapes for layer in inventory.layers))
    bits, stored = [], []
    for number, (layer, experts) in enumerate(zip(inventory.layers, plan.experts, strict=True)):
        # A layer has tens of thousands of matrices, but only a few shapes and specs.
        pairs = Counter(pair for expert in experts for pair in zip(layer.projections, expert, strict=True))
        size = table_bytes(layer.num_experts, len(layer.projections)) + sum(
            count * stored_bytes(plan.specs[index], layer.shapes[name]) for (name, index), count in pairs.items()
        )
        stored.append(8 * (size + side_bytes(plan, inventory, number)) / layer.parameters)
        widths = [
            {name: plan.specs[index].bits for name, index in zip(layer.projections, e, strict=True)} for e in experts
        ]
        bits.append(tuple(tuple(each.get(name, 0) for name in names) for each in widths))
    return AllocationMap(bits=tuple(bits), projections=names, stored=tuple(stored))


def stored_bits(inventory: Inventory, plan: Plan) -> tuple[float, ...]:
    """Mean stored bits of the expert weights of each layer, everything included."""
    if plan.components is None:
        return allocation_map(inventory, plan).stored
    sizes = (
        spectral_table_bytes(len(layer.projections))
        + blob_bytes(plan.form, plan.widths(index, layer), *layer.shapes["down"])
        for index, layer in enumerate(inventory.layers)
    )
    return tuple(8 * size / layer.parameters for size, layer in zip(sizes, inventory.layers, strict=True))


def spectrum_map(inventory: Inventory, plan: Plan) -> SpectrumMap:
    """A plan of components as pictures show it."""
    means, kept = [], []
    counts: Counter[int] = Counter()
    for index, layer in enumerate(inventory.layers):
        widths = plan.widths(index, layer)
        counts.update(_component_counts(inventory, plan, index))
        cells = {name: np.array_split(each_EH.mean(0), min(BINS, each_EH.shape[1])) for name, each_EH in widths.items()}
        means.append({name: tuple(float(cell.mean()) for cell in row) for name, row in cells.items()})
        directions = kept_directions(widths, joint=plan.form.joint)
        kept.append({name: int(each_H.sum()) for name, each_H in directions.items()})
    return SpectrumMap(means=tuple(means), counts=counts, kept=tuple(kept), stored=stored_bits(inventory, plan))


def _component_counts(inventory: Inventory, plan: Plan, index: int) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for widths_EH in plan.widths(index, inventory.layers[index]).values():
        counts.update(dict(enumerate(np.bincount(widths_EH.reshape(-1)).tolist())))
    return {width: count for width, count in sorted(counts.items()) if count}


def heatmap(inventory: Inventory, plan: Plan, name: str) -> str:
    """The plan as an SVG document; `name` says of what."""
    if plan.components is not None:
        return spectrum_svg(spectrum_map(inventory, plan), _title(name))
    return allocation_svg(allocation_map(inventory, plan), _title(name))


def heatmap_lines(inventory: Inventory, plan: Plan) -> tuple[str, ...]:
    """The plan as lines for a terminal."""
    if plan.components is not None:
        return tuple(spectrum_text(spectrum_map(inventory, plan)).splitlines())
    return tuple(allocation_text(allocation_map(inventory, plan)).splitlines())


def heatmap_limit(inventory: Inventory, name: str, layout: str = "grouped") -> int:
    """Bytes that `heatmap` takes at most, whatever the plan of this layout."""
    experts = tuple(layer.num_experts for layer in inventory.layers)
    projections = max(len(layer.projections) for layer in inventory.layers)
    if layout == "spectral":
        return spectrum_limit(len(experts), projections, _title(name))
    return svg_limit(experts, projections, _title(name))


def _title(name: str) -> str:
    return f"{name}: bits of the routed experts"


def calibration_facts(
    tokens: TokenBatch | None, counts: dict[int, list[int]], *, uses: tuple[str, ...] = ()
) -> CalibrationFacts | None:
    """What the text was used for and what the experts saw of it, or None if nothing used it.

    Args:
        tokens: the calibration tokens.
        counts: layer -> tokens of each expert; empty if the quantizer needed no data.
        uses: what beside rounding used the tokens: "costs", "routers".
    """
    uses = (*uses, *(("rounding",) if counts else ()))
    if tokens is None or not uses:
        return None
    flat = sorted(count for layer in counts.values() for count in layer)
    return CalibrationFacts(
        source=tokens.source,
        nsamples=tokens.ids_NT.shape[0],
        seqlen=tokens.ids_NT.shape[1],
        seed=tokens.seed,
        tokens_hash=tokens.hash,
        min_tokens=flat[0] if flat else 0,
        median_tokens=flat[len(flat) // 2] if flat else 0,
        starved=sum(count < MIN_TOKENS for count in flat),
        experts=len(flat),
        uses=uses,
    )


def inherited_license(source: Path) -> str | None:
    """The licence named in the front matter of the source's README.md, if there is one."""
    readme = source / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        matter = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    name = matter.get("license") if isinstance(matter, dict) else None
    return name if isinstance(name, str) else None


def versions() -> dict[str, str]:
    """Versions the bytes may depend on."""
    return {"moeq": __version__, **{name: version(name) for name in ("torch", "transformers", "safetensors")}}


def hub_id(model: str | Path) -> str | None:
    """The model as a hub id, when it was given as one."""
    text = str(model)
    return text if text.count("/") == 1 and not Path(text).exists() and not text.startswith((".", "/")) else None


def facts(
    *,
    model: str | Path,
    source: Path,
    out: Path,
    inventory: Inventory,
    plan: Plan,
    quantizer: str,
    stored_bytes: int,
    command: str,
    quality: dict[str, float] | None,
    quality_text: str,
    calibration: CalibrationFacts | None,
    router: RouterFacts | None = None,
) -> CardFacts:
    """Everything the card says; nothing in it depends on when or how fast the run was."""
    return CardFacts(
        name=out.name,
        base_model=hub_id(model),
        license=inherited_license(source),
        model_type=inventory.model_type,
        method=plan.method,
        quantizer=quantizer,
        command=command,
        versions=versions(),
        plan_hash=plan.hash,
        allocation=allocation(inventory, plan),
        source_bytes=inventory.source_bytes,
        stored_bytes=stored_bytes,
        expert_bytes=plan.expert_bytes,
        expert_parameters=inventory.expert_parameters,
        quality=quality or {},
        quality_text=quality_text,
        calibration=calibration,
        units=plan.unit,
        cost=plan.cost,
        objective=plan.objective,
        bound=plan.bound,
        router=router,
        heatmap=is_mixed(plan),
        tiles=tiles(plan),
    )

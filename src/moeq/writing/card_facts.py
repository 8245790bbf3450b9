"""From a run to the facts of its model card."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

import yaml

from moeq.artifacts import Inventory, Plan
from moeq.calibration.experts import MIN_TOKENS
from moeq.calibration.tokens import TokenBatch
from moeq.layouts.base import LayerPlan
from moeq.layouts.showing import mean_bits, shown
from moeq.report.card import CalibrationFacts, CardFacts, RouterFacts
from moeq.version import __version__


def layer_plans(inventory: Inventory, plan: Plan) -> list[LayerPlan]:
    """What is decided about every layer."""
    return [plan.layer(index, layer) for index, layer in enumerate(inventory.layers)]


def allocation(inventory: Inventory, plan: Plan) -> tuple[dict[int, int], ...]:
    """MoE layer -> code bits -> expert matrices, or components."""
    return tuple(each.widths_count() for each in layer_plans(inventory, plan))


def counts(inventory: Inventory, plan: Plan) -> dict[str, int]:
    """Code bits -> expert matrices (or components) that get them, by rising width."""
    total: Counter[int] = Counter()
    for layer in allocation(inventory, plan):
        total.update(layer)
    return {str(bits): total[bits] for bits in sorted(total)}


def shared(inventory: Inventory, plan: Plan) -> dict[str, str]:
    """Projection -> what its experts share, in words; empty if they share nothing."""
    return shown(plan.layout).words(layer_plans(inventory, plan))


def is_mixed(inventory: Inventory, plan: Plan) -> bool:
    """Whether expert matrices (or components) differ in width, so that a picture shows something."""
    return shown(plan.layout).is_mixed(layer_plans(inventory, plan))


def stored_bits(inventory: Inventory, plan: Plan) -> tuple[float, ...]:
    """Mean stored bits of the expert weights of each layer, everything included."""
    return mean_bits(inventory.layers, layer_plans(inventory, plan))


def heatmap(inventory: Inventory, plan: Plan, name: str) -> str:
    """The plan as an SVG document; `name` says of what."""
    return shown(plan.layout).svg(inventory.layers, layer_plans(inventory, plan), _title(name))


def heatmap_lines(inventory: Inventory, plan: Plan) -> tuple[str, ...]:
    """The plan as lines for a terminal."""
    return tuple(shown(plan.layout).text(inventory.layers, layer_plans(inventory, plan)).splitlines())


def heatmap_limit(inventory: Inventory, name: str, layout: str) -> int:
    """Bytes that `heatmap` takes at most, whatever the plan of this layout."""
    return shown(layout).svg_limit(inventory.layers, _title(name))


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
        texts=tuple(domain.words for domain in tokens.domains),
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
        heatmap=is_mixed(inventory, plan),
        tiles=shared(inventory, plan),
    )

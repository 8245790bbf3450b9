"""From a run to the facts of its model card."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

import yaml

from moeq.artifacts import Inventory, Plan
from moeq.calibration.experts import MIN_TOKENS
from moeq.calibration.tokens import TokenBatch
from moeq.report.card import CalibrationFacts, CardFacts
from moeq.version import __version__


def allocation(inventory: Inventory, plan: Plan) -> tuple[dict[int, int], ...]:
    """MoE layer -> code bits -> expert matrices."""
    return tuple(
        dict(Counter(spec.bits for expert in plan.layer_specs(index) for spec in expert))
        for index in range(len(inventory.layers))
    )


def calibration_facts(tokens: TokenBatch | None, counts: dict[int, list[int]]) -> CalibrationFacts | None:
    """What the quantizer saw, or None."""
    if tokens is None or not counts:
        return None
    flat = sorted(count for layer in counts.values() for count in layer)
    return CalibrationFacts(
        source=tokens.source,
        nsamples=tokens.ids_NT.shape[0],
        seqlen=tokens.ids_NT.shape[1],
        seed=tokens.seed,
        tokens_hash=tokens.hash,
        min_tokens=flat[0],
        median_tokens=flat[len(flat) // 2],
        starved=sum(count < MIN_TOKENS for count in flat),
        experts=len(flat),
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
    )

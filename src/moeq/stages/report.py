"""One page about packed checkpoints that people look at: `moeq report`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from moeq import codec
from moeq.artifacts import Plan
from moeq.checkpoint.locate import CONFIG_NAME, read_config, resolve_packed
from moeq.checkpoint.write import write_file_atomic
from moeq.errors import ArtifactError, OptionError
from moeq.format.manifest import Manifest, PackedLayer, read_manifest
from moeq.layouts.base import LayerPlan
from moeq.layouts.showing import mean_bits, shown
from moeq.model_parts import MoeLayer
from moeq.recipe import Recipe
from moeq.report.facts import FACTS_NAME, ReportFacts
from moeq.report.page import EXPORTS, page
from moeq.spec import stored_bytes
from moeq.stages.compare import CompareReport
from moeq.version import __version__
from moeq.writing.other_files import PLAN_NAME
from moeq.writing.routers import REPAIRS

LOADING: Final = """import moeq

model = moeq.load({name!r})

# or in a terminal
#   moeq run {name}
#   moeq serve {name}
"""
DIGITS: Final = 4
"""Decimals of mean widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportReport:
    """What was written; field names are those of the JSON document (docs/json.md)."""

    output: str
    bytes: int
    checkpoints: tuple[str, ...]


def run(directories: Sequence[str | Path], output: str | Path, *, compared: str | Path | None = None) -> ReportReport:
    """Write the page. It needs the extra `report`.

    Args:
        directories: packed checkpoints; with several the page compares them.
        output: the file to write.
        compared: what `moeq compare --json` printed; its quality is shown, that of other checkpoints too.

    Raises:
        OptionError: nothing to report, or a package is missing.
        PackedError: not a packed checkpoint.
    """
    if not directories:
        raise OptionError("there is nothing to report", fix="give a directory that moeq quantize wrote")
    measured = None if compared is None else _compared(Path(compared))
    text = html([facts_of(each) for each in directories], measured)
    write_file_atomic(Path(output), text.encode())
    return ReportReport(
        output=str(output),
        bytes=len(text.encode()),
        checkpoints=tuple(str(resolve_packed(each)) for each in directories),
    )


def html(checkpoints: Sequence[dict[str, Any]], compared: CompareReport | None = None) -> str:
    """The page of what `facts_of` gave, with names that differ."""
    try:
        from vl_convert import javascript_bundle
    except ImportError as error:
        fix = "pip install 'moeq[report]'"
        raise OptionError("reports need the package vl-convert-python", fix=fix) from error
    seen: dict[str, int] = {}
    for each in checkpoints:
        seen[each["name"]] = count = seen.get(each["name"], 0) + 1
        each["name"] += f" ({count})" if count > 1 else ""
    others = [] if compared is None else codec.encode(compared)["checkpoints"]
    about = None if compared is None else {"tokens": compared.tokens, "checkpoints": others}
    return page(checkpoints, about, javascript_bundle(EXPORTS), __version__)


def _compared(file: Path) -> CompareReport:
    """The document of `moeq compare --json`."""
    data = codec.read_json(file)
    if not isinstance(data, dict) or data.get("verb") != "compare":
        raise ArtifactError("it is no document of moeq compare --json", file=file, option="compared", fix="write one")
    names = {field.name for field in fields(CompareReport)}
    return codec.decode(CompareReport, {name: value for name, value in data.items() if name in names})


def facts_of(directory: str | Path) -> dict[str, Any]:
    """What the page shows of a packed checkpoint, as JSON values.

    Raises:
        PackedError, ArtifactError: it is none, or its parts contradict each other.
    """
    path = resolve_packed(directory)
    manifest, plan = read_manifest(path), Plan.load(path / PLAN_NAME)
    facts = _facts(path, manifest)
    options = {name: value for name, value in manifest.recipe.items() if name != REPAIRS}
    recipe = codec.decode(Recipe, options) if options else None
    layers = [_moe_layer(layer) for layer in manifest.layers]
    plans = [plan.layer(index, layer) for index, layer in enumerate(layers)]
    calibration = manifest.calibration or {}
    weights = sum(layer.parameters for layer in layers)
    return {
        "name": path.resolve().name,
        "model_type": str(read_config(path / CONFIG_NAME).get("model_type", "?")),
        "method": manifest.method,
        "quantizer": str(manifest.recipe.get("quantizer") or "?"),
        "expert_bytes": plan.expert_bytes,
        "expert_parameters": weights,
        "stored_bytes": facts.stored_bytes or _weight_bytes(path, manifest),
        "source_bytes": facts.source_bytes,
        "objective": plan.objective,
        "unit": plan.unit,
        "layers": _layers(layers, plans),
        "widths": _rounded(shown(plan.layout).widths(layers, plans)),
        "bytes": _bytes(plan, layers),
        "tokens": calibration.get("tokens_per_expert", []),
        "statistics": codec.encode(facts.statistics),
        "spectra": codec.encode(facts.spectra),
        "curve": codec.encode(facts.curve),
        "quality": codec.encode(facts.quality),
        "quality_by_text": codec.encode(facts.quality_by_text),
        "calibrated_on": [text["name"] for text in calibration.get("texts", [])],
        "quality_text": "measured when it was made, on windows of the calibration text that calibration did not see",
        "quality_note": facts.quality_note,
        "trials": codec.encode(facts.trials),
        "trials_note": facts.trials_note,
        "options": _options(manifest, recipe, calibration, facts),
        "loading": LOADING.format(name=path.resolve().name),
    }


def _facts(path: Path, manifest: Manifest) -> ReportFacts:
    """What was kept for reports; of older checkpoints nothing was."""
    if not (path / FACTS_NAME).is_file():
        return ReportFacts(
            model_hash=manifest.model_hash,
            plan_hash=manifest.plan_hash,
            source_bytes=0,
            stored_bytes=0,
            quality_note="nothing was kept for reports when this checkpoint was made",
        )
    facts = ReportFacts.load(path / FACTS_NAME)
    if (facts.model_hash, facts.plan_hash) != (manifest.model_hash, manifest.plan_hash):
        raise ArtifactError("it belongs to another checkpoint", file=path / FACTS_NAME, fix="delete it")
    return facts


def _moe_layer(layer: PackedLayer) -> MoeLayer:
    return MoeLayer(
        path=layer.path,
        block=layer.path,
        num_experts=layer.num_experts,
        top_k=1,
        shapes=layer.named_shapes,
        sources={},
        concatenated=layer.concatenated,
        transposed=layer.transposed,
    )


def _layers(layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> list[dict[str, Any]]:
    """What the page wants to know of each layer; `first_...` says where its units begin among those of the model."""
    found, experts, matrices = [], 0, 0
    for layer, bits in zip(layers, mean_bits(layers, plans), strict=True):
        found.append(
            {
                "path": layer.path,
                "experts": layer.num_experts,
                "projections": list(layer.projections),
                "stored_bits": round(bits, DIGITS),
                "first_expert": experts,
                "first_matrix": matrices,
            }
        )
        experts += layer.num_experts
        matrices += layer.num_experts * len(layer.projections)
    return found


def _rounded(widths: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
    return [{name: [round(bits, DIGITS) for bits in row] for name, row in layer.items()} for layer in widths]


def _bytes(plan: Plan, layers: Sequence[MoeLayer]) -> list[dict[str, list[int]]]:
    """Layer -> projection -> stored bytes of each expert's matrix; nothing where units are components."""
    return [
        {
            name: [stored_bytes(specs[at], layer.shapes[name]) for specs in plan.layer_specs(index)]
            for at, name in enumerate(layer.projections)
        }
        for index, layer in enumerate(layers if plan.experts else ())
    ]


def _weight_bytes(path: Path, manifest: Manifest) -> int:
    return sum(digest.bytes for name, digest in manifest.files.items() if name.endswith(".safetensors"))


def _options(
    manifest: Manifest, recipe: Recipe | None, calibration: dict[str, Any], facts: ReportFacts
) -> dict[str, str]:
    """How it was made: what was calibrated on, and every option that is not the usual one."""
    found = {"moeq": manifest.moeq_version}
    for text in calibration.get("texts", []):
        found[f"calibrated on {text['name']}"] = f"{text['samples']} samples from {text['documents']} documents"
    if calibration:
        samples, length = calibration["shape"]
        found["calibration"] = f"{samples} samples of {length} tokens, seed {calibration['seed']}"
    if facts.router is not None:
        tuned = facts.router
        found["tuned"] = f"{tuned.what}: {tuned.loss} {tuned.loss_before:.4g} -> {tuned.loss_after:.4g}"
    if recipe is not None:
        usual = Recipe(method=recipe.method)
        for name, value in manifest.recipe.items():
            if value not in (None, codec.encode(getattr(usual, name, None))) and name != "calibration":
                found[f"--{name.replace('_', '-')}"] = str(value)
    found["plan"] = manifest.plan_hash[:16]
    return found

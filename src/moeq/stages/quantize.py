"""The whole way from a checkpoint to a packed one."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moeq import codec
from moeq.artifacts import Inventory, Plan
from moeq.calibration.tokens import TokenBatch, read_documents, sample_tokens
from moeq.checkpoint.identity import fingerprint
from moeq.checkpoint.journal import Journal
from moeq.checkpoint.read import Reader, resolve
from moeq.checkpoint.write import FileDigest, write_file_atomic
from moeq.errors import MoeqError, OptionError
from moeq.format.manifest import write_manifest
from moeq.methods import method
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import Recipe
from moeq.report.card import CalibrationFacts, model_card
from moeq.runtime.load import pick_device
from moeq.spec import TensorInfo
from moeq.stages import allocate, calibrated, card, finish, inspect, output, quality, summary, verify
from moeq.stages import shards as layout
from moeq.stages.packing import Job, Progress, expert_records, write_copied, write_layer
from moeq.version import __version__

QUALITY_BYTES = 2**30
"""Originals up to this size are loaded to measure quality; above it the promise of bounded memory counts."""
HELD_OUT = 8
"""Windows of calibration text kept aside to measure quality on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run, decided but not begun; `plan` stops here.

    Attributes:
        source: the input directory.
        inventory: what it holds.
        headers: its tensors.
        recipe: all options, quantizer included.
        plan: the spec of every unit.
        shards: the files to write.
    """

    source: Path
    inventory: Inventory
    headers: dict[str, TensorInfo]
    recipe: Recipe
    plan: Plan
    shards: tuple[layout.Shard, ...]

    @property
    def sizes(self) -> layout.Sizes:
        """Bytes of the weight files."""
        return layout.sizes(self.inventory, self.plan, self.shards)

    @property
    def disk_bytes(self) -> int:
        """Upper bound of all files."""
        beside = finish.sidecar_limit(self.source, self.inventory, self.plan, self.recipe, self.shards)
        return self.sizes.total + beside


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """What was done; field names are those of the JSON document (docs/json.md)."""

    output: str
    model_type: str
    method: str
    quantizer: str
    plan_hash: str
    stored_bytes: int
    directory_bytes: int
    source_bytes: int
    expert_bytes: int
    expert_parameters: int
    expert_bits_per_weight: float
    families: dict[str, summary.Family]
    tokens_per_expert: dict[str, Any] | None
    quality: dict[str, float] | None
    quality_note: str | None
    verified: verify.VerifyReport
    seconds: dict[str, float]


def setup(model: str | Path, recipe: Recipe) -> Setup:
    """Read headers, decide the plan, lay out the files. No weights are read but a few samples.

    Raises:
        CheckpointError, BudgetError, ArtifactError: as the stages do.
    """
    source = resolve(model)
    inventory, headers = inspect.run(source)
    row = method(recipe.method)
    default = row.quantizer if recipe.calibration else row.dataless
    recipe = recipe.replace(quantizer=recipe.quantizer or default)
    if recipe.plan is not None:
        plan = Plan.load(Path(recipe.plan))
        plan.check_model(inventory)
        recipe = recipe.replace(method=plan.method)
    else:

        def sidecars(draft: Plan) -> int:
            shards = layout.arrange(inventory, draft, headers)
            return finish.sidecar_limit(source, inventory, draft, recipe, shards)

        plan = allocate.run(inventory, headers, recipe, sidecars)
    files = layout.arrange(inventory, plan, headers)
    return Setup(source=source, inventory=inventory, headers=headers, recipe=recipe, plan=plan, shards=files)


def run(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a checkpoint.

    Nothing appears under `out` until every file is written, hashed, reloaded and compared.

    Args:
        model: local directory, or hub id.
        out: the directory to make.
        recipe: all options.
        resume: go on with an unfinished run of the same input, options and version.
        command: the command line, for the model card.
        progress: called as work is done.

    Raises:
        MoeqError: of the kind that says what is wrong.
    """
    started = time.perf_counter()
    device = pick_device(recipe.device)
    plan = setup(model, recipe)
    recipe, out = plan.recipe, Path(os.path.abspath(out))
    quantizer = make_quantizer(str(recipe.quantizer), **_quantizer_options(recipe))
    tokens, rest = _tokens(plan.source, recipe, quantizer.needs_hessian)
    with output.building(plan.source, out, resume=resume, needed_bytes=plan.disk_bytes) as partial:
        options = {**codec.encode(recipe), "tokens": None if tokens is None else tokens.hash}
        journal = Journal.open_or_create(
            partial,
            fingerprint=fingerprint(plan.source),
            options=options,
            plan_hash=plan.plan.hash,
            moeq_version=__version__,
        )
        with Reader(plan.source, plan.headers) as reader:
            job = Job(
                inventory=plan.inventory,
                plan=plan.plan,
                shards=plan.shards,
                reader=reader,
                partial=partial,
                quantizer=quantizer,
                dense_quantizer=make_quantizer("rtn", gain=recipe.gain),
                device=device,
            )
            files, counts = _pack(job, plan, journal, tokens, progress)
        packed = time.perf_counter()
        _write_rest(plan, partial, files, tokens, counts)
        if progress is not None:
            progress("verify", 0, 1)
        checked = verify.run(partial, expected=job.noted)
        verified = time.perf_counter()
        measured, note = _quality(plan, partial, rest, device)
        report = _report(plan, out, partial, counts, checked)
        seconds = {"pack": packed - started, "verify": verified - packed, "quality": time.perf_counter() - verified}
        report = replace(report, quality=measured, quality_note=note, seconds=seconds)
        _write_card(model, plan, partial, report, command, card.calibration_facts(tokens, counts))
        report = replace(report, directory_bytes=directory_bytes(partial))
        _check_budget(recipe, report)
        output.publish(partial, out)
    return report


def _write_rest(
    plan: Setup,
    partial: Path,
    shards: Mapping[str, FileDigest],
    tokens: TokenBatch | None,
    counts: Mapping[int, list[int]],
) -> None:
    """Everything that makes the finished shards a checkpoint, but the model card."""
    files = finish.write_files(plan.source, partial, plan.inventory, plan.plan, plan.recipe, plan.shards)
    calibration = _calibration(tokens, counts)
    write_manifest(partial, finish.manifest(plan.inventory, plan.plan, plan.recipe, {**shards, **files}, calibration))


def _write_card(
    model: str | Path,
    plan: Setup,
    partial: Path,
    report: QuantizeReport,
    command: str,
    calibration: CalibrationFacts | None,
) -> None:
    measured = report.quality
    text = "windows of the calibration text that calibration did not see" if measured else report.quality_note or ""
    facts = card.facts(
        model=model,
        source=plan.source,
        out=Path(report.output),
        inventory=plan.inventory,
        plan=plan.plan,
        quantizer=report.quantizer,
        stored_bytes=report.stored_bytes,
        command=command,
        quality=measured,
        quality_text=text,
        calibration=calibration,
    )
    write_file_atomic(partial / "README.md", model_card(facts).encode())


def _quantizer_options(recipe: Recipe) -> dict[str, Any]:
    name = str(recipe.quantizer)
    options: dict[str, Any] = {"gain": recipe.gain} if name in ("rtn", "hqq", "gptq") else {}
    if name == "gptq":
        options |= {"act_order": recipe.act_order, "damp": recipe.damp}
    return options


def _tokens(source: Path, recipe: Recipe, needed: bool) -> tuple[TokenBatch | None, TokenBatch | None]:
    """Calibration tokens, and a few windows after them that calibration will not see."""
    if recipe.calibration is None:
        if needed:
            raise OptionError(
                f"{recipe.quantizer} needs calibration text", option="calibration", fix="give a file, or use hqq"
            )
        return None, None
    tokenizer = quality.load_tokenizer(source)
    documents = read_documents(recipe.calibration)
    tokens = sample_tokens(
        tokenizer, documents, recipe.nsamples, recipe.seqlen, recipe.seed, source=Path(recipe.calibration).name
    )
    try:
        more = sample_tokens(tokenizer, documents, recipe.nsamples + HELD_OUT, recipe.seqlen, recipe.seed)
    except MoeqError:
        return tokens, None
    return tokens, replace(more, ids_NT=more.ids_NT[recipe.nsamples :])


def _pack(
    job: Job, plan: Setup, journal: Journal, tokens: TokenBatch | None, progress: Progress | None
) -> tuple[dict[str, FileDigest], dict[int, list[int]]]:
    """Write all shards that are not finished yet; each is entered in the journal as it is on disk."""
    state = journal
    counts: dict[int, list[int]] = {}

    def done(name: str, digest: FileDigest) -> None:
        nonlocal state
        state = state.finish_shard(job.partial, name, digest)
        if progress is not None:
            progress("shards", len(state.finished), len(job.shards))

    for shard in job.shards:
        if shard.layer is None and shard.file not in state.finished:
            done(shard.file, write_copied(job, shard))
    if tokens is not None and job.quantizer.needs_hessian:
        counts = calibrated.run(
            job,
            plan.source,
            tokens.ids_NT,
            routing=plan.recipe.routing,
            finished=dict(state.finished),
            done=done,
            progress=progress,
        )
    else:
        for shard in job.shards:
            if shard.layer is not None and shard.file not in state.finished:
                done(shard.file, write_layer(job, shard, expert_records(job, shard.layer)))
    return dict(state.finished), counts


def _calibration(tokens: TokenBatch | None, counts: Mapping[int, list[int]]) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        "source": tokens.source,
        "tokens_hash": tokens.hash,
        "shape": list(tokens.ids_NT.shape),
        "seed": tokens.seed,
        "tokens_per_expert": [counts[layer] for layer in sorted(counts)],
    }


def _quality(
    plan: Setup, partial: Path, rest: TokenBatch | None, device: torch.device
) -> tuple[dict[str, float] | None, str | None]:
    """Quality on held-out windows when the original is small, or why it was not measured."""
    if rest is None:
        return None, "not measured: no calibration text was left over; run moeq eval"
    if plan.inventory.source_bytes > QUALITY_BYTES:
        return None, "not measured: the original is too large to load it unasked; run moeq eval"
    result = quality.held_out(plan.source, partial, list(rest.ids_NT), device)
    return {**result.metrics, "tokens": float(result.tokens)}, None


def _report(
    plan: Setup, out: Path, partial: Path, counts: Mapping[int, list[int]], checked: verify.VerifyReport
) -> QuantizeReport:
    tokens = None
    if counts:
        flat = sorted(count for layer in counts.values() for count in layer)
        tokens = {
            "min": flat[0],
            "median": flat[len(flat) // 2],
            "max": flat[-1],
            "without_tokens": sum(count == 0 for count in flat),
            "layers": [counts[layer] for layer in sorted(counts)],
        }
    return QuantizeReport(
        output=str(out),
        model_type=plan.inventory.model_type,
        method=plan.plan.method,
        quantizer=str(plan.recipe.quantizer),
        plan_hash=plan.plan.hash,
        stored_bytes=sum((partial / shard.file).stat().st_size for shard in plan.shards),
        directory_bytes=directory_bytes(partial),
        source_bytes=plan.inventory.source_bytes,
        expert_bytes=plan.plan.expert_bytes,
        expert_parameters=plan.inventory.expert_parameters,
        expert_bits_per_weight=8 * plan.plan.expert_bytes / plan.inventory.expert_parameters,
        families=summary.families(plan.inventory, plan.headers, plan.plan),
        tokens_per_expert=tokens,
        quality=None,
        quality_note=None,
        verified=checked,
        seconds={},
    )


def directory_bytes(directory: Path) -> int:
    """Bytes of all files of a checkpoint directory but the journal."""
    return sum(
        path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".moeq")
    )


def _check_budget(recipe: Recipe, report: QuantizeReport) -> None:
    limit = recipe.budget().size if recipe.plan is None else None
    if limit is not None and report.directory_bytes > limit:
        raise OptionError(
            f"the checkpoint has {report.directory_bytes} bytes, more than {limit}",
            option="size",
            fix=f"give --size {limit - (report.directory_bytes - limit)} or report this as a bug",
        )

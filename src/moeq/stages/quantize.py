"""The whole way from a checkpoint to a packed one."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moeq import codec, native
from moeq.calibration.tokens import TokenBatch
from moeq.checkpoint.identity import fingerprint
from moeq.checkpoint.journal import Journal
from moeq.checkpoint.read import Reader
from moeq.checkpoint.write import FileDigest, write_file_atomic
from moeq.errors import OptionError
from moeq.format.manifest import read_manifest, write_manifest
from moeq.quantizers.base import Quantizer
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import Recipe
from moeq.repair.tune import TuneOptions
from moeq.report.card import CalibrationFacts, RouterFacts, model_card
from moeq.runtime.load import pick_device
from moeq.stages import (
    calibrated,
    card,
    choices,
    finish,
    joining,
    output,
    quality,
    spectral_packing,
    summary,
    tuning,
    verify,
)
from moeq.stages.packing import Job, Progress, expert_records, write_copied, write_layer
from moeq.stages.setup import COSTS_NAME, Setup, decide, setup
from moeq.stages.shards import Shard
from moeq.stages.tile_packing import TileRounding
from moeq.version import __version__

ROUTERS = "routers"
"""The journal's note of router tuning."""
QUALITY_BYTES = 2**30
"""Originals up to this size are loaded to measure quality; above it the promise of bounded memory counts."""


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


def run(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
    context: str | None = None,
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
        context: packed checkpoint to measure costs on, instead of the recipe's own.

    Raises:
        MoeqError: of the kind that says what is wrong.
    """
    clock = _Clock()
    device = pick_device(recipe.device)
    draft = setup(model, recipe)
    recipe, out = draft.recipe, Path(os.path.abspath(out))
    quantizer = make_quantizer(str(recipe.quantizer), **choices.quantizer_options(recipe))
    needed_by = recipe.quantizer if quantizer.needs_hessian else None
    if needed_by is None and recipe.router != "none":
        needed_by = "router tuning"
    tokens, rest = choices.calibration_tokens(draft.source, recipe, needed_by)
    with output.building(draft.source, out, resume=resume, needed_bytes=draft.disk_bytes) as partial:
        plan = draft if draft.decided else decide(draft, partial, progress, context)
        clock.stop("allocate")
        job, journal, counts = _pack(plan, partial, quantizer, tokens, device, progress)
        clock.stop("pack")
        _write_rest(plan, partial, journal.finished, tokens, counts)
        router = _tune(plan, partial, journal, tokens, device, progress)
        clock.stop("tune")
        if progress is not None:
            progress("verify", 0, 1)
        checked = verify.run(partial, expected=job.noted)
        if progress is not None:
            progress("verify", 1, 1)
        clock.stop("verify")
        measured, note = _quality(plan, partial, rest, device)
        clock.stop("quality")
        report = _report(plan, out, partial, counts, checked)
        report = replace(report, quality=measured, quality_note=note, seconds=clock.seconds)
        uses = (("costs",) if plan.plan.cost else ()) + (("routers",) if router else ())
        facts = card.calibration_facts(tokens, counts, uses=uses)
        _write_card(model, plan, partial, report, command, facts, router)
        report = replace(report, directory_bytes=directory_bytes(partial))
        _check_budget(recipe, report)
        (partial / COSTS_NAME).unlink(missing_ok=True)
        output.publish(partial, out)
    return report


class _Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, part: str) -> None:
        """What passed since the last call was spent on `part`."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now


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
    router: RouterFacts | None,
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
        router=router,
    )
    write_file_atomic(partial / "README.md", model_card(facts).encode())


def _tune(
    plan: Setup,
    partial: Path,
    journal: Journal,
    tokens: TokenBatch | None,
    device: torch.device,
    progress: Progress | None,
) -> RouterFacts | None:
    """Tune the routers if the recipe says so and an interrupted run did not; the manifest is up to date after it.

    Between `forget` and `replaced` the journal does not know the files: a run that is killed there packs them again.
    """
    recipe = plan.recipe
    if recipe.router == "none":
        return None
    assert tokens is not None
    options = TuneOptions(loss=str(recipe.router), lr=recipe.router_lr, epochs=recipe.router_epochs)
    note = journal.notes.get(ROUTERS)
    if note is not None:
        write_manifest(partial, tuning.updated(read_manifest(partial), {}, tokens, options))
        return codec.decode(RouterFacts, note)
    replaced: list[str] = []

    def replacing(names: tuple[str, ...]) -> None:
        replaced.extend(names)
        journal.forget(partial, names)

    result = tuning.tune_directory(
        partial,
        tokens,
        options,
        reference=plan.source,
        device=device,
        replacing=replacing,
        progress=progress,
    )
    files = read_manifest(partial).files
    journal.replaced(partial, {name: files[name] for name in replaced}, ROUTERS, codec.encode(result.facts))
    return result.facts


def _pack(
    plan: Setup,
    partial: Path,
    quantizer: Quantizer,
    tokens: TokenBatch | None,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Job, Journal, dict[int, list[int]]]:
    """Write all shards that are not finished yet; each is entered in the journal as it is on disk."""
    recipe = plan.recipe
    options = {**codec.encode(recipe), "tokens": None if tokens is None else tokens.hash}
    journal = Journal.open_or_create(
        partial,
        fingerprint=fingerprint(plan.source),
        # Compiled and torch rounding differ in last bits.
        options={**options, "native_rounding": native.available()},
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
            dense_quantizer=joining.dense_quantizer(recipe),
            device=device,
            table=plan.table,
            gain=recipe.gain,
            damp=recipe.damp,
            tiles=recipe.tiles(),
            seed=recipe.seed,
        )
        journal, counts = _pack_shards(job, plan, journal, tokens, progress)
    return job, journal, counts


def _pack_shards(
    job: Job, plan: Setup, journal: Journal, tokens: TokenBatch | None, progress: Progress | None
) -> tuple[Journal, dict[int, list[int]]]:
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
                done(shard.file, _pack_plainly(job, shard, shard.layer))
    return state, counts


def _pack_plainly(job: Job, shard: Shard, layer: int) -> FileDigest:
    """Write a layer whose experts are rounded without data."""
    if job.plan.tiles:
        rounding = TileRounding(job, layer)
        return write_layer(job, shard, rounding.records(), rounding.sides())
    pack = expert_records if job.plan.components is None else spectral_packing.component_records
    return write_layer(job, shard, pack(job, layer))


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
    if not plan.recipe.quality:
        return None, "not measured, as asked; run moeq eval"
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

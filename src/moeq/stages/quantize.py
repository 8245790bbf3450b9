"""`moeq quantize`: the whole way from a checkpoint to a packed one."""

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moeq import codec
from moeq.allocation.decide import COSTS_NAME, decide, draft
from moeq.allocation.domains import by_text
from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.calibration.tokens import TokenBatch
from moeq.checkpoint.write import FileDigest, write_file_atomic
from moeq.errors import MoeqError, OptionError
from moeq.fleet import HERE, Fleet
from moeq.format.manifest import read_manifest, write_manifest
from moeq.progress import Progress
from moeq.recipe import Recipe
from moeq.report.card import CalibrationFacts, RouterFacts, model_card
from moeq.report.trials import card_section
from moeq.runtime.load import pick_device, predicts_tokens
from moeq.spec import Unit
from moeq.stages import auto, verify
from moeq.stages import facts as facts_stage
from moeq.stages.evaluate import held_out
from moeq.stages.quantize_report import QuantizeReport, directory_bytes, report_of
from moeq.writing import card_facts, directory, other_files
from moeq.writing.calibration_text import tokens_for
from moeq.writing.decision import Decision
from moeq.writing.packing import pack
from moeq.writing.quantizer_choice import chosen_quantizer, settled
from moeq.writing.routers import REPAIRS, tune_packed

QUALITY_BYTES = 2**30
"""Originals up to this size are loaded to measure quality; above it the promise of bounded memory counts."""
STAGES_SUFFIX = ".stages"
"""Of the directory beside the output that holds what falling budgets gave."""


def run(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
    fleet: Fleet = HERE,
) -> QuantizeReport:
    """Quantize a checkpoint.

    Nothing appears under `out` until every file is written, hashed, reloaded and compared.

    With falling budgets (GEMQ, section on progressive quantization) each is measured on the packed and tuned result of
    the one before. Every stage rounds the original's weights again: errors of rounding do not add up. Stages lie in
    OUT.stages until the last one is complete; a run that goes on takes them up.

    Args:
        model: local directory, or hub id.
        out: the directory to make.
        recipe: all options.
        resume: go on with an unfinished run of the same input, options and version.
        command: the command line, for the model card.
        progress: called as work is done.
        fleet: who measures and rounds; the bytes do not depend on it.

    Raises:
        MoeqError: of the kind that says what is wrong.
    """
    once = _Once(model=model, resume=resume, command=command, progress=progress, fleet=fleet)
    budgets = recipe.progressive_bits()
    if auto.tries(recipe):
        return _best(once, out, recipe)
    if not budgets:
        return once(out, recipe)
    source, out = open_source(model), Path(os.path.abspath(out))
    directory.check_free(source, out, directory.partial_of(out), resume)
    work = out.with_name(out.name + STAGES_SUFFIX)
    context = recipe.context
    for number, bits in enumerate(budgets, start=1):
        path = work / f"{number}-{bits:g}-bits"
        stage = dataclasses.replace(
            recipe,
            bits=bits,
            progressive=None,
            context=context,
            round_context=recipe.round_context and context is not None,
        )
        once.kept(path, source, stage)
        context = str(path)
    report = once(out, recipe, context)
    shutil.rmtree(work, ignore_errors=True)
    return report


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Once:
    """Makes one checkpoint after the other, of one model and for one call."""

    model: str | Path
    resume: bool
    command: str
    progress: Progress | None
    fleet: Fleet

    def __call__(self, out: str | Path, recipe: Recipe, context: str | None = None) -> QuantizeReport:
        """As `run`, for one budget; costs are measured on `context` instead of the recipe's own."""
        return _once(
            self.model,
            out,
            recipe,
            resume=self.resume,
            command=self.command,
            progress=self.progress,
            fleet=self.fleet,
            context=context,
        )

    def kept(self, path: Path, source: Path, stage: Recipe) -> QuantizeReport:
        """The report of a checkpoint that may be there from an interrupted run; made anew if it is not."""
        note = path.with_name(path.name + ".json")
        if note.is_file() and _is_done(path, source, stage):
            return codec.decode(QuantizeReport, codec.read_json(note))
        shutil.rmtree(path, ignore_errors=True)
        report = self(path, stage)
        write_file_atomic(note, codec.canonical(codec.encode(report)))
        return report


def _best(once: _Once, out: str | Path, recipe: Recipe) -> QuantizeReport:
    """The best of the candidates of method auto, with what was tried in card and report."""
    source, out = open_source(once.model), Path(os.path.abspath(out))
    directory.check_free(source, out, directory.partial_of(out), once.resume)
    recipe = auto.within(recipe, draft(once.model, recipe))
    if not auto.tries(recipe):
        return once(out, recipe)
    work = out.with_name(out.name + STAGES_SUFFIX)
    found = auto.run(once.kept, source, work, out.name, recipe, once.progress)
    card = found.path / "README.md"
    text = card.read_text(encoding="utf-8").rstrip()
    write_file_atomic(card, f"{text}\n\n{card_section(found.trials, found.note)}".encode())
    facts_stage.add_trials(found.path, found.trials, found.note, recipe)
    report: QuantizeReport = dataclasses.replace(
        found.report,
        output=str(out),
        directory_bytes=directory_bytes(found.path),
        trials=found.trials,
        trials_note=found.note,
    )
    _check_budget(recipe, report)
    directory.publish(found.path, out)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _once(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    resume: bool,
    command: str,
    progress: Progress | None,
    fleet: Fleet,
    context: str | None = None,
) -> QuantizeReport:
    """One checkpoint."""
    clock = _Clock()
    device = pick_device(recipe.device)
    decision = draft(model, recipe)
    recipe, out = decision.recipe, Path(os.path.abspath(out))
    quantizer = chosen_quantizer(recipe)
    tokens, rest = tokens_for(decision.source, recipe, quantizer)
    with directory.building(decision.source, out, resume=resume, needed_bytes=decision.disk_bytes) as partial:
        if not decision.decided:
            decision = decide(decision, partial, progress, context, fleet)
        clock.stop("allocate")
        job, journal, counts = pack(decision, partial, quantizer, tokens, device, progress, fleet)
        clock.stop("pack")
        _write_rest(decision, partial, journal.finished, tokens, counts)
        router = tune_packed(decision, partial, journal, tokens, device, progress)
        clock.stop("tune")
        rescaled = router is not None and router.what == "model" and router.steps > 0
        checked = _verify(partial, {} if rescaled else job.noted, recipe, progress)
        clock.stop("verify")
        measured, texts, note = _quality(decision, partial, rest, device)
        clock.stop("quality")
        report = report_of(decision, out, partial, tokens, counts, checked)
        report = dataclasses.replace(report, quality=measured, quality_note=note, seconds=clock.seconds)
        report = dataclasses.replace(report, quality_by_text=texts)
        uses = (("costs",) if decision.plan.cost else ()) + (("routers",) if router else ())
        facts = card_facts.calibration_facts(tokens, counts, uses=uses)
        _write_card(model, decision, partial, report, command, facts, router)
        facts_stage.write(
            decision,
            partial,
            stored_bytes=report.stored_bytes,
            quality=measured,
            by_text=texts,
            note=note,
            router=router,
        )
        report = dataclasses.replace(report, directory_bytes=directory_bytes(partial))
        _check_budget(recipe, report)
        (partial / COSTS_NAME).unlink(missing_ok=True)
        directory.publish(partial, out)
    return report


def _is_done(path: Path, source: Path, stage: Recipe) -> bool:
    """Whether an earlier run finished exactly this stage."""
    if not path.is_dir():
        return False
    try:
        manifest = read_manifest(path)
    except MoeqError:
        return False
    inventory, _ = read_inventory(source, trust_remote_code=stage.trust_remote_code)
    done = {name: value for name, value in manifest.recipe.items() if name != REPAIRS}
    return manifest.model_hash == inventory.model_hash and done == codec.encode(settled(stage))


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
    decision: Decision,
    partial: Path,
    shards: Mapping[str, FileDigest],
    tokens: TokenBatch | None,
    counts: Mapping[int, list[int]],
) -> None:
    """Everything that makes the finished shards a checkpoint, but the model card."""
    files = other_files.write_files(
        decision.source, partial, decision.inventory, decision.plan, decision.recipe, decision.shards
    )
    calibration = _calibration(tokens, counts)
    write_manifest(
        partial,
        other_files.manifest(decision.inventory, decision.plan, decision.recipe, {**shards, **files}, calibration),
    )


def _write_card(
    model: str | Path,
    decision: Decision,
    partial: Path,
    report: QuantizeReport,
    command: str,
    calibration: CalibrationFacts | None,
    router: RouterFacts | None,
) -> None:
    measured = report.quality
    text = "windows of the calibration text that calibration did not see" if measured else report.quality_note or ""
    facts = card_facts.facts(
        model=model,
        source=decision.source,
        out=Path(report.output),
        inventory=decision.inventory,
        plan=decision.plan,
        quantizer=report.quantizer,
        stored_bytes=report.stored_bytes,
        command=command,
        quality=measured,
        quality_text=text,
        calibration=calibration,
        router=router,
    )
    write_file_atomic(partial / "README.md", model_card(facts).encode())


def _verify(partial: Path, noted: Mapping[Unit, str], recipe: Recipe, progress: Progress | None) -> verify.VerifyReport:
    """Reload what was written and compare."""
    if progress is not None:
        progress("verify", 0, 1)
    checked = verify.run(partial, expected=noted, trust_remote_code=recipe.trust_remote_code)
    if progress is not None:
        progress("verify", 1, 1)
    return checked


def _calibration(tokens: TokenBatch | None, counts: Mapping[int, list[int]]) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        "source": tokens.source,
        "tokens_hash": tokens.hash,
        "shape": list(tokens.ids_NT.shape),
        "seed": tokens.seed,
        "texts": codec.encode(tokens.domains),
        "tokens_per_expert": [counts[layer] for layer in sorted(counts)],
    }


def _quality(
    decision: Decision, partial: Path, rest: TokenBatch | None, device: torch.device
) -> tuple[dict[str, float] | None, dict[str, dict[str, float]], str | None]:
    """Quality on held-out windows when the original is small, by text if there are several; or why not measured."""
    if not decision.recipe.quality:
        return None, {}, "not measured, as asked; run moeq eval"
    if rest is None:
        return None, {}, "not measured: no calibration text was left over; run moeq eval"
    if decision.inventory.source_bytes > QUALITY_BYTES:
        return None, {}, "not measured: the original is too large to load it unasked; run moeq eval"
    if not predicts_tokens(decision.source):
        return None, {}, "not measured: the model does not predict the next token"
    texts = by_text(rest) if len(rest.domains) > 1 else ()
    whole, *parts = held_out(decision.source, partial, list(rest.ids_NT), device, [list(t.ids_NT) for t in texts])
    measured = [{**result.metrics, "tokens": float(result.tokens)} for result in (whole, *parts)]
    return measured[0], {text.source: found for text, found in zip(texts, measured[1:], strict=True)}, None


def _check_budget(recipe: Recipe, report: QuantizeReport) -> None:
    limit = recipe.budget().size if recipe.plan is None else None
    if limit is not None and report.directory_bytes > limit:
        raise OptionError(
            f"the checkpoint has {report.directory_bytes} bytes, more than {limit}",
            option="size",
            fix=f"give --size {limit - (report.directory_bytes - limit)} or report this as a bug",
        )

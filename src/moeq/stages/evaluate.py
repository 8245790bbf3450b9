"""Measures a packed checkpoint against its source."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.arch.gguf_source import open_source
from moeq.artifacts import EvalResult
from moeq.calibration.tokens import Tokenizer, dataset_text, read_text
from moeq.errors import CalibrationError, OptionError
from moeq.evals import suite
from moeq.evals.forward import Progress
from moeq.evals.protocols import Protocol, protocol
from moeq.evals.tasks import read_pairs
from moeq.fleet import HERE, Fleet
from moeq.runtime.ahead import Told
from moeq.runtime.load import load_any, load_tokenizer

PIECE = 8
"""Windows that are sent to a worker at a time."""


def held_out(
    source: Path, packed: Path, rows: Sequence[Tensor], device: torch.device, texts: Sequence[Sequence[Tensor]] = ()
) -> list[EvalResult]:
    """Quality on token windows that calibration did not see, both models in memory: of all, then of each of `texts`."""
    subject, original = load_any(packed, device), load_any(source, device)
    found = []
    for some in (rows, *texts):
        metrics, tokens = suite.compare_all(subject, original, some, 1, None)
        found.append(EvalResult(subject=packed.name, reference=source.name, metrics=metrics, tokens=tokens))
        found[-1].validate()
    return found


def run(
    model: str | Path,
    text: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    pairs: str | Path | None = None,
    preset: str | None = None,
    tasks: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    task_path: str | Path | None = None,
    chat: bool = False,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
    questions: Progress | None = None,
    trust_remote_code: bool = False,
    compiled: Told | None = None,
    fleet: Fleet = HERE,
) -> EvalResult:
    """Measure a model on a text, on tasks of lm-evaluation-harness, or on both.

    See `moeq.evals.suite.evaluate` for the metrics of texts; those of tasks are named "task/metric". Tasks need the
    extra `eval`.

    Args:
        model: packed checkpoint, or any causal model that transformers loads.
        text: text or jsonl file.
        reference: the model to compare to, on the text.
        pairs: minimal pairs, jsonl.
        preset: name of a way in which a paper measures (`moeq.evals.protocols`); what is given beside it wins.
        tasks, shots, limit, task_path, chat: names of tasks; as in `moeq.evals.harness.Tasks`.
        seqlen: tokens per window, 2048 by default.
        max_tokens: use only the start of the text.
        batch_size: windows per forward pass.
        device: where to compute.
        progress: called with (windows done, windows); `questions`: with (sequences of tasks done, those known so far);
            `compiled`: with kernels that are compiled for a GPU.
        trust_remote_code: code in a model's directory may run, where transformers does not have the model.
        fleet: who measures the windows of the text; each worker holds both models.

    Raises:
        OptionError: nothing to measure, or options that do not belong together.
    """
    way = None if preset is None else protocol(preset)
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip()) or (way.tasks if way else ())
    _check_sense(text, way, names, compared=reference is not None or pairs is not None)
    asked = None
    if names:
        few, seed = (shots, 0) if way is None else (way.shots if shots is None else shots, way.seed)
        asked = _asked(names=names, shots=few, limit=limit, path=task_path, chat=chat, seed=seed, batch_size=batch_size)
    directory = open_source(model)
    plan = None
    if text is not None or way is not None:
        words, source = (read_text(text), Path(text).name) if text is not None else _text_of(way)
        plan = suite.Suite(
            text=words,
            source=source,
            seqlen=seqlen or (2048 if way is None else way.seqlen),
            max_tokens=max_tokens,
            batch_size=batch_size,
            pairs=() if pairs is None else tuple(read_pairs(Path(pairs))),
        )
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    models = Models(directory, None if reference is None else open_source(reference), device, trust_remote_code)
    subject: Any = None
    if fleet is HERE or asked is not None or (plan is not None and plan.pairs):
        subject = load_any(directory, device, trust_remote_code=trust_remote_code, compiled=compiled)
    result = EvalResult(subject=str(directory), reference=None, metrics={}, tokens=0)
    if plan is not None:
        result = _of_text(subject, tokenizer, plan, models, fleet, progress)
    facts: dict[str, Any] = {} if preset is None else {"preset": preset}
    answers: dict[str, float] = {}
    if asked is not None:
        answers, facts["harness"] = _harness().run(subject, tokenizer, asked, questions)
    result = replace(result, metrics=result.metrics | answers, provenance={**result.provenance, **facts})
    result.validate()
    return result


@dataclass(frozen=True, slots=True)
class Models:
    """What a worker loads."""

    subject: Path
    reference: Path | None
    device: str
    trust_remote_code: bool


def _of_text(
    subject: Any, tokenizer: Tokenizer, plan: suite.Suite, models: Models, fleet: Fleet, progress: Progress | None
) -> EvalResult:
    """What the text says, here or elsewhere."""
    if fleet is HERE:
        reference = models.reference
        baseline = None if reference is None else baseline_of(reference, models.device, models.trust_remote_code)
        return suite.evaluate(
            subject, tokenizer, plan, subject=str(models.subject), reference=baseline, progress=progress
        )
    counted = partial(_spread, fleet, models, plan.batch_size, progress)
    baseline = None
    if models.reference is not None:
        baseline = suite.Baseline(name=str(models.reference), model=models.reference)
    return suite.evaluate(
        subject,
        tokenizer,
        plan,
        subject=str(models.subject),
        reference=baseline,
        measured=counted,
        progress=progress,
    )


@lru_cache(maxsize=1)
def _opened(models: Models) -> tuple[Any, Any]:
    """Subject and reference, kept by a worker from one piece of work to the next."""
    found = (models.subject, models.reference)
    subject, reference = (
        path and load_any(path, models.device, trust_remote_code=models.trust_remote_code) for path in found
    )
    return subject, reference


def _spread(
    fleet: Fleet, models: Models, batch_size: int, progress: Progress | None, rows: Sequence[Tensor]
) -> suite.Sums:
    """Count windows elsewhere, whole batches at a time."""
    if batch_size < 1:
        raise OptionError(f"{batch_size} is too small", option="batch-size", fix="give 1 or more")
    span = batch_size * max(1, PIECE // batch_size)
    pieces = [tuple(rows[start : start + span]) for start in range(0, len(rows), span)]
    sums = suite.Sums()
    for number, found in enumerate(fleet.spread(partial(_count, models, batch_size), pieces), start=1):
        sums.take(found)
        if progress is not None:
            progress(min(number * span, len(rows)), len(rows))
    return sums


def _count(models: Models, batch_size: int, rows: Sequence[Tensor]) -> suite.Sums:
    subject, reference = _opened(models)
    suite.check_vocabulary(subject, rows)
    return suite.sums_of(subject, reference, rows, batch_size, None)


def baseline_of(reference: str | Path, device: str, trust_remote_code: bool) -> suite.Baseline:
    """The original, loaded to be compared to."""
    original = open_source(reference)
    return suite.Baseline(name=str(original), model=load_any(original, device, trust_remote_code=trust_remote_code))


def _check_sense(text: str | Path | None, way: Protocol | None, names: tuple[str, ...], *, compared: bool) -> None:
    if text is None and way is None and not names:
        raise OptionError("there is nothing to measure", option="text", fix="give --text, --tasks or --preset")
    if text is None and way is None and compared:
        raise OptionError("what is compared is the text", option="text", fix="give --text")


def _harness() -> Any:
    """lm-evaluation-harness, which takes seconds to import and is not everybody's."""
    return importlib.import_module("moeq.evals.harness")


def _asked(*, limit: int | None, path: str | Path | None, **what: Any) -> Any:
    """Tasks for the harness."""
    if limit is not None and limit < 1:
        raise OptionError(f"{limit} is too small", option="limit", fix="give at least 1")
    return _harness().Tasks(limit=limit, path=None if path is None else Path(path), **what)


def _text_of(way: Protocol | None) -> tuple[str, str]:
    """The text that a preset measures on, and its name."""
    assert way is not None
    name = way.dataset
    try:
        return dataset_text(name), name
    except CalibrationError as error:
        fix = f"give --text FILE with the test rows of {name}, joined by blank lines"
        raise CalibrationError(f"its text cannot be had: {error.message}", option="preset", fix=fix) from error

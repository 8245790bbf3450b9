"""Measures a packed checkpoint against its source."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeq.arch.gguf_source import open_source
from moeq.artifacts import EvalResult
from moeq.calibration.tokens import read_text
from moeq.evals import suite
from moeq.evals.forward import Progress
from moeq.evals.tasks import read_pairs
from moeq.runtime.ahead import Told
from moeq.runtime.load import load_any, load_tokenizer


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
    text: str | Path,
    *,
    reference: str | Path | None = None,
    pairs: str | Path | None = None,
    seqlen: int = 2048,
    max_tokens: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    compiled: Told | None = None,
) -> EvalResult:
    """Measure a model on a text; see `moeq.evals.suite.evaluate` for the metrics and errors.

    Args:
        model: packed checkpoint, or any causal model that transformers loads.
        text: text or jsonl file.
        reference: the model to compare to.
        pairs: minimal pairs, jsonl.
        seqlen: tokens per window.
        max_tokens: use only the start of the text.
        batch_size: windows per forward pass.
        device: where to compute.
        progress: called with (done, total).
        trust_remote_code: code in a model's directory may run, where transformers does not have the model.
        compiled: likewise, while kernels are compiled for a GPU.
    """
    directory = open_source(model)
    plan = suite.Suite(
        text=read_text(text),
        source=Path(text).name,
        seqlen=seqlen,
        max_tokens=max_tokens,
        batch_size=batch_size,
        pairs=tuple(read_pairs(Path(pairs))) if pairs is not None else (),
    )
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    baseline = None
    if reference is not None:
        original = open_source(reference)
        baseline = suite.Baseline(
            name=str(original), model=load_any(original, device, trust_remote_code=trust_remote_code)
        )
    subject = load_any(directory, device, trust_remote_code=trust_remote_code, compiled=compiled)
    return suite.evaluate(subject, tokenizer, plan, subject=str(directory), reference=baseline, progress=progress)

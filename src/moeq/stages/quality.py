"""Measures a packed checkpoint against its source."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeq.artifacts import EvalResult
from moeq.calibration.tokens import read_text
from moeq.checkpoint.read import resolve
from moeq.errors import CheckpointError
from moeq.evals import suite
from moeq.evals.forward import Progress
from moeq.evals.tasks import read_pairs
from moeq.format.manifest import MANIFEST_NAME
from moeq.runtime import load


def load_any(directory: Path, device: str | torch.device = "auto", dtype: object = "auto") -> PreTrainedModel:
    """A model to measure: packed by moeq, or any causal model that transformers loads."""
    if (directory / MANIFEST_NAME).is_file():
        return load.load(directory, device=device, dtype=dtype)
    place = load.pick_device(device)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        names = config.architectures or []
        cls = getattr(transformers, names[0], None) if names else None
        model = (cls or AutoModelForCausalLM).from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot load it: {str(error).splitlines()[0]}", file=directory, fix="check the directory"
        ) from error
    return model.to(place).eval()


def load_tokenizer(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer could be loaded: {str(error).splitlines()[0]}",
            file=directory,
            fix="copy the model's tokenizer files into the directory",
        ) from error


def held_out(source: Path, packed: Path, rows: Sequence[Tensor], device: torch.device) -> EvalResult:
    """Quality on token windows that calibration did not see, both models in memory."""
    metrics, tokens = suite.compare_all(load_any(packed, device), load_any(source, device), rows, 1, None)
    result = EvalResult(subject=packed.name, reference=source.name, metrics=metrics, tokens=tokens)
    result.validate()
    return result


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
    """
    directory = resolve(model)
    plan = suite.Suite(
        text=read_text(text),
        source=Path(text).name,
        seqlen=seqlen,
        max_tokens=max_tokens,
        batch_size=batch_size,
        pairs=tuple(read_pairs(Path(pairs))) if pairs is not None else (),
    )
    tokenizer = load_tokenizer(directory)
    baseline = None
    if reference is not None:
        original = resolve(reference)
        baseline = suite.Baseline(name=str(original), model=load_any(original, device))
    subject = load_any(directory, device)
    return suite.evaluate(subject, tokenizer, plan, subject=str(directory), reference=baseline, progress=progress)

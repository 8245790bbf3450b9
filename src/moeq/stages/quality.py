"""Measures a packed checkpoint against its source."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from moeq.artifacts import EvalResult
from moeq.calibration.tokens import read_text
from moeq.checkpoint.read import resolve
from moeq.errors import CheckpointError, MoeqError
from moeq.evals import suite
from moeq.evals.forward import Progress
from moeq.evals.tasks import read_pairs
from moeq.format.manifest import MANIFEST_NAME
from moeq.runtime import load
from moeq.runtime.ahead import Told


def load_any(
    directory: Path,
    device: str | torch.device = "auto",
    dtype: object = "auto",
    *,
    exact_activations: bool | None = True,
    compiled: Told | None = None,
) -> PreTrainedModel:
    """A model to measure: packed by moeq, or any causal model that transformers loads.

    What is measured is the weights: activations are not rounded unless asked for, however short a window is. `compiled`
    is told of kernels that are compiled for a GPU.
    """
    if (directory / MANIFEST_NAME).is_file():
        return load.load(directory, device=device, dtype=dtype, exact_activations=exact_activations, progress=compiled)
    place = load.pick_device(device)
    try:
        model = load.from_pretrained(directory, dtype)
    except (MoeqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers and a family's class make of broken files
        raise CheckpointError(
            f"transformers cannot load it: {_one_line(error)}", file=directory, fix="check the directory"
        ) from error
    return model.to(place).eval()


def load_tokenizer(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    fix = "copy the model's tokenizer files into the directory"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise CheckpointError(f"no tokenizer could be loaded: {_one_line(error)}", file=directory, fix=fix) from error
    # Without files some families make one that knows its special tokens only, and encodes any text as nothing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CheckpointError("there is no tokenizer", file=directory, fix=fix)
    return tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
        compiled: likewise, while kernels are compiled for a GPU.
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
    subject = load_any(directory, device, compiled=compiled)
    return suite.evaluate(subject, tokenizer, plan, subject=str(directory), reference=baseline, progress=progress)

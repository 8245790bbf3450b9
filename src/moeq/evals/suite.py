"""All measurements of one model in one EvalResult."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeq.artifacts import EvalResult
from moeq.calibration.tokens import Tokenizer, token_hash, windows
from moeq.errors import CalibrationError
from moeq.evals.divergence import DivergenceSum
from moeq.evals.forward import Progress
from moeq.evals.perplexity import perplexity
from moeq.evals.reference import compare
from moeq.evals.routing import OverlapSum
from moeq.evals.tasks import MinimalPair, minimal_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What is measured.

    Attributes:
        text: text for perplexity and divergence.
        source: name of the text, for reports.
        seqlen: tokens per window.
        max_tokens: tokens used from the start of the text; all by default.
        batch_size: windows per forward pass.
        pairs: minimal pairs for `blimp`; none by default.
    """

    text: str
    source: str
    seqlen: int = 2048
    max_tokens: int | None = None
    batch_size: int = 1
    pairs: tuple[MinimalPair, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baseline:
    """What the model is compared to.

    Attributes:
        name: its name or path, for reports.
        model: the model, or a file of `moeq.evals.reference.save_reference`.
    """

    name: str
    model: nn.Module | Path


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    suite: Suite,
    *,
    subject: str,
    reference: Baseline | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure a model.

    Metrics: `perplexity`; with a reference also `reference_perplexity`, `kl`, `kl_stderr` (from two
    windows on), `top1_agreement` and `router_overlap`; with pairs also `blimp`.

    Args:
        model: a transformers causal language model, packed or not.
        tokenizer: its tokenizer.
        suite: what to measure.
        subject: name or path of the model, for reports.
        reference: what to compare to.
        progress: called with (sequences done, sequences) over all measurements.

    Raises:
        CalibrationError: the text is too short, or has tokens that the model does not know.
        NotMoeError: there is a reference, and one of the models has no routed experts.
        OptionError, ArtifactError: model, reference and windows do not belong together.
    """
    rows = windows(tokenizer, suite.text, suite.seqlen, max_tokens=suite.max_tokens)
    check_vocabulary(model, rows)
    total = len(rows) + 2 * len(suite.pairs)
    provenance: dict[str, Any] = {
        "text": suite.source,
        "tokens_hash": token_hash(rows),
        "seqlen": suite.seqlen,
        "windows": len(rows),
        "batch_size": suite.batch_size,
        "versions": {name: version(name) for name in ("moeq", "torch", "transformers")},
    }

    def report(offset: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(offset + done, total)

    if reference is None:
        measured = perplexity(model, rows, batch_size=suite.batch_size, progress=report(0))
        metrics, tokens = {"perplexity": measured.value}, measured.tokens
    else:
        metrics, tokens = compare_all(model, reference.model, rows, suite.batch_size, report(0))
    if suite.pairs:
        accuracy = minimal_pairs(model, tokenizer, suite.pairs, progress=report(len(rows)))
        metrics["blimp"] = accuracy.accuracy
        provenance["blimp"] = {"pairs": accuracy.pairs, "stderr": accuracy.stderr, "fields": accuracy.fields}
    result = EvalResult(
        subject=subject,
        reference=None if reference is None else reference.name,
        metrics=metrics,
        tokens=tokens,
        provenance=provenance,
    )
    result.validate()
    return result


def check_vocabulary(model: Any, rows: Sequence[Tensor]) -> None:
    """Raise CalibrationError if the rows hold ids that the model has no embedding for."""
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(int(row.max()) for row in rows)
    if largest >= known:
        raise CalibrationError(
            f"the text has token {largest}, the model knows {known}", fix="use the tokenizer that belongs to the model"
        )


def compare_all(
    model: nn.Module, reference: nn.Module | Path, rows: Sequence[Tensor], batch_size: int, progress: Progress | None
) -> tuple[dict[str, float], int]:
    """Everything that needs a reference, from one pass of both models: metrics by name, and predicted tokens."""
    divergences, overlaps = DivergenceSum(), OverlapSum()
    consumers = [divergences.add, overlaps.add]
    compare(model, reference, rows, consumers, routing=True, batch_size=batch_size, progress=progress)
    divergence = divergences.result()
    metrics = {
        "perplexity": divergence.perplexity,
        "reference_perplexity": divergence.reference_perplexity,
        "kl": divergence.kl,
        "top1_agreement": divergence.top1_agreement,
        "router_overlap": overlaps.result().value,
    }
    if divergence.kl_stderr is not None:
        metrics["kl_stderr"] = divergence.kl_stderr
    return metrics, divergence.tokens

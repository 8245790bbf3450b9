"""All measurements of one model in one EvalResult."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeq.artifacts import EvalResult
from moeq.calibration.tokens import Tokenizer, token_hash, windows
from moeq.errors import CalibrationError
from moeq.evals.divergence import DivergenceSum
from moeq.evals.forward import Progress
from moeq.evals.perplexity import PerplexitySum
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
    measured: Callable[[Sequence[Tensor]], "Sums"] | None = None,
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
        measured: counts windows instead of this process, which then needs `model` for pairs only.
        progress: called with (sequences done, sequences) over all measurements.

    Raises:
        CalibrationError: the text is too short, or has tokens that the model does not know.
        NotMoeError: there is a reference, and one of the models has no routed experts.
        OptionError, ArtifactError: model, reference and windows do not belong together.
    """
    rows = windows(tokenizer, suite.text, suite.seqlen, max_tokens=suite.max_tokens)
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

    if measured is None:
        check_vocabulary(model, rows)
        baseline = None if reference is None else reference.model
        metrics, tokens = sums_of(model, baseline, rows, suite.batch_size, report(0)).metrics()
    else:
        metrics, tokens = measured(rows).metrics()
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


@dataclass(slots=True, kw_only=True, eq=False)
class Sums:
    """What was counted of some windows: against a reference, or without one."""

    alone: PerplexitySum = field(default_factory=PerplexitySum)
    divergences: DivergenceSum | None = None
    overlaps: OverlapSum | None = None

    def take(self, other: "Sums") -> None:
        """Add what others counted of the windows that follow."""
        self.alone.take(other.alone)
        if self.divergences is None or self.overlaps is None:
            self.divergences, self.overlaps = other.divergences, other.overlaps
        elif other.divergences is not None and other.overlaps is not None:
            self.divergences.take(other.divergences)
            self.overlaps.take(other.overlaps)

    def metrics(self) -> tuple[dict[str, float], int]:
        """Metrics by name, and predicted tokens."""
        if self.divergences is None or self.overlaps is None:
            measured = self.alone.result()
            return {"perplexity": measured.value}, measured.tokens
        divergence = self.divergences.result()
        metrics = {
            "perplexity": divergence.perplexity,
            "reference_perplexity": divergence.reference_perplexity,
            "kl": divergence.kl,
            "top1_agreement": divergence.top1_agreement,
            "router_overlap": self.overlaps.result().value,
        }
        if divergence.kl_stderr is not None:
            metrics["kl_stderr"] = divergence.kl_stderr
        return metrics, divergence.tokens


def sums_of(
    model: nn.Module,
    reference: nn.Module | Path | None,
    rows: Sequence[Tensor],
    batch_size: int,
    progress: Progress | None,
) -> Sums:
    """Count windows, in one pass of both models if there is a reference."""
    sums = Sums()
    if reference is None:
        sums.alone.add(model, rows, batch_size=batch_size, progress=progress)
        return sums
    sums.divergences, sums.overlaps = DivergenceSum(), OverlapSum()
    consumers = [sums.divergences.add, sums.overlaps.add]
    compare(model, reference, rows, consumers, routing=True, batch_size=batch_size, progress=progress)
    return sums


def compare_all(
    model: nn.Module, reference: nn.Module | Path, rows: Sequence[Tensor], batch_size: int, progress: Progress | None
) -> tuple[dict[str, float], int]:
    """Everything that needs a reference, from one pass of both models: metrics by name, and predicted tokens."""
    return sums_of(model, reference, rows, batch_size, progress).metrics()

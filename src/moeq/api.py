"""The Python API: the CLI's verbs under the CLI's names."""

from pathlib import Path
from typing import Any

from moeq.artifacts import EvalResult, Inventory
from moeq.checkpoint.read import resolve
from moeq.recipe import Recipe
from moeq.stages import inspect as inspect_stage
from moeq.stages import preflight, quality
from moeq.stages import quantize as quantize_stage
from moeq.stages import verify as verify_stage
from moeq.stages.packing import Progress
from moeq.stages.preflight import PlanReport
from moeq.stages.quantize import QuantizeReport
from moeq.stages.verify import VerifyReport


def quantize(
    model: str | Path, output: str | Path, *, resume: bool = False, progress: Progress | None = None, **options: Any
) -> QuantizeReport:
    """Quantize a checkpoint; options are those of `moeq.Recipe` (and of `moeq quantize`).

    Example:
        >>> moeq.quantize("models/olmoe", "olmoe-3bit", bits=3, calibration="text.txt")  # doctest: +SKIP

    Raises:
        MoeqError: of the kind that says what is wrong.
    """
    return quantize_stage.run(model, output, Recipe(**options), resume=resume, progress=progress)


def plan(model: str | Path, **options: Any) -> PlanReport:
    """What `quantize` with the same options would do; reads no weights."""
    return preflight.run(model, Recipe(**options))


def inspect(model: str | Path) -> Inventory:
    """What a source checkpoint holds."""
    return inspect_stage.run(resolve(model))[0]


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    pairs: str | Path | None = None,
    seqlen: int = 2048,
    max_tokens: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
) -> EvalResult:
    """Measure a packed or any other model; see `moeq eval`."""
    return quality.run(
        model,
        text,
        reference=reference,
        pairs=pairs,
        seqlen=seqlen,
        max_tokens=max_tokens,
        batch_size=batch_size,
        device=device,
    )


def verify(directory: str | Path) -> VerifyReport:
    """Prove a packed checkpoint: structure, hashes, every matrix, a forward pass."""
    return verify_stage.run(Path(directory), every=True)

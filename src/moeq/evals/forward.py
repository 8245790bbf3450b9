"""What all measurements share: batches of windows, log-probabilities in float32, means with their spread.

Legend: B sequences, T tokens, P = T - 1 predicted positions, R rows (positions), V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeq.errors import CalibrationError, OptionError

Progress = Callable[[int, int], None]
"""Called with (done, total) after each batch."""

CHUNK_ELEMENTS = 1 << 25
"""Logits that are widened to float32 at a time: 128 MiB."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no autograd inside; every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model wants its input ids."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def batches(windows: Sequence[Tensor], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Stack consecutive windows of equal length.

    Args:
        windows: int64 ids, 1-D, at least two tokens each.
        batch_size: the most windows in one batch.

    Yields:
        index of the first window, and ids (B, T).

    Raises:
        CalibrationError: there is no window, or one with nothing to predict.
        OptionError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise OptionError(f"{batch_size} is too small", option="batch-size", fix="give 1 or more")
    if not windows or any(window.ndim != 1 or len(window) < 2 for window in windows):
        raise CalibrationError("every window needs two tokens or more", fix="give a longer text")
    start = 0
    while start < len(windows):
        stop = start + 1
        while stop < min(len(windows), start + batch_size) and len(windows[stop]) == len(windows[start]):
            stop += 1
        yield start, torch.stack([window.to(torch.int64) for window in windows[start:stop]])
        start = stop


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of at most `CHUNK_ELEMENTS` logits, so that the float32 copies stay small."""
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def target_log_probs(logits_BPV: Tensor, targets_BP: Tensor) -> Tensor:
    """log p(target) of every position, float32, (B, P)."""
    targets_BP = targets_BP.to(logits_BPV.device)
    out_BP = torch.empty(targets_BP.shape, dtype=torch.float32, device=logits_BPV.device)
    for logits_PV, targets_P, out_P in zip(logits_BPV, targets_BP, out_BP, strict=True):
        for rows in row_chunks(*logits_PV.shape):
            log_probs_RV = logits_PV[rows].float().log_softmax(dim=-1)
            out_P[rows] = log_probs_RV.gather(-1, targets_P[rows, None]).squeeze(-1)
    return out_BP


def mean_and_stderr(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean over all tokens, and its standard error with windows as the independent draws.

    Windows differ in length, so this is the ratio estimator: with w_i tokens and mean x_i in window i,
    mean = sum w_i x_i / sum w_i and stderr^2 = n / (n - 1) * sum w_i^2 (x_i - mean)^2 / (sum w_i)^2.

    Returns:
        (mean, stderr); stderr is None when there is only one window.
    """
    total = sum(counts)
    mean = math.fsum(sums) / total
    n = len(counts)
    if n < 2:
        return mean, None
    squares = math.fsum((value - count * mean) ** 2 for value, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def perplexity_of(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinity rather than an overflow error."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

"""Perplexity over windows that do not overlap (GPTQ's protocol, which all papers on MoE quantization follow).

Legend: B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moeq.evals.forward import (
    Progress,
    batches,
    device_of,
    evaluating,
    mean_and_stderr,
    perplexity_of,
    target_log_probs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        value: exp(nll).
        nll: mean negative log-likelihood of a predicted token, in nats.
        nll_stderr: standard error of `nll` over windows; None for one window.
        tokens: predicted tokens.
    """

    value: float
    nll: float
    nll_stderr: float | None
    tokens: int


def perplexity(
    model: nn.Module, windows: Sequence[Tensor], *, batch_size: int = 1, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a causal language model; every window predicts all its tokens but the first.

    Args:
        model: called as model(input_ids=..., use_cache=False), returns `.logits` (B, T, V).
        windows: int64 ids, 1-D; see `moeq.calibration.tokens.windows`.
        batch_size: windows per forward pass.
        progress: called with (windows done, windows).

    Raises:
        CalibrationError: there is nothing to predict.
    """
    sums = PerplexitySum()
    sums.add(model, windows, batch_size=batch_size, progress=progress)
    return sums.result()


class PerplexitySum:
    """Adds up windows."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._sums: list[float] = []

    def add(
        self, model: nn.Module, windows: Sequence[Tensor], *, batch_size: int = 1, progress: Progress | None = None
    ) -> None:
        """Count windows; see `perplexity`."""
        with evaluating(model):
            for _, ids_BT in batches(windows, batch_size):
                logits_BTV = model(input_ids=ids_BT.to(device_of(model)), use_cache=False).logits
                log_probs_BP = target_log_probs(logits_BTV[:, :-1], ids_BT[:, 1:])
                self._sums += (-log_probs_BP.double().sum(dim=1)).tolist()
                self._counts += [ids_BT.shape[1] - 1] * len(ids_BT)
                if progress is not None:
                    progress(len(self._sums), len(windows))

    def take(self, other: "PerplexitySum") -> None:
        """Add what another one counted, after what this one did."""
        self._sums += other._sums
        self._counts += other._counts

    def result(self) -> Perplexity:
        """The mean over everything added."""
        nll, stderr = mean_and_stderr(self._sums, self._counts)
        return Perplexity(value=perplexity_of(nll), nll=nll, nll_stderr=stderr, tokens=sum(self._counts))

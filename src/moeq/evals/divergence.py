"""How far a model's predictions are from its reference's: KL divergence, top-1 agreement, both perplexities.

Perplexity hardly moves at moderate bit-widths, where errors help about as often as they harm; the
divergence from the original does not average out that way.

Legend: B sequences, T tokens, P = T - 1 predicted positions, R rows (positions), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeq.evals.forward import Progress, mean_and_stderr, perplexity_of, row_chunks
from moeq.evals.observe import Observation
from moeq.evals.reference import compare


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A model against its reference, each mean over all predicted positions.

    Attributes:
        kl: mean KL(reference || subject) in nats.
        kl_stderr: standard error of `kl` over windows; None for one window.
        top1_agreement: share of positions where both find the same token likeliest.
        perplexity: of the subject.
        reference_perplexity: of the reference.
        tokens: predicted positions.
    """

    kl: float
    kl_stderr: float | None
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int


class DivergenceSum:
    """Adds up batches; `add` is a consumer of `moeq.evals.reference.compare`."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._sums: list[list[float]] = []

    def add(self, expected: Observation, actual: Observation, ids_BT: Tensor) -> None:
        """Count one batch: what the reference and the subject said of `ids_BT`."""
        for p_PV, q_PV, ids_T in zip(expected.logits_BPV, actual.logits_BPV, ids_BT, strict=True):
            sums = torch.zeros(4, dtype=torch.float64, device=q_PV.device)
            targets_P = ids_T[1:].to(q_PV.device)
            for rows in row_chunks(*q_PV.shape):
                sums += _chunk_sums(p_PV[rows].to(q_PV.device), q_PV[rows], targets_P[rows])
            self._sums.append(sums.tolist())
            self._counts.append(len(targets_P))

    def take(self, other: "DivergenceSum") -> None:
        """Add what another one counted, after what this one did."""
        self._sums += other._sums
        self._counts += other._counts

    def result(self) -> Divergence:
        """The means over everything added."""
        kl, agree, nll, reference_nll = zip(*self._sums, strict=True)
        mean_kl, stderr = mean_and_stderr(kl, self._counts)
        return Divergence(
            kl=mean_kl,
            kl_stderr=stderr,
            top1_agreement=mean_and_stderr(agree, self._counts)[0],
            perplexity=perplexity_of(mean_and_stderr(nll, self._counts)[0]),
            reference_perplexity=perplexity_of(mean_and_stderr(reference_nll, self._counts)[0]),
            tokens=sum(self._counts),
        )


def _chunk_sums(p_RV: Tensor, q_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Sums over rows of KL(p || q), agreement, -log q(target), -log p(target); float64, (4,)."""
    agree = (p_RV.argmax(dim=-1) == q_RV.argmax(dim=-1)).double().sum()
    log_p_RV = p_RV.float().log_softmax(dim=-1)
    log_q_RV = q_RV.float().log_softmax(dim=-1)
    nll = [-log.gather(-1, targets_R[:, None]).double().sum() for log in (log_q_RV, log_p_RV)]
    prob_RV = log_p_RV.exp()
    # 0 * (-inf - -inf) is 0 here: some models mask unused vocabulary with -inf.
    terms_RV = torch.where(prob_RV == 0, 0.0, prob_RV * (log_p_RV - log_q_RV))
    return torch.stack([terms_RV.sum(dim=-1).double().sum(), agree, *nll])


def divergence(
    model: nn.Module,
    reference: nn.Module | Path,
    windows: Sequence[Tensor],
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with its reference on the same windows.

    Args:
        model: the subject; called as model(input_ids=..., use_cache=False), returns `.logits`.
        reference: the model it was made from, or a file of `moeq.evals.reference.save_reference`.
        windows: int64 ids, 1-D; see `moeq.calibration.tokens.windows`.
        batch_size: windows per forward pass.
        progress: called with (windows done, windows).

    Raises:
        CalibrationError: there is nothing to predict.
        OptionError: the vocabularies differ.
        ArtifactError: the reference file does not fit the windows.
    """
    sums = DivergenceSum()
    compare(model, reference, windows, [sums.add], routing=False, batch_size=batch_size, progress=progress)
    return sums.result()

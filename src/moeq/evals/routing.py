"""Whether a model still sends its tokens to the experts that its reference chose.

Legend: B sequences, T tokens, k experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from moeq.errors import NotMoeError, OptionError
from moeq.evals.forward import Progress
from moeq.evals.observe import Observation
from moeq.evals.reference import compare


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOverlap:
    """Shared experts of subject and reference.

    Attributes:
        value: mean over tokens and MoE layers of the share of the reference's experts that the
            subject selects too; order and weights do not count.
        layers: the same for each MoE layer.
    """

    value: float
    layers: tuple[float, ...]


class OverlapSum:
    """Adds up batches; `add` is a consumer of `moeq.evals.reference.compare`."""

    def __init__(self) -> None:
        self._shares: list[list[float]] = []
        self._tokens: list[int] = []

    def add(self, expected: Observation, actual: Observation, ids_BT: Tensor) -> None:
        """Count one batch.

        Raises:
            NotMoeError: a model shows no routed experts.
            OptionError: the models have different numbers of MoE layers.
        """
        layers = len(expected.routing), len(actual.routing)
        if 0 in layers:
            raise NotMoeError(
                f"the {'reference' if layers[0] == 0 else 'model'} shows no routed experts",
                fix="measure perplexity or divergence, which need none",
            )
        if layers[0] != layers[1]:
            raise OptionError(
                f"the reference has {layers[0]} MoE layers, the model {layers[1]}",
                option="reference",
                fix="compare with the model that this one was made from",
            )
        if not self._shares:
            self._shares, self._tokens = [[] for _ in range(layers[0])], [0] * layers[0]
        for layer, (wanted_BTk, chosen_BTk) in enumerate(zip(expected.routing, actual.routing, strict=True)):
            self._shares[layer].append(_shared(wanted_BTk.to(chosen_BTk.device), chosen_BTk))
            self._tokens[layer] += ids_BT.numel()

    def take(self, other: "OverlapSum") -> None:
        """Add what another one counted."""
        if not self._shares:
            self._shares, self._tokens = [[] for _ in other._shares], [0] * len(other._tokens)
        for layer, shares in enumerate(other._shares):
            self._shares[layer] += shares
        self._tokens = [mine + theirs for mine, theirs in zip(self._tokens, other._tokens, strict=True)]

    def result(self) -> RouterOverlap:
        """The means over everything added."""
        layers = tuple(math.fsum(shares) / tokens for shares, tokens in zip(self._shares, self._tokens, strict=True))
        return RouterOverlap(value=math.fsum(layers) / len(layers), layers=layers)


def _shared(wanted_BTk: Tensor, chosen_BTk: Tensor) -> float:
    """Sum over tokens of the share of `wanted` that is in `chosen`; negative indices are no experts."""
    real_BTk = wanted_BTk >= 0
    found_BTk = (wanted_BTk.unsqueeze(-1) == chosen_BTk.unsqueeze(-2)).any(dim=-1) & real_BTk
    shares_BT = found_BTk.sum(dim=-1).double() / real_BTk.sum(dim=-1).clamp(min=1)
    return float(shares_BT.sum())


def router_overlap(
    model: nn.Module,
    reference: nn.Module | Path,
    windows: Sequence[Tensor],
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> RouterOverlap:
    """Share of the reference's top-k experts that the subject selects too, all tokens of all windows.

    Works on every family that follows transformers' experts protocol, packed or not.

    Args:
        model: the subject.
        reference: the model it was made from, or a file of `moeq.evals.reference.save_reference`.
        windows: int64 ids, 1-D.
        batch_size: windows per forward pass.
        progress: called with (windows done, windows).

    Raises:
        NotMoeError: one of the models has no routed experts.
        OptionError: the models do not belong together.
        ArtifactError: the reference file does not fit the windows.
    """
    sums = OverlapSum()
    compare(model, reference, windows, [sums.add], routing=True, batch_size=batch_size, progress=progress)
    return sums.result()

"""PMQ's cost: how often an expert is asked, how much it weighs, and how far rounding moves the layer's output.

PMQ (MC-MoE; GEMQ, section 5.1) is the local baseline of the papers: frequency^a * weight^b * F^g, where F adds up,
sequence by sequence, the Frobenius norm of the change of the layer's output when one expert is rounded. Its costs are
meant for one layer at a time; in a program over all layers they compare what they were never made to compare.

Legend: Q sequences, S tokens of one expert, H hidden, U units, C candidates.
"""

from typing import Final

import numpy as np
import torch

from moeq.costs.base import Asked, LayerCosts, LayerView
from moeq.costs.options import check_choice, check_number, check_switch
from moeq.costs.perturb import PAPER, make_rounder, perturb
from moeq.costs.tally import Tally

MODES: Final = ("pmq", "squared")


class OutputError:
    """Change of the layer's output, with PMQ's weighting or plain; a `moeq.costs.base.Cost`.

    Args:
        mode: "pmq" for freq^a * wsum^b * F^g; "squared" for the sum over tokens of s^2 |dE|^2, in which routing
            weights count once and frequencies come in by themselves.
        a: exponent of the routed tokens.
        b: exponent of the sum of routing weights.
        g: exponent of F.
        code: raise F to `a` instead of `g`, as the public code does.
        seqlen: tokens of a sequence, for F; None takes every batch for one sequence. PMQ's code has one sequence a
            batch.
        perturb: what to round with when measuring: "paper" for the papers' RTN_b, or a quantizer.
        damp: option of that quantizer, as the next two; None leaves its default.
        act_order: option of that quantizer.
        gain: option of that quantizer.
    """

    __slots__ = ("_exponents", "_layers", "_mode", "_rounder", "_seqlen", "_sequences", "needs")

    def __init__(
        self,
        *,
        mode: str = "pmq",
        a: float = 1.0,
        b: float = 1.5,
        g: float = 2.0,
        code: bool = False,
        seqlen: int | None = None,
        perturb: str = PAPER,
        damp: float | None = None,
        act_order: bool | None = None,
        gain: bool | None = None,
    ) -> None:
        check_choice("mode", mode, MODES)
        for option, exponent in (("a", a), ("b", b), ("g", g)):
            check_number(option, exponent)
        check_switch("code", code)
        if seqlen is not None:
            check_number("seqlen", seqlen, 1, whole=True)
        self.needs = "activations"
        self._mode = mode
        self._exponents = (a, b, a if code else g)
        self._seqlen = seqlen
        self._rounder = make_rounder(perturb, damp=damp, act_order=act_order, gain=gain)
        self._layers: dict[int, Tally] = {}
        self._sequences: dict[int, int] = {}

    @torch.no_grad()
    def visit(self, view: LayerView, asked: Asked | None) -> None:
        """Add one batch of one layer; see `moeq.costs.base.Cost`."""
        assert asked is not None, "needs activations"
        tally = self._layers.setdefault(view.index, Tally(view, ("squares", "norms")))
        tally.count(asked)
        num_tokens = len(asked.x_TH)
        seqlen = self._seqlen or max(1, num_tokens)
        num_sequences = -(-num_tokens // seqlen)
        squares_UCQ = np.zeros((view.num_units, len(view.candidates), num_sequences))
        for part in perturb(view, asked, self._rounder):
            sequence_S = (part.tokens_S // seqlen).cpu().numpy()
            for difference in part.differences:
                norm_S = torch.linalg.vector_norm(difference.diff_SH, dim=1) * part.weights_S
                square_S = norm_S.double().square_().cpu().numpy()
                square_Q = np.bincount(sequence_S, square_S, minlength=num_sequences)
                squares_UCQ[difference.unit, difference.candidate] += square_Q
        tally.tables["squares"] += squares_UCQ.sum(-1)
        tally.tables["norms"] += np.sqrt(squares_UCQ).sum(-1)
        self._sequences[view.index] = self._sequences.get(view.index, 0) + num_sequences

    def result(self) -> list[LayerCosts]:
        """The costs of all layers; see `moeq.costs.base.Cost`.

        Costs are per token of text ("squared"), or made of shares of tokens, weights per token and norms per
        sequence ("pmq"): one global factor away from sums. Statistics: `freq`, the routed tokens, and `wsum`, the
        sum of their routing weights, as counted.

        Raises:
            CalibrationError: costs are not finite.
        """
        return [self._costs(index) for index in sorted(self._layers)]

    def _costs(self, index: int) -> LayerCosts:
        tally = self._layers[index]
        freq_U, wsum_U = tally.per_unit(tally.tokens_E), tally.per_unit(tally.weight_E)
        num_tokens = max(1, tally.asked)
        if self._mode == "squared":
            costs_UC = tally.tables["squares"] / num_tokens
        else:
            a, b, g = self._exponents
            usage_U = (freq_U / num_tokens) ** a * (wsum_U / num_tokens) ** b
            costs_UC = usage_U[:, None] * (tally.tables["norms"] / max(1, self._sequences[index])) ** g
        return tally.layer_costs(costs_UC, {"freq": freq_U, "wsum": wsum_U})

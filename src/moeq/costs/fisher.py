"""GEMQ's cost: squared gradients of the loss times squared changes of the layer's output (GEMQ, section 2).

To second order, changing a layer's joint output z by dz changes the loss by g.dz + 1/2 dz' H dz. With H the Fisher
information, an expectation of g g', and dz_t = s_t dE_t at the tokens t routed to the expert (s its routing weight):

    diagonal   1/2 sum_t s_t^2 sum_h g_th^2 dE_th^2      what the paper has: g g' without its off-diagonal
    full       1/2 sum_t (s_t g_t . dE_t)^2              all of g g'; changes along and against g cancel as they should

Units. `Asked.grad_TH` is the gradient of a sequence's loss, the mean over its P predicted tokens. The Fisher matrix
of that mean is the mean over predicted tokens of their own gradients' squares, divided by P, which is P times g g'
in expectation. Given `seqlen`, P is known and costs are nats per predicted token; else P counts as 1, and costs are
right up to one global factor. That factor cannot change an allocation.

Legend: T tokens of a batch, S tokens of one expert, H hidden, U units, C candidates, E experts.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.costs.base import Asked, LayerCosts, LayerView
from moeq.costs.options import check_choice, check_number, check_switch
from moeq.costs.perturb import Part, make_rounder, perturb, working_dtype
from moeq.costs.tally import Floats, Tally
from moeq.errors import OptionError

FORMS: Final = ("diagonal", "full")
FLOOR: Final = 32
TOKENS: Final = 256


class Fisher:
    """Loss curvature times what rounding does to the answers; a `moeq.costs.base.Cost`.

    Args:
        perturb: what to round with when measuring: "paper" for GEMQ's RTN_b, or a quantizer, best the one that will
            be used.
        damp: option of that quantizer, as the next two; None leaves its default.
        act_order: option of that quantizer.
        gain: option of that quantizer.
        form: "diagonal" or "full", see the module.
        linear: add the first-order term, for gradients taken where the loss is not at its minimum: in a model that is
            itself rounded (the progressive loop), or on text it was not trained to the end on. The weights of
            `LayerView.read` remain the original's, and dE is the difference to the ORIGINAL expert, so that the
            widths an expert has in that model do not matter, and costs do not favour the rounding it already has
            (GEMQ takes differences to rounded weights, by which an expert at 1 bit would cost nothing at 1 bit and
            something at 2). Then g.dz is what rounding this expert does given everybody else's errors; the share of
            g that stems from the expert's own error, one of many, is not taken out. Its sum over tokens is mostly
            sampling error (its terms have either sign), and is multiplied by max(0, 1 - variance / square), the
            positive-part James-Stein factor, with the variance of the sum estimated over tokens. Costs end at 0: a
            rounding that seems to help is as good as none. Needs gradients of the text's own labels; those of sampled
            labels are zero on average.
        floor: experts with few tokens have costs that say little, and those without have none: the cost per token of
            a unit is averaged with that of the layer's units of the same kind, which counts as `floor` tokens, and
            an expert counts as routed at least `floor` tokens. 0 turns both off: the paper's plain sums, exactly 0
            for an expert that saw no token.
        seqlen: tokens of a sequence, for the units and needed by `linear`.
        tokens: routed tokens of an expert and batch that roundings are tried on, chosen by their squared routing weight
            and gradient so that sums are right on average; 0 tries all, as `linear` does in any case.
    """

    __slots__ = ("_floor", "_form", "_layers", "_linear", "_rounder", "_seqlen", "_squares", "_tokens", "needs")

    def __init__(
        self,
        *,
        perturb: str = "rtn",
        damp: float | None = None,
        act_order: bool | None = None,
        gain: bool | None = None,
        form: str = "diagonal",
        linear: bool = False,
        floor: float = FLOOR,
        seqlen: int | None = None,
        tokens: int = TOKENS,
    ) -> None:
        check_choice("form", form, FORMS)
        check_switch("linear", linear)
        check_number("floor", floor)
        check_number("tokens", tokens, whole=True)
        if seqlen is not None:
            check_number("seqlen", seqlen, 2, whole=True)
        if linear and seqlen is None:
            raise OptionError(
                "first and second order cannot be added without the length of sequences",
                option="linear",
                fix="give seqlen",
            )
        self.needs = "gradients"
        self._rounder = make_rounder(perturb, damp=damp, act_order=act_order, gain=gain)
        self._form = form
        self._linear = linear
        self._floor = floor
        self._seqlen = seqlen
        self._tokens = 0 if linear else tokens
        self._layers: dict[int, Tally] = {}
        self._squares: dict[int, Floats] = {}

    @torch.no_grad()
    def visit(self, view: LayerView, asked: Asked | None) -> None:
        """Add one batch of one layer; see `moeq.costs.base.Cost`."""
        assert asked is not None, "needs activations"
        assert asked.grad_TH is not None, "needs gradients"
        tally = self._layers.setdefault(view.index, Tally(view, ("diagonal", "full", "linear")))
        square_E = self._squares.setdefault(view.index, np.zeros(view.layer.num_experts))
        tally.count(asked)
        # Gradients of a mean may be tiny; squares of products with them must not vanish in float32.
        unit = float(asked.grad_TH.abs().amax()) if len(asked.x_TH) else 0.0
        importance_T = asked.grad_TH.div(unit or 1.0).square().sum(1) if self._tokens else None
        for part in perturb(view, asked, self._rounder, self._tokens, importance_T):
            g_SH = asked.grad_TH[part.tokens_S].to(view.device, working_dtype(asked)).div_(unit or 1.0)
            square_E[part.expert] += unit**2 * part.total(g_SH.square().mean(1).double())
            self._add(tally, part, g_SH.mul_(part.weights_S.unsqueeze(1)), unit)

    def _add(self, tally: Tally, part: Part, sg_SH: Tensor, unit: float) -> None:
        """Add the differences of `part`; `sg_SH` times `unit` is s g."""
        wants_along = self._linear or self._form == "full"
        for difference in part.differences:
            place = (difference.unit, difference.candidate)
            product_SH = difference.diff_SH.mul_(sg_SH)
            if self._form == "diagonal":
                norm_S = torch.linalg.vector_norm(product_SH, dim=1).double()
                tally.tables["diagonal"][place] += unit**2 * part.total(norm_S.square())
            if wants_along:
                along_S = product_SH.sum(1).double()
                tally.tables["full"][place] += unit**2 * part.total(along_S.square())
                tally.tables["linear"][place] += unit * part.total(along_S)

    def result(self) -> list[LayerCosts]:
        """The costs of all layers; see `moeq.costs.base.Cost`.

        Statistics: `tokens` routed, `weight_sum`, the sum of their routing weights, and `gradient`, the mean over
        these tokens and channels of the squared gradient (of the sequence's summed loss where `seqlen` is given).

        Raises:
            CalibrationError: costs are not finite.
        """
        return [self._costs(index) for index in sorted(self._layers)]

    def _costs(self, index: int) -> LayerCosts:
        tally = self._layers[index]
        num_predicted, num_tokens = 1.0, max(1.0, tally.asked)
        if self._seqlen is not None:
            num_predicted = self._seqlen - 1.0
            num_tokens *= num_predicted / self._seqlen
        # With G = P g the gradient of a sequence's summed loss: the mean over predicted tokens of 1/2 (G.dz)^2.
        costs_UC = 0.5 * num_predicted**2 / num_tokens * tally.shrunk(self._form, self._floor)
        if self._linear:
            costs_UC = np.maximum(
                0, costs_UC + num_predicted / num_tokens * certain(*(tally.tables[name] for name in ("linear", "full")))
            )
        tokens_U = tally.per_unit(tally.tokens_E)
        gradient_U = num_predicted**2 * tally.per_unit(self._squares[index]) / np.maximum(tokens_U, 1)
        statistics = {"tokens": tokens_U, "weight_sum": tally.per_unit(tally.weight_E), "gradient": gradient_U}
        return tally.layer_costs(costs_UC, statistics)


def certain(linear: Floats, squares: Floats) -> Floats:
    """Sums over tokens shrunk to what their scatter lets one believe, of any shape.

    Args:
        linear: the sums.
        squares: of the same terms' squares.
    """
    square = linear**2
    kept = 1 - np.divide(squares, square, out=np.ones_like(square), where=square > 0)
    shrunk: Floats = linear * np.maximum(0, kept)
    return shrunk

"""What rounding does to an expert's answers: each expert on its routed tokens, once for each candidate.

With all weights before the experts as they are, the routing of a layer does not depend on how its experts are
rounded. Rounding expert e then changes the layer's output only at the tokens routed to e, by s dE with s the routing
weight and dE = E_rounded(x) - E(x); one pass of the layer per candidate measures all its experts (GEMQ, section 2).

Everything is computed in float32 (float64 for float64 inputs), whatever the model's dtype: at 8 bits the differences
are as small as bfloat16's own rounding. Memory holds one expert's weights, its rounded matrices as codes (a byte per
weight and candidate) and the products of `CHUNK_VALUES`-bounded chunks of tokens. With several batches everything is
rounded again for each, so batches should be large: some thousand tokens per expert.

Legend: T tokens of a batch, S tokens of one expert, H hidden, I expert width, J gate and up outputs side by side,
k experts per token, E experts, N output rows, K input columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from moeq.arch import hooks
from moeq.calibration.experts import MIN_TOKENS
from moeq.costs.base import Asked, LayerView
from moeq.costs.options import check_choice, check_number, check_switch
from moeq.costs.paper_rtn import paper_rtn
from moeq.errors import OptionError, TensorError
from moeq.format.records import dequantize
from moeq.model_parts import MoeLayer
from moeq.quantizers.base import Quantizer
from moeq.quantizers.registry import QUANTIZERS, make_quantizer
from moeq.spec import QuantSpec

PAPER: Final = "paper"
"""The name of the papers' own rounding (`moeq.costs.paper_rtn`) among the quantizers."""
CHUNK_VALUES: Final = 1 << 24
"""Values of one set of products (gate, up, output) of the tokens that are worked on together."""

Decode = Callable[[], Tensor]
"""Makes rounded weights (N, K), on the device of the weights they were made from."""


class Rounder(Protocol):
    """Rounds a matrix for measuring.

    Attributes:
        needs_hessian: whether `round` wants the inputs' second moments.
    """

    needs_hessian: bool

    def round(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> Decode:
        """Round `w_NK` to `spec`; what comes back decodes it, any number of times."""
        ...


class PaperRounder:
    """The papers' RTN_b; of a spec only the width and the group size count."""

    __slots__ = ("needs_hessian",)

    def __init__(self) -> None:
        self.needs_hessian = False

    def round(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> Decode:
        """See `Rounder`."""
        del hessian_KK
        return lambda: paper_rtn(w_NK, spec.bits, spec.group_size)


class QuantizerRounder:
    """Rounds as a packed checkpoint would store it."""

    __slots__ = ("_quantizer", "needs_hessian")

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self.needs_hessian = quantizer.needs_hessian

    def round(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> Decode:
        """See `Rounder`."""
        rounded = self._quantizer.quantize(w_NK, spec, hessian_KK)
        device = w_NK.device
        codes_NK, scale_NG = rounded.codes_NK.to(device), rounded.scale_NG.to(device)
        zero_NG = None if rounded.zero_NG is None else rounded.zero_NG.to(device)
        return lambda: dequantize(codes_NK, scale_NG, zero_NG, spec)


def make_rounder(
    perturb: str, *, damp: float | None = None, act_order: bool | None = None, gain: bool | None = None
) -> Rounder:
    """The rounder called `perturb`: "paper" or any quantizer.

    Args:
        perturb: its name.
        damp: option of the quantizer; None leaves its default, as for the others.
        act_order: option of the quantizer.
        gain: option of the quantizer.

    Raises:
        OptionError: no such rounder, or it has no such option.
    """
    wanted = {"damp": damp, "act_order": act_order, "gain": gain}
    options = {name: value for name, value in wanted.items() if value is not None}
    check_choice("perturb", perturb, (PAPER, *QUANTIZERS))
    for name, value in options.items():
        check_number(name, value) if name == "damp" else check_switch(name, value)
    if perturb == PAPER and not options:
        return PaperRounder()
    if perturb == PAPER:
        raise OptionError(f"{PAPER} does not know {min(options)!r}", option=min(options), fix="it has no options")
    return QuantizerRounder(make_quantizer(perturb, **options))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difference:
    """What one candidate does to one unit.

    Attributes:
        unit: row of the unit in its layer, in storage order.
        candidate: column of the candidate.
        diff_SH: rounded expert's answers minus the original's, not weighted, on the view's device.
    """

    unit: int
    candidate: int
    diff_SH: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Some of the tokens routed to one expert.

    Attributes:
        expert: which expert.
        tokens_S: their positions in the batch, on the device of the batch.
        weights_S: their routing weights in the dtype of the differences, on the view's device.
        stands_S: for how many tokens each stands, float64 on the view's device; None if all are there.
        differences: every unit of the expert under every candidate, computed as it is asked for.
    """

    expert: int
    tokens_S: Tensor
    weights_S: Tensor
    differences: Iterator[Difference]
    stands_S: Tensor | None = None

    def total(self, values_S: Tensor) -> float:
        """The sum over all tokens of a number of each, (S,) float64, as far as the chosen ones tell."""
        return float((values_S if self.stands_S is None else values_S * self.stands_S).sum())


def working_dtype(asked: Asked) -> torch.dtype:
    """What differences are computed in: float64 for float64 inputs, else float32."""
    return torch.float64 if asked.x_TH.dtype == torch.float64 else torch.float32


def perturb(
    view: LayerView, asked: Asked, rounder: Rounder, limit: int = 0, importance_T: Tensor | None = None
) -> Iterator[Part]:
    """Round every expert that was asked anything, in all ways, and compare its answers.

    With unit "expert" all matrices of an expert are rounded to the candidate at once; with "matrix" one at a time,
    the others being the original's. A rounder that needs Hessians gets those of this batch: of the tokens routed to
    the expert, filled up to `MIN_TOKENS` with tokens of the whole batch as in packing; the down projection's come
    from the original gate and up.

    Args:
        view: the layer.
        asked: what its experts were asked.
        rounder: rounds.
        limit: tokens of an expert that are tried, chosen by `chosen_tokens`; 0 tries all.
        importance_T: how much of the sums may come from a token, with its squared routing weight; none for all alike.

    Call it without gradients enabled. The differences of a part must be read before the next part is asked for.

    Raises:
        TensorError: weights that are not finite.
    """
    layer = view.layer
    order, counts = hooks.by_expert(asked.index_Tk, layer.num_experts)
    top_k = asked.index_Tk.shape[-1]
    flat_weights = asked.weights_Tk.reshape(-1)
    step = _chunk_tokens(layer)
    start = 0
    for expert, count in enumerate(counts):
        choices = order[start : start + count]
        start += count
        if not count:
            continue
        subject = _subject(view, asked, expert)
        rounded = _round(subject, choices // top_k, rounder)
        stands_S = None
        if limit and count > limit:
            sizes_S = flat_weights[choices].double().square()
            if importance_T is not None:
                sizes_S *= importance_T[choices // top_k].double()
            kept, stands_S = chosen_tokens(sizes_S, limit)
            choices = choices[kept]
        for at in range(0, len(choices), step):
            chunk = choices[at : at + step]
            yield Part(
                expert=expert,
                tokens_S=chunk // top_k,
                weights_S=flat_weights[chunk].to(view.device, working_dtype(asked)),
                differences=_differences(subject, rounded, chunk // top_k),
                stands_S=None if stands_S is None else stands_S[at : at + step].to(view.device),
            )


def chosen_tokens(sizes_S: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Some tokens in the stead of all, so that sums over them are right on average.

    A token is chosen with a probability that rises with its size (a tenth of the mean for the smallest), and stands for
    one divided by that; the largest are chosen for certain. The choice is systematic: even steps along the running sum
    of the probabilities, which scatters less than chance and is the same every time.

    Args:
        sizes_S: not negative, float64.
        count: how many, about; fewer than there are.

    Returns:
        positions, rising; and for how many tokens each stands, float64.
    """
    shares_S = sizes_S + 0.1 * sizes_S.mean()
    if not float(shares_S.sum()) > 0:
        shares_S = torch.ones_like(sizes_S)
    chances_S = torch.zeros_like(shares_S)
    sure_S = torch.zeros_like(shares_S, dtype=torch.bool)
    while True:  # those that would be chosen more than once are chosen once, and the others share what is left
        left = count - int(sure_S.sum())
        rest = float(shares_S[~sure_S].sum())
        chances_S = torch.where(sure_S, 1.0, shares_S * left / max(rest, 1e-300))
        over_S = (chances_S >= 1) & ~sure_S
        if not bool(over_S.any()):
            break
        sure_S |= over_S
    steps_S = torch.floor(chances_S.cumsum(0) + 0.5)
    kept = torch.nonzero(torch.diff(steps_S, prepend=steps_S.new_zeros(1)) > 0).squeeze(1)
    return kept, 1 / chances_S[kept]


def _chunk_tokens(layer: MoeLayer) -> int:
    return max(1, CHUNK_VALUES // sum(rows for rows, _ in layer.shapes.values()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Subject:
    """One expert: gate and up as one matrix (J, K), since they share inputs and rows are rounded independently."""

    view: LayerView
    asked: Asked
    expert: int
    inputs_JK: Tensor
    down_HI: Tensor

    def x(self, tokens_S: Tensor) -> Tensor:
        return self.asked.x_TH[tokens_S].to(self.inputs_JK)

    def split(self, products_SJ: Tensor) -> Sequence[Tensor]:
        """The products of each input projection, in storage order."""
        shapes = self.view.layer.shapes
        return products_SJ.split([shapes[name][0] for name in self.view.layer.projections[:-1]], dim=-1)

    def inner(self, products: Sequence[Tensor]) -> Tensor:
        gate_SI, up_SI = products if len(products) == 2 else (None, products[0])
        return hooks.activation(self.asked.experts, self.expert, gate_SI, up_SI)

    def answer(self, inner_SI: Tensor, down_HI: Tensor) -> Tensor:
        return hooks.finish(self.asked.experts, self.expert, inner_SI @ down_HI.T)


def _subject(view: LayerView, asked: Asked, expert: int) -> _Subject:
    weights = []
    for name in view.layer.projections:
        w_NK = view.read(expert, name).to(view.device, working_dtype(asked))
        if not bool(torch.isfinite(torch.stack([w_NK.amin(), w_NK.amax()])).all()):
            raise TensorError(
                f"the {name} weights of expert {expert} hold NaN or infinity",
                tensor=view.layer.sources[name].tensor(expert),
                fix="repair the checkpoint, such weights cannot be rounded",
            )
        weights.append(w_NK)
    *inputs, down_HI = weights
    inputs_JK = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
    return _Subject(view=view, asked=asked, expert=expert, inputs_JK=inputs_JK, down_HI=down_HI)


def _round(subject: _Subject, tokens_S: Tensor, rounder: Rounder) -> list[tuple[Decode, Decode]]:
    """Decoders of (gate and up, down) for each candidate."""
    hessian_KK, hessian_II = _second_moments(subject, tokens_S) if rounder.needs_hessian else (None, None)
    candidates = subject.view.candidates
    # One matrix after the other, so that a quantizer factors each Hessian once for all candidates.
    inputs = [rounder.round(subject.inputs_JK, spec, hessian_KK) for spec in candidates]
    down = [rounder.round(subject.down_HI, spec, hessian_II) for spec in candidates]
    return list(zip(inputs, down, strict=True))


def _second_moments(subject: _Subject, tokens_S: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens of x x^T, for the expert's inputs and for those of its down projection, float32."""
    num_tokens = len(subject.asked.x_TH)
    wanted = min(MIN_TOKENS, num_tokens) - len(tokens_S)
    if wanted > 0:
        borrowed = torch.linspace(0, num_tokens - 1, wanted, device=tokens_S.device).long()
        tokens_S = torch.cat([tokens_S, borrowed])
    device = subject.inputs_JK.device
    hessian_KK, hessian_II = (
        torch.zeros(size, size, device=device) for size in (subject.inputs_JK.shape[1], subject.down_HI.shape[1])
    )
    for chunk in tokens_S.split(_chunk_tokens(subject.view.layer)):
        x_SK = subject.x(chunk)
        inner_SI = subject.inner(subject.split(x_SK @ subject.inputs_JK.T)).float()
        hessian_II.addmm_(inner_SI.T, inner_SI)
        x_SK = x_SK.float()
        hessian_KK.addmm_(x_SK.T, x_SK)
    return hessian_KK, hessian_II


def _differences(subject: _Subject, rounded: list[tuple[Decode, Decode]], tokens_S: Tensor) -> Iterator[Difference]:
    x_SK = subject.x(tokens_S)
    products = subject.split(x_SK @ subject.inputs_JK.T)
    inner_SI = subject.inner(products)
    answer_SH = subject.answer(inner_SI, subject.down_HI)
    whole = subject.view.unit != "matrix"
    first = subject.expert * (1 if whole else len(products) + 1)
    for candidate, (decode_inputs, decode_down) in enumerate(rounded):
        changed = subject.split(x_SK @ decode_inputs().to(x_SK.dtype).T)
        down_HI = decode_down().to(x_SK.dtype)
        if whole:
            diff_SH = subject.answer(subject.inner(changed), down_HI).sub_(answer_SH)
            yield Difference(unit=first, candidate=candidate, diff_SH=diff_SH)
            continue
        for i in range(len(products)):
            mixed = (*products[:i], changed[i], *products[i + 1 :])
            diff_SH = subject.answer(subject.inner(mixed), subject.down_HI).sub_(answer_SH)
            yield Difference(unit=first + i, candidate=candidate, diff_SH=diff_SH)
        diff_SH = subject.answer(inner_SI, down_HI).sub_(answer_SH)
        yield Difference(unit=first + len(products), candidate=candidate, diff_SH=diff_SH)

"""Costs of linears outside the experts, comparable with those of experts.

Rounding a linear changes its output y = W x by dy = (W_rounded - W) x at every token that comes by. With g = dL/dy the
second-order terms are those of `moeq.costs.fisher`, s dE being dy and z being y:

    diagonal   1/2 sum_t sum_n g_tn^2 dy_tn^2
    full       1/2 sum_t (g_t . dy_t)^2

in the same units, so that experts and linears can share one program. Rounding is what packing does to these linears
(docs/decisions/0011): to nearest, with or without matching the gain, whatever rounds the experts.

Legend: T tokens of one call, N output rows, K input columns, C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from moeq.costs.base import Heard, LinearCost, LinearView
from moeq.costs.fisher import certain
from moeq.costs.matrices import energy, rounding_error
from moeq.costs.perturb import CHUNK_VALUES, Decode, QuantizerRounder
from moeq.costs.tally import Floats
from moeq.errors import CalibrationError, OptionError
from moeq.quantizers.base import Quantizer


class WeightErrorLinears:
    """||W - W_hat||^2 of linears, as `moeq.costs.weight_error.WeightError` has it of experts; a `LinearCost`.

    Args:
        quantizer: what rounds them.
        relative: divide by ||W||^2.
    """

    __slots__ = ("_costs", "_quantizer", "_relative", "needs")

    def __init__(self, quantizer: Quantizer, *, relative: bool = False) -> None:
        self.needs = "weights"
        self._quantizer = quantizer
        self._relative = relative
        self._costs: dict[str, tuple[float, ...]] = {}

    @torch.no_grad()
    def visit(self, view: LinearView, heard: Heard | None) -> None:
        """Round to every candidate; see `moeq.costs.base.LinearCost`."""
        del heard
        w_NK = view.read().to(view.device)
        scale = (energy(w_NK) or 1.0) if self._relative else 1.0
        self._costs[view.path] = tuple(rounding_error(w_NK, self._quantizer, spec) / scale for spec in view.candidates)

    def result(self, num_tokens: int) -> dict[str, tuple[float, ...]]:
        """The costs; text plays no part in them."""
        del num_tokens
        return self._costs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rounded:
    """A linear's weights and what they become; codes, not numbers, so that all of a block may stay in memory."""

    w_NK: Tensor
    decoders: tuple[Decode, ...]


class FisherLinears:
    """Squared gradients times squared changes of a linear's output; a `LinearCost`.

    Every call of a linear adds its tokens: one that is called twice for each token costs what both calls cost. One
    that no call was heard of costs 0 everywhere, which `moeq.artifacts.CostTable` takes for "leave it".

    Args:
        quantizer: what rounds them.
        form: as for `moeq.costs.fisher.Fisher`.
        linear: likewise.
        seqlen: likewise.
    """

    __slots__ = ("_block", "_form", "_linear", "_rounded", "_rounder", "_seqlen", "_sums", "needs")

    def __init__(
        self, quantizer: Quantizer, *, form: str = "diagonal", linear: bool = False, seqlen: int | None = None
    ) -> None:
        self.needs = "gradients"
        self._rounder = QuantizerRounder(quantizer)
        self._form = form
        self._linear = linear
        self._seqlen = seqlen
        self._block = ""
        self._rounded: dict[str, _Rounded] = {}
        self._sums: dict[str, dict[str, Floats]] = {}

    @torch.no_grad()
    def visit(self, view: LinearView, heard: Heard | None) -> None:
        """Add one call; see `moeq.costs.base.LinearCost`."""
        assert heard is not None, "needs gradients"
        assert heard.grad_TN is not None, "needs gradients"
        if view.block != self._block:
            self._block = view.block
            self._rounded.clear()
        dtype = torch.float64 if heard.x_TK.dtype == torch.float64 else torch.float32
        if view.path not in self._rounded:
            self._rounded[view.path] = self._round(view)
        rounded = self._rounded[view.path]
        w_NK = rounded.w_NK.to(dtype)
        columns = len(view.candidates)
        sums = self._sums.setdefault(view.path, {name: np.zeros(columns) for name in ("diagonal", "full", "linear")})
        # Gradients of a mean may be tiny; squares of products with them must not vanish in float32.
        unit = float(heard.grad_TN.abs().amax()) or 1.0 if len(heard.x_TK) else 1.0
        step = max(1, CHUNK_VALUES // w_NK.shape[0])
        for column, decode in enumerate(rounded.decoders):
            change_NK = decode().to(dtype).sub_(w_NK)
            for x_TK, g_TN in zip(heard.x_TK.split(step), heard.grad_TN.split(step), strict=True):
                product_TN = (x_TK.to(dtype) @ change_NK.T).mul_(g_TN.to(dtype) / unit)
                norm_T = torch.linalg.vector_norm(product_TN, dim=1).double()
                along_T = product_TN.sum(1).double()
                sums["diagonal"][column] += unit**2 * float(norm_T.square().sum())
                sums["full"][column] += unit**2 * float(along_T.square().sum())
                sums["linear"][column] += unit * float(along_T.sum())

    def _round(self, view: LinearView) -> _Rounded:
        w_NK = view.read().to(view.device)
        return _Rounded(w_NK=w_NK, decoders=tuple(self._rounder.round(w_NK, spec, None) for spec in view.candidates))

    def result(self, num_tokens: int) -> dict[str, tuple[float, ...]]:
        """The costs, nats per predicted token where `seqlen` was given; see `moeq.costs.fisher`.

        Raises:
            CalibrationError: they are not finite.
        """
        num_predicted, scored = 1.0, max(1.0, num_tokens)
        if self._seqlen is not None:
            num_predicted = self._seqlen - 1.0
            scored *= num_predicted / self._seqlen
        found = {}
        for path, sums in self._sums.items():
            costs_C = 0.5 * num_predicted**2 / scored * sums[self._form]
            if self._linear:
                costs_C = np.maximum(0, costs_C + num_predicted / scored * certain(sums["linear"], sums["full"]))
            if not np.isfinite(costs_C).all():
                raise CalibrationError(
                    f"linear {path} has costs that are not finite",
                    fix="run the model in float32: its activations or gradients leave the range of its dtype",
                )
            found[path] = tuple(map(float, costs_C))
        return found


LINEAR_COSTS: Final[dict[str, tuple[Callable[..., LinearCost], tuple[str, ...]]]] = {
    "weight-error": (WeightErrorLinears, ("relative",)),
    "fisher": (FisherLinears, ("form", "linear", "seqlen")),
}
"""Cost of experts -> the cost of linears that is comparable with it, and which of its options that has too.

Not in here: `output-error`, since changes of different outputs do not compare, and `spectral-tail`, whose tail index is
calibrated on matrices of one kind.
"""


def make_linear_cost(name: str, quantizer: Quantizer, **options: Any) -> LinearCost:
    """The cost of linears that goes with the experts' cost `name`.

    Args:
        name: of the experts' cost.
        quantizer: what rounds linears.
        options: those of the experts' cost, checked by it.

    Raises:
        OptionError: that cost does not compare with any of linears.
    """
    if name not in LINEAR_COSTS:
        raise OptionError(
            f"auto cannot compare other linears with experts by cost {name}",
            option="dense-bits",
            fix=f"choose a --cost of {', '.join(sorted(LINEAR_COSTS))}, or a width",
        )
    make, shared = LINEAR_COSTS[name]
    return make(quantizer, **{option: options[option] for option in shared if option in options})

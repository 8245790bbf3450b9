"""Half-quadratic quantization: rounding that is fitted to most weights rather than to the largest ones.

Minimises sum |w - w_hat|^p with p < 1 over scale and zero of each group (Badri and Shaji, "Half-Quadratic
Quantization of Large Machine Learning Models", 2023), no data needed. An auxiliary error e' splits the problem:
the shrinkage step solves  min |e'|^p + beta/2 (e - e')^2  approximately, e' = sign(e) max(0, |e| - |e|^(p-1) / beta),
then least squares fits zero and scale to the weights less e'. Weights whose error was shrunk to e' = 0 count fully,
clipped ones only with the part |e - e'|.

The threshold of the shrinkage, beta^(-1 / (2 - p)), is a length. In raw weight units, as in the published code, all
errors of an expert with weights of size 0.02 lie below it and the shrinkage does nothing. Here errors are measured in
codes (divided by the scale): rounding errors end at 0.5 whatever the weights' size. The threshold starts at one code,
so that at first only clearly clipped weights are set apart, and sinks towards 0.35.

Legend: M groups in a chunk, g weights per group.
"""

import math
from typing import ClassVar, Final

import torch
from torch import Tensor

from moeq.errors import OptionError
from moeq.native import Rounding
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.levels import Groups, levels_of, quantize_groups
from moeq.quantizers.rtn import candidates, fit_range
from moeq.spec import QuantSpec

BETA: Final = 1.0
"""The shrinkage first sets apart what was clipped by more than a code."""
GROWTH: Final = 2.0
ITERATIONS: Final = 3
EVERY: Final = 2
"""Of the candidate ranges only one in so many is tried: the alternations find the rest of the way."""
SETTLED: Final = 1e-3
"""A group is done when its scale changes by no more than this share and its zero by no more than this part of a code.
"""


def _step(groups: Groups, ratio_M1: Tensor, zero_M1: Tensor, beta: float, p: float) -> tuple[Tensor, Tensor]:
    """One alternation: round, shrink the errors, least squares. Returns new ratio and zero, as stored."""
    e_Mg, q_Mg = groups.code(ratio_M1, zero_M1)
    e_Mg.sub_(q_Mg)
    d_Mg = q_Mg.sub_(zero_M1)
    # kept = e - e' = e min(1, |e|^(p-2) / beta); the power as exp(x log |e|) is several times faster than pow, and
    # clamping before exp takes care of e = 0.
    log_Mg = groups.scratch_Mg
    torch.abs(e_Mg, out=log_Mg)
    kept_Mg = log_Mg.log_().mul_(p - 2).sub_(math.log(beta)).clamp_(max=0).exp_().mul_(e_Mg)
    count = kept_Mg.shape[1]
    kd_M1 = torch.mul(kept_Mg, d_Mg, out=e_Mg).sum(1, keepdim=True)
    if groups.levels.zero is not None:
        dd_M1 = torch.linalg.vector_norm(d_Mg, dim=1, keepdim=True).square_()
        growth_M1 = _sane(kd_M1 / dd_M1)
        return groups.stored(ratio_M1 * (1 + growth_M1)), zero_M1
    # The target d + kept is fitted by (1 + growth) * (d - move): a straight line in d.
    d_M1 = d_Mg.sum(1, keepdim=True)
    k_M1 = kept_Mg.sum(1, keepdim=True)
    dd_M1 = torch.linalg.vector_norm(d_Mg, dim=1, keepdim=True).square_()
    growth_M1 = _sane((kd_M1 - k_M1 * d_M1 / count) / (dd_M1 - d_M1.square() / count))
    move_M1 = (growth_M1 * d_M1 - k_M1) / (count * (1 + growth_M1))
    return groups.stored(ratio_M1 * (1 + growth_M1)), groups.levels.store_zero(zero_M1 + move_M1)


def _sane(growth_M1: Tensor) -> Tensor:
    """Relative changes of the scale, bounded; none where all codes are the same."""
    return growth_M1.nan_to_num_(0.0, 0.0, 0.0).clamp_(-0.5, 1.0)


def fit_half_quadratic(groups: Groups, bits: int, iterations: int, p: float) -> tuple[Tensor, Tensor]:
    """(ratio, zero) of each group, as stored: a coarsely searched range, then half-quadratic alternations."""
    ratio_M1, zero_M1 = fit_range(groups, bits, refits=0, every=EVERY)
    moving_M1 = torch.ones_like(ratio_M1, dtype=torch.bool)
    beta = BETA
    for _ in range(iterations):
        new_ratio_M1, new_zero_M1 = _step(groups, ratio_M1, zero_M1, beta, p)
        # Group by group, so that the result does not depend on which groups share a chunk.
        shift_M1 = torch.maximum((new_ratio_M1 / ratio_M1 - 1).abs(), (new_zero_M1 - zero_M1).abs())
        moving_M1 &= shift_M1 > SETTLED
        if not bool(moving_M1.any()):
            break
        ratio_M1 = torch.where(moving_M1, new_ratio_M1, ratio_M1)
        zero_M1 = torch.where(moving_M1, new_zero_M1, zero_M1)
        beta *= GROWTH
    return ratio_M1, zero_M1


class Hqq:
    """Half-quadratic quantization.

    Args:
        iterations: most alternations per group.
        p: exponent of the error, above 0 and at most 1.
        gain: match the gain of every group (docs/decisions/0013); raises the squared error, lowers the model's.
    """

    __slots__ = ("gain", "iterations", "p")

    needs_hessian: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("gain",)
    weights_per_second: ClassVar[float] = 250e6

    def __init__(self, *, iterations: int = ITERATIONS, p: float = 0.7, gain: bool = False) -> None:
        if not 0 < p <= 1:
            raise OptionError(f"{p} is no exponent", option="p", fix="choose a number above 0 and at most 1")
        self.iterations = iterations
        self.gain = gain
        self.p = p

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None = None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`. The Hessian is not looked at."""
        del hessian_KK
        rounding = Rounding(
            fit="half-quadratic",
            ratios=candidates(spec.bits, signed=levels_of(spec).signed, every=EVERY),
            iterations=self.iterations,
            p=self.p,
            beta=BETA,
            growth=GROWTH,
            settled=SETTLED,
        )
        return quantize_groups(
            w_NK,
            spec,
            lambda groups: fit_half_quadratic(groups, spec.bits, self.iterations, self.p),
            gain=self.gain,
            rounding=rounding,
        )

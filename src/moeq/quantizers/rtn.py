"""Rounding to nearest: `minmax` without a search, `rtn` with a searched clip range.

The range [low, high] of a group spends levels on its few largest weights. Clipping them costs less than it gains at
low widths: with a wide search a Gaussian group loses 0.113 of its energy at 2 bits instead of 0.251 (a +-10 %
search, as published code has it, reaches 0.20). The search here is coarse, over shrink ratios fitting the width, and
then alternates least squares for scale and zero with rounding, which finds the nearby optimum the grid missed.

Legend: M groups in a chunk, g weights per group.
"""

from typing import ClassVar, Final

import torch
from torch import Tensor

from moeq.native import Rounding
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.levels import Groups, levels_of, quantize_groups
from moeq.spec import QuantSpec

RATIOS: Final = {
    1: (0.6, 0.42, 0.32, 0.24, 0.17),
    2: (1.0, 0.8, 0.66, 0.55, 0.45, 0.33, 0.2),
    3: (1.0, 0.9, 0.8, 0.71, 0.6, 0.45, 0.25),
    4: (1.0, 0.9, 0.81, 0.65, 0.4),
    5: (1.0, 0.965, 0.925, 0.87, 0.65, 0.3),
    6: (1.0, 0.98, 0.955, 0.85, 0.5),
    8: (1.0, 0.995, 0.985, 0.8),
}
"""Shrink ratios tried for each width, densest where Gaussian and Student-t (4) groups have their optima."""
BOTH_SIGNS_BITS: Final = 3
"""Up to this width one extra level on the other side matters enough to try both signs of a signed scale."""
REFITS: Final = 2


def polish(groups: Groups, ratio_M1: Tensor, zero_M1: Tensor, refits: int) -> tuple[Tensor, Tensor]:
    """Alternate rounding and least squares."""
    for _ in range(refits):
        ratio_M1, zero_M1 = groups.refit(ratio_M1, zero_M1)
    return ratio_M1, zero_M1


def candidates(bits: int, *, signed: bool, every: int = 1) -> tuple[float, ...]:
    """Ratios to try: one in `every` of `RATIOS`, with both signs where a signed scale is worth turning round."""
    ratios = RATIOS[bits][::every]
    return ratios + tuple(-ratio for ratio in ratios) if signed and bits <= BOTH_SIGNS_BITS else ratios


def fit_range(groups: Groups, bits: int, refits: int = REFITS, every: int = 1) -> tuple[Tensor, Tensor]:
    """Searched (ratio, zero) of each group, as stored; of `RATIOS` only one in `every` is tried."""
    ratio_M1 = groups.best_of(candidates(bits, signed=groups.levels.signed, every=every))
    return polish(groups, groups.stored(ratio_M1), groups.zero_M1, refits)


def fit_minmax(groups: Groups, bits: int) -> tuple[Tensor, Tensor]:
    """Min-max (ratio, zero) of each group; at 1 bit plus or minus mean |w| (GEMQ, section on the cost table)."""
    if bits > 1 or groups.levels.signed:
        return groups.stored(torch.ones_like(groups.unit_M1)), groups.zero_M1
    ratio_M1 = groups.v_Mg.abs().mean(1, keepdim=True).mul_(2)
    return groups.stored(ratio_M1), groups.levels.store_zero(torch.full_like(ratio_M1, 0.5))


class MinMax:
    """Plain rounding: the range of a group is that of its weights."""

    __slots__ = ()

    needs_hessian: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    weights_per_second: ClassVar[float] = 600e6

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None = None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`. The Hessian is not looked at."""
        del hessian_KK
        rounding = Rounding(fit="minmax")
        return quantize_groups(w_NK, spec, lambda groups: fit_minmax(groups, spec.bits), rounding=rounding)


class Rtn:
    """Rounding to nearest with a searched clip range and least-squares scales.

    Args:
        refits: alternations of least squares and rounding after the search.
        gain: match the gain of every group (docs/decisions/0013); raises the squared error, lowers the model's.
    """

    __slots__ = ("gain", "refits")

    needs_hessian: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("gain",)
    weights_per_second: ClassVar[float] = 400e6

    def __init__(self, *, refits: int = REFITS, gain: bool = False) -> None:
        self.gain = gain
        self.refits = refits

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None = None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`. The Hessian is not looked at."""
        del hessian_KK
        ratios = candidates(spec.bits, signed=levels_of(spec).signed)
        return quantize_groups(
            w_NK,
            spec,
            lambda groups: fit_range(groups, spec.bits, self.refits),
            gain=self.gain,
            rounding=Rounding(fit="search", ratios=ratios, refits=self.refits),
        )

"""The quantizer that was released with BitsMoE, as a control (BitsMoE notes, section 5).

At 2 to 4 bits the scale starts at mean |w| and alternates least squares with rounding: it stays near where it began,
so at 4 bits it loses more than twice what `rtn` does (section 3, check values). Wider codes take the largest weight.

Legend: M groups in a chunk.
"""

from typing import ClassVar, Final

from torch import Tensor

from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.levels import Groups, quantize_groups
from moeq.quantizers.rtn import fit_minmax, polish
from moeq.spec import QuantSpec

ALTERNATIONS: Final = 50
FITTED_BITS: Final = 4
"""Widest codes whose scale is fitted."""


class Alternating:
    """Alternating least squares from mean |w|; meant for the level sets `half` at 1 bit and `sym` above."""

    __slots__ = ()

    needs_hessian: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    weights_per_second: ClassVar[float] = 20e6

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None = None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`. The Hessian is not looked at."""
        del hessian_KK

        def fit(groups: Groups) -> tuple[Tensor, Tensor]:
            if spec.bits == 1:
                return fit_minmax(groups, spec.bits)
            # The released scale is positive; a unit is negative where the level that has no partner serves better.
            sign_M1 = groups.unit_M1.sign()
            if spec.bits <= FITTED_BITS:
                ratio_M1 = groups.stored(groups.v_Mg.abs().mean(1, keepdim=True) * sign_M1)
                return polish(groups, ratio_M1, groups.zero_M1, ALTERNATIONS)
            largest_M1 = groups.v_Mg.abs().amax(1, keepdim=True)
            return groups.stored(largest_M1 * sign_M1 / (2 ** (spec.bits - 1) - 1)), groups.zero_M1

        return quantize_groups(w_NK, spec, fit)

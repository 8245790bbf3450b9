"""`gptq-mc`: GPTQ as the code behind the mixed-precision MoE papers has it (MC-MoE; used by GEMQ and AlphaQ).

Only for reproducing published numbers; `gptq` is better at every width. What differs:

- the range search covers +-10 % of the min-max range only and minimises sum |w - w_hat|^2.4; at 1 bit there is none,
  the levels are plus and minus mean |w|;
- up to 3 bits errors are made up for only after each block of 128 inputs, not inside it;
- weights of inputs that no token excited become zero (unless no input was excited at all);
- zeros are floats: use it with `asym16`. Other level sets round the zero to what they can store.

Legend: N output rows, K input columns, M groups in a chunk, g weights per group.
"""

from typing import ClassVar, Final

import torch
from torch import Tensor

from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gptq import round_columns
from moeq.quantizers.hessian import FactorCache, check_inputs
from moeq.quantizers.levels import Groups, quantize_groups
from moeq.quantizers.rtn import fit_minmax
from moeq.spec import QuantSpec

FEEDBACK_BITS: Final = 4
"""Errors are made up for inside a block from this width on."""
RATIOS: Final = tuple(1 + step / 500 for step in (0, *range(1, 51), *(-step for step in range(1, 51))))
"""Of several equally good ratios the first wins, so 1 comes first."""
EXPONENT: Final = 2.4


def fit_narrow(groups: Groups, bits: int) -> tuple[Tensor, Tensor]:
    """(ratio, zero) of the +-10 % search, as stored (GEMQ section 5, AlphaQ section 7.1-7.2)."""
    if bits == 1:
        return fit_minmax(groups, bits)
    error_M1 = torch.full_like(groups.unit_M1, torch.inf)
    best_M1 = torch.ones_like(groups.unit_M1)
    for ratio in RATIOS:
        e_Mg, q_Mg = groups.code(ratio, groups.zero_M1)
        e_Mg.sub_(q_Mg)
        # |e|^2.4 as exp(2.4 log |e|), several times faster than pow.
        new_M1 = e_Mg.abs_().log_().mul_(EXPONENT).exp_().sum(1, keepdim=True).mul_(ratio**EXPONENT)
        best_M1.masked_fill_(new_M1 < error_M1, ratio)
        torch.minimum(error_M1, new_M1, out=error_M1)
    return groups.stored(best_M1), groups.zero_M1


class GptqMc:
    """GPTQ in the flavour of the papers' code.

    Args:
        damp: damping in units of the Hessian's mean diagonal; grows tenfold while the Hessian stays singular.
    """

    __slots__ = ("_factors",)

    needs_hessian: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()
    weights_per_second: ClassVar[float] = 4e6

    def __init__(self, *, damp: float = 0.01) -> None:
        self._factors = FactorCache(damp=damp, act_order=False)

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`.

        Raises:
            OptionError: no Hessian given.
            TensorError: the weights are no finite matrix, or the Hessian does not fit them.
            CalibrationError: the Hessian is not finite or cannot be made positive definite.
        """
        factor = self._factors.get(check_inputs(w_NK, hessian_KK, "gptq-mc"), w_NK.device)

        def fit(groups: Groups) -> tuple[Tensor, Tensor]:
            return fit_narrow(groups, spec.bits)

        if factor is None:
            return quantize_groups(w_NK, spec, fit)
        w_NK = w_NK.masked_fill(factor.dead_K, 0)
        return round_columns(w_NK, factor, spec, fit, feedback=spec.bits >= FEEDBACK_BITS)

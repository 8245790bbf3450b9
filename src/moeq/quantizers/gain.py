"""Rounded weights as long as the originals.

Scales that minimise the squared error shrink what they round: the best w_hat is the mean of all weights that share a
code, hence <w_hat, w> = ||w_hat||^2 < ||w||^2, by the relative squared error itself (12 % at 2 bits, 36 % at 1 bit).
Noise averages out over a layer's inputs, a common shrinkage does not: every expert would answer too softly. Growing
the scales until <w_hat, w> = ||w||^2, codes held fixed, costs squared error and gains the model
(docs/decisions/0013 has the figures).

Legend: N output rows, K input columns.
"""

from dataclasses import replace
from typing import Final

from torch import Tensor
from torch.nn import functional

from moeq.quantizers.base import QuantizedMatrix
from moeq.spec import WHOLE_ROW, QuantSpec

GAINS: Final = (0.5, 2.0)
"""Bounds of a gain; a Gaussian group at 1 bit wants 1.57."""
SCALE_MAX: Final = 65504.0


def bounded_gain(gain: Tensor) -> Tensor:
    """A gain without the accidents of groups that round to (nearly) nothing."""
    return gain.nan_to_num_(1.0, 1.0, 1.0).clamp_(*GAINS)


def rounded_weights(rounded: QuantizedMatrix, spec: QuantSpec) -> Tensor:
    """What a quantized matrix stands for, (N, K) float32."""
    columns = rounded.codes_NK.shape[1]
    width = columns if spec.group_size == WHOLE_ROW else spec.group_size
    zero: Tensor | float
    if rounded.zero_NG is None:
        zero = 2.0 ** (spec.bits - 1) if spec.levels == "sym" else (2**spec.bits - 1) / 2
    else:
        step = (2**spec.bits - 1) / 255 if spec.levels == "asym" else 1.0
        zero = (rounded.zero_NG.float() * step).unsqueeze(-1)
    # Groups as a dimension of their own: nothing has to be gathered.
    w_NGg = functional.pad(rounded.codes_NK.float(), (0, -columns % width)).unflatten(1, (-1, width))
    return w_NGg.sub_(zero).mul_(rounded.scale_NG.float().unsqueeze(-1)).flatten(1)[:, :columns]


def match_rows(w_NK: Tensor, rounded: QuantizedMatrix, spec: QuantSpec, hessian_KK: Tensor) -> QuantizedMatrix:
    """Scale every row until its outputs on the calibration inputs are as long along the original's as these are.

    The gain of row n is (w H w^T) / (w_hat H w^T).
    """
    w_NK = w_NK.float()
    along_NK = w_NK @ hessian_KK.float()
    kept_N = (along_NK * rounded_weights(rounded, spec).to(w_NK.device)).sum(1)
    gain_N = bounded_gain((along_NK * w_NK).sum(1) / kept_N)
    grown_NG = rounded.scale_NG.float() * gain_N.cpu().unsqueeze(1)
    return replace(rounded, scale_NG=grown_NG.clamp_(-SCALE_MAX, SCALE_MAX).half())

"""Error feedback among spectral components: what one cannot express, those after it make up for (GPTQ).

Gate and up products are sums over components, sum_k p_k h_k with h = B x: a component is a column of the matrix that
h is multiplied with, and its scales run along that column. So whole columns are rounded one after the other, each at
its own width, and the error of each is answered by the columns after it, by the second moments of h. Components of
0 bits come first: what is lost with them is made up for by all that are kept, as far as they are correlated.

Legend: R directions, I expert width, S components of a strip, n components of one width.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.layouts.spectral.shape import Widths
from moeq.quantizers.base import QuantizedMatrix, Quantizer
from moeq.quantizers.hessian import factorize
from moeq.quantizers.levels import inverse, levels_of
from moeq.spec import WHOLE_ROW, QuantSpec, num_groups

STRIP: Final = 32
"""Components whose scales are fitted together, and after which the rest is updated."""


def round_components(
    p_RI: Tensor,
    widths_R: Widths,
    slabs: Mapping[int, QuantSpec],
    hessian_RR: Tensor,
    *,
    scales: Quantizer,
    damp: float,
) -> dict[int, QuantizedMatrix]:
    """Round the components of one expert's gate or up.

    Args:
        p_RI: the components, float32, on the device of the Hessian.
        widths_R: their widths; 0 drops a component.
        slabs: width -> how components of it are stored.
        hessian_RR: sum over tokens of h h^T, not all zero.
        scales: fits the parameters of components, as they are when their turn comes.
        damp: damping of the Hessian, in mean diagonals.

    Returns:
        width -> its components by direction.

    Raises:
        CalibrationError: the Hessian is not finite or cannot be made positive definite.
    """
    diagonal_R = hessian_RR.diagonal().cpu().double().numpy()
    # By rising width; within a width those that carry most come first, while the least error has gathered.
    order = torch.from_numpy(np.lexsort((-diagonal_R, widths_R)))
    place = order.to(p_RI.device)
    factor = factorize(hessian_RR[place][:, place], damp=damp)
    upper_RR, dead_R = factor.upper_KK, factor.dead_K
    w_RI = p_RI[place].clone()
    ordered = widths_R[order.numpy()]
    rounded: dict[int, list[QuantizedMatrix]] = {}
    start = 0
    while start < len(ordered):
        width = int(ordered[start])
        alike = int(np.searchsorted(ordered, width, side="right"))
        stop = min(start + STRIP, alike)
        strip = slice(start, stop)
        if width:
            part, error_SI = _strip(w_RI[strip], upper_RR[strip, strip], slabs[width], scales)
            rounded.setdefault(width, []).append(part)
        else:
            error_SI = _dropped(w_RI[strip], upper_RR[strip, strip])
        # Directions that no token has do not pass errors on.
        error_SI = error_SI.masked_fill(dead_R[strip].unsqueeze(1), 0.0)
        if stop < len(ordered):
            w_RI[stop:].addmm_(upper_RR[strip, stop:].t(), error_SI, alpha=-1)
        start = stop
    return {width: _by_direction(parts, order[ordered == width]) for width, parts in rounded.items()}


def _dropped(w_SI: Tensor, upper_SS: Tensor) -> Tensor:
    """Errors / U_jj of components that are dropped one after the other, (S, I)."""
    # Row j receives the errors of those before it: e U_diag = w - strict(U)^T e, a triangular system.
    return torch.linalg.solve_triangular(upper_SS.t(), w_SI, upper=False)


def _strip(w_SI: Tensor, upper_SS: Tensor, spec: QuantSpec, scales: Quantizer) -> tuple[QuantizedMatrix, Tensor]:
    """Round a strip of one width with feedback inside it; its codes and scales, and errors / U_jj, (S, I)."""
    fitted = scales.quantize(w_SI, spec, None)
    inner = w_SI.shape[1]
    width = inner if spec.group_size == WHOLE_ROW else spec.group_size
    repeat_I = torch.arange(inner, device=w_SI.device) // width
    assert int(repeat_I[-1]) + 1 == num_groups(inner, spec.group_size)
    scale_SI = fitted.scale_NG.to(w_SI.device).float()[:, repeat_I]
    levels = levels_of(spec)
    if fitted.zero_NG is None:
        zero_SI = torch.full_like(scale_SI, float(levels.zero or 0.0))
    else:
        zero_SI = (fitted.zero_NG.to(w_SI.device).float() * (levels.zero_step or 1.0))[:, repeat_I]
    inverse_SI = inverse(scale_SI)
    codes_SI = torch.empty_like(w_SI)
    error_SI = torch.empty_like(w_SI)
    left_SI = w_SI.clone()
    for i, pivot in enumerate(upper_SS.diagonal().tolist()):
        codes_SI[i] = torch.addcmul(zero_SI[i], left_SI[i], inverse_SI[i]).round_().clamp_(0, levels.top)
        error_SI[i] = (left_SI[i] - (codes_SI[i] - zero_SI[i]) * scale_SI[i]) / pivot
        if i + 1 < len(left_SI):
            left_SI[i + 1 :].addr_(upper_SS[i, i + 1 :], error_SI[i], alpha=-1)
    codes = codes_SI.to(torch.uint8).cpu()
    return QuantizedMatrix(codes_NK=codes, scale_NG=fitted.scale_NG, zero_NG=fitted.zero_NG), error_SI


def _by_direction(parts: list[QuantizedMatrix], directions: Tensor) -> QuantizedMatrix:
    back = torch.argsort(directions)
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return QuantizedMatrix(
        codes_NK=torch.cat([part.codes_NK for part in parts])[back],
        scale_NG=torch.cat([part.scale_NG for part in parts])[back],
        zero_NG=torch.cat(zeros)[back] if zeros else None,
    )

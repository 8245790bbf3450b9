"""RTN_b, the rounding with which GEMQ and PMQ measure (GEMQ, section on the cost table; their public code).

It is no storage format: scales are not rounded to float16, zeros are integers, and nothing is searched. Costs that
are to agree with the papers use it; better tables come from the quantizer that will be used.

Legend: N output rows, K input columns, G groups per row, g weights per group.
"""

import torch
from torch import Tensor

from moeq.errors import OptionError
from moeq.quantizers.levels import check_finite, check_matrix
from moeq.spec import BITS, WHOLE_ROW


def paper_rtn(w_NK: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """`w_NK` rounded to 2^bits levels per group of inputs.

    At 1 bit the levels are plus and minus the mean of |w|. From 2 bits on, the range lo = min(w, 0) .. hi = max(w, 0)
    is cut into 2^bits - 1 steps s = (hi - lo) / (2^bits - 1), the zero is round(-lo / s), and weights go to the
    nearest code.

    Args:
        w_NK: weights, any float dtype.
        bits: one of `moeq.spec.BITS`.
        group_size: inputs that share a range (the last group may be ragged), or `WHOLE_ROW`.

    Returns:
        (N, K), float64 for float64 weights, else float32.

    Raises:
        OptionError: no such width.
        TensorError: no floating-point matrix, or one with NaN or infinity.
    """
    if bits not in BITS:
        raise OptionError(
            f"{bits!r} is not supported", option="bits", fix=f"choose one of {', '.join(str(width) for width in BITS)}"
        )
    check_matrix(w_NK)
    w_NK = w_NK if w_NK.dtype == torch.float64 else w_NK.float()
    check_finite(w_NK.amin(), w_NK.amax())
    rows, columns = w_NK.shape
    width = columns if group_size == WHOLE_ROW else min(group_size, columns)
    full = columns // width * width
    parts = [_round_groups(w_NK[:, :full].reshape(rows, -1, width), bits).flatten(1)]
    if full < columns:
        parts.append(_round_groups(w_NK[:, full:].unsqueeze(1), bits).flatten(1))
    return torch.cat(parts, dim=1)


def _round_groups(w_NGg: Tensor, bits: int) -> Tensor:
    if bits == 1:
        mean_NG1 = w_NGg.abs().mean(-1, keepdim=True)
        return torch.where(w_NGg >= 0, mean_NG1, -mean_NG1)
    low_NG1 = w_NGg.amin(-1, keepdim=True).clamp_(max=0)
    high_NG1 = w_NGg.amax(-1, keepdim=True).clamp_(min=0)
    empty_NG1 = low_NG1 == high_NG1
    low_NG1.masked_fill_(empty_NG1, -1)
    high_NG1.masked_fill_(empty_NG1, 1)
    top = 2**bits - 1
    scale_NG1 = (high_NG1 - low_NG1) / top
    zero_NG1 = (-low_NG1 / scale_NG1).round_()
    q_NGg = (w_NGg / scale_NG1).round_().add_(zero_NG1).clamp_(0, top)
    return q_NGg.sub_(zero_NG1).mul_(scale_NG1)

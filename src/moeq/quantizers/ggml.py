"""Rounding to the block types of ggml: scales by weighted search, codes by GPTQ with these scales held fixed.

llama.cpp chooses scales and codes of each block by itself, at best with the inputs' mean squares as weights. Here each
column's error is made up for by the columns not yet rounded, as `moeq.quantizers.gptq` does it. Parameters of all
blocks are fitted before, to the original weights, so that columns may be processed by falling importance.

Legend: N output rows, K input columns, R rows of all groups (N x G), g weights of a group, B blocks, P groups of a
block, S columns of a strip.
"""

import weakref
from typing import ClassVar, Final

import torch
from torch import Tensor

from moeq import blocks
from moeq.blocks import Blocks
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gain import bounded_gain
from moeq.quantizers.gptq import BLOCK, STRIP, Gptq
from moeq.quantizers.hessian import Factor, FactorCache, check_inputs
from moeq.quantizers.levels import SCALE_MAX, check_finite, check_matrix, inverse, store_scale
from moeq.quantizers.rtn import Rtn
from moeq.spec import BlockType, QuantSpec

RATIOS: Final = (0.5, 0.6, 0.66, 0.72, 0.78, 0.84, 0.9, 0.95, 1.0)
"""Ranges of a group that are tried, in units of the whole one."""
STRETCHES: Final = (0.85, 0.9, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1)
"""Units of a block that are tried, in units of what just reaches the largest scale."""


class Ggml:
    """Blocks of ggml for the level set "ggml"; for all others it is GPTQ, or RTN without a Hessian.

    Args:
        damp: damping in units of the Hessian's mean diagonal.
        act_order: process inputs by falling second moment.
        gain: match the gain of rows over the calibration inputs in the end (docs/decisions/0013).
    """

    __slots__ = ("_factors", "_plain", "_scalar", "gain")

    needs_hessian: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("gain", "act_order", "damp")
    weights_per_second: ClassVar[float] = 3e6

    def __init__(self, *, damp: float = 0.01, act_order: bool = True, gain: bool = False) -> None:
        self.gain = gain
        self._factors = FactorCache(damp=damp, act_order=act_order)
        self._scalar = Gptq(damp=damp, act_order=act_order, gain=gain)
        self._plain = Rtn(gain=gain)

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`. Without a Hessian all inputs count alike.

        Returns:
            codes; the float16 units of blocks in the place of scales, and factors of groups in that of zeros.

        Raises:
            OptionError: blocks do not fill the rows.
            TensorError: the weights are no finite matrix, or the Hessian does not fit them.
            CalibrationError: the Hessian is not finite or cannot be made positive definite.
        """
        if not spec.in_blocks:
            plain = self._plain if hessian_KK is None else self._scalar
            return plain.quantize(w_NK, spec, hessian_KK)
        check_matrix(w_NK)
        factor = None
        if hessian_KK is not None:
            hessian_KK = check_inputs(w_NK, hessian_KK, "ggml")
            factor = self._factors.get(hessian_KK, w_NK.device)
        check_finite(w_NK.amin(), w_NK.amax())
        kind = blocks.kind_of(spec, w_NK.shape[1])
        w_NK = w_NK.detach().float().clamp(-SCALE_MAX, SCALE_MAX)
        weight_K = torch.ones_like(w_NK[0]) if factor is None else factor.root_K.square()
        parts = fit(w_NK, kind, weight_K)
        if factor is not None:
            parts = parts._replace(codes_NK=_with_feedback(w_NK, parts, kind, factor))
        if self.gain:
            along_NK = w_NK
            if hessian_KK is not None and factor is not None:
                along_NK = w_NK @ hessian_KK.float().to(w_NK.device)
            kept_N = (along_NK * blocks.dequantize(parts, kind)).sum(1)
            gain_N = bounded_gain((along_NK * w_NK).sum(1) / kept_N)
            grown_NB = parts.unit_NB.float() * gain_N.unsqueeze(1)
            parts = parts._replace(unit_NB=grown_NB.clamp_(-SCALE_MAX, SCALE_MAX).half())
        return QuantizedMatrix(
            codes_NK=parts.codes_NK.cpu(),
            scale_NG=parts.unit_NB.cpu(),
            zero_NG=None if parts.factor_NG is None else parts.factor_NG.cpu(),
        )


class GgmlRtn:
    """The same without any Hessian: scales as above, codes to nearest, all inputs alike.

    The last answer is remembered: where rows are no whole blocks of 256, several widths mean the same type.
    """

    __slots__ = ("_last", "_quantizer")

    needs_hessian: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("gain",)
    weights_per_second: ClassVar[float] = 6e6

    def __init__(self, *, gain: bool = False) -> None:
        self._quantizer = Ggml(gain=gain)
        self._last: tuple[weakref.ref[Tensor], BlockType, QuantizedMatrix] | None = None

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """As `Ggml.quantize` without a Hessian."""
        del hessian_KK
        if not spec.in_blocks or w_NK.ndim != 2:
            return self._quantizer.quantize(w_NK, spec, None)
        kind, last = blocks.kind_of(spec, w_NK.shape[1]), self._last
        if last is not None and last[0]() is w_NK and last[1] == kind:
            return last[2]
        found = self._quantizer.quantize(w_NK, spec, None)
        self._last = weakref.ref(w_NK), kind, found
        return found


def fit(w_NK: Tensor, kind: BlockType, weight_K: Tensor) -> Blocks:
    """Scales of all blocks, and the nearest codes.

    Args:
        w_NK: float32.
        kind: the type.
        weight_K: what a column's squared error counts.
    """
    rows = len(w_NK)
    x_Rg = w_NK.reshape(-1, kind.group)
    h_Rg = weight_K.view(-1, kind.group).repeat(rows, 1)
    with_minima = kind.name in blocks.WITH_MINIMA
    a_R, b_R = _asymmetric(x_Rg, h_Rg, kind) if with_minima else (_symmetric(x_Rg, h_Rg, kind), None)
    if kind.name not in blocks.STEPS:
        unit_NB = store_scale(a_R).view(rows, -1).half()
        codes = nearest(w_NK, unit_NB.float().repeat_interleave(kind.group, 1), None, kind)
        return Blocks(codes_NK=codes, unit_NB=unit_NB, factor_NG=None)
    least, most = blocks.STEPS[kind.name]
    per = kind.weights // kind.group
    level_Rg = blocks.values(nearest(x_Rg, a_R.unsqueeze(1), None if b_R is None else b_R.unsqueeze(1), kind), kind)
    unit_MB, factor_MP = _in_steps(a_R.view(-1, per), (h_Rg * level_Rg.square()).sum(1).view(-1, per), least, most)
    if b_R is None:
        unit_NB, factor_NG = unit_MB.half(), factor_MP - least
    else:
        a_R1 = (unit_MB * factor_MP).view(-1, 1)
        level_Rg = nearest(x_Rg, a_R1, b_R.unsqueeze(1), kind).float()
        wish_R = (h_Rg * (a_R1 * level_Rg - x_Rg)).sum(1) / h_Rg.sum(1)
        low_MB, minimum_MP = _in_steps(wish_R.clamp_(min=0).view(-1, per), h_Rg.sum(1).view(-1, per), least, most)
        unit_NB = torch.cat([unit_MB, low_MB], dim=1).half()
        factor_NG = torch.cat([factor_MP, minimum_MP], dim=1)
    parts = Blocks(
        codes_NK=torch.empty(w_NK.shape, dtype=torch.uint8, device=w_NK.device),
        unit_NB=unit_NB.view(rows, -1),
        factor_NG=factor_NG.to(torch.uint8).view(rows, -1),
    )
    a_NG, b_NG = blocks.groups(parts, kind)
    wide = [None if each is None else each.repeat_interleave(kind.group, 1) for each in (a_NG, b_NG)]
    assert wide[0] is not None
    return parts._replace(codes_NK=nearest(w_NK, wide[0], wide[1], kind))


def nearest(x: Tensor, a: Tensor, b: Tensor | None, kind: BlockType) -> Tensor:
    """Codes of the nearest levels, uint8; all tensors broadcast."""
    at = (x if b is None else x + b) * inverse(a)
    table = blocks.levels(kind)
    if table is not None:
        middle = (table[1:] + table[:-1]) / 2
        return torch.bucketize(at, middle.to(at.device)).to(torch.uint8)
    return at.add_(blocks.CENTER.get(kind.name, 0)).round_().clamp_(0, 2**kind.bits - 1).to(torch.uint8)


def _symmetric(x_Rg: Tensor, h_Rg: Tensor, kind: BlockType) -> Tensor:
    """Scales of groups in which zero is a level, signed: the side that reaches farther gets the farther level."""
    at_R1 = x_Rg.abs().argmax(1, keepdim=True)
    table = blocks.levels(kind)
    far = float(table[0]) if table is not None else -float(blocks.CENTER[kind.name])
    whole_R1 = x_Rg.gather(1, at_R1) / far
    best_R = torch.full_like(whole_R1[:, 0], -1.0)
    scale_R = whole_R1[:, 0].clone()
    energy_Rg = h_Rg * x_Rg
    for ratio in RATIOS if kind.bits < 8 else (1.0,):
        for sign in (1, -1) if kind.bits < 6 else (1,):
            level_Rg = blocks.values(nearest(x_Rg, whole_R1 * (sign * ratio), None, kind), kind)
            both_R = (energy_Rg * level_Rg).sum(1)
            own_R = (h_Rg * level_Rg.square()).sum(1)
            gained_R = both_R.square() * inverse(own_R)
            better_R = gained_R > best_R
            best_R = torch.where(better_R, gained_R, best_R)
            scale_R = torch.where(better_R, both_R * inverse(own_R), scale_R)
    return scale_R


def _asymmetric(x_Rg: Tensor, h_Rg: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Scales and minima of groups: x = a q - b with a and b not negative."""
    top = 2**kind.bits - 1
    low_R1 = x_Rg.amin(1, keepdim=True).clamp_(max=0)
    high_R1 = x_Rg.amax(1, keepdim=True).clamp_(min=0)
    h_R, hx_R = h_Rg.sum(1), (h_Rg * x_Rg).sum(1)
    best_R = torch.full_like(h_R, torch.inf)
    found_R = (high_R1 - low_R1)[:, 0] / top, -low_R1[:, 0]
    middle_R1, half_R1 = (high_R1 + low_R1) / 2, (high_R1 - low_R1) / 2
    for ratio in RATIOS:
        b_R1 = (half_R1 * ratio - middle_R1).clamp_(min=0)
        q_Rg = nearest(x_Rg, half_R1 * (2 * ratio / top), b_R1, kind).float()
        hq_Rg = h_Rg * q_Rg
        q_R, qq_R, xq_R = hq_Rg.sum(1), (hq_Rg * q_Rg).sum(1), (hq_Rg * x_Rg).sum(1)
        a_R = (xq_R - hx_R * q_R / h_R) * inverse(qq_R - q_R.square() / h_R)
        b_R = (a_R * q_R - hx_R) / h_R
        alone_R = xq_R * inverse(qq_R)  # where a minimum would be positive
        a_R, b_R = torch.where(b_R < 0, alone_R, a_R), b_R.clamp(min=0)
        usable_R = a_R > 0
        a_R = torch.where(usable_R, a_R, found_R[0])
        error_R = (h_Rg * (a_R.unsqueeze(1) * q_Rg - b_R.unsqueeze(1) - x_Rg).square()).sum(1)
        better_R = usable_R & (error_R < best_R)
        best_R = torch.where(better_R, error_R, best_R)
        found_R = torch.where(better_R, a_R, found_R[0]), torch.where(better_R, b_R, found_R[1])
    return found_R


def _in_steps(value_MP: Tensor, weight_MP: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Values of a block as one unit times whole factors: (M, 1) float32 as stored, and (M, P) from `least` to `most`.

    The unit is the one of least weighted squared error among some, refined by least squares.
    """
    largest_M1 = value_MP.abs().amax(1, keepdim=True)
    best_M = torch.full_like(largest_M1[:, 0], torch.inf)
    unit_M1 = store_scale(largest_M1 / most)
    for stretch in STRETCHES:
        factor_MP = (value_MP * inverse(largest_M1 * (stretch / most))).round_().clamp_(least, most)
        weighted_MP = weight_MP * factor_MP
        tried_M1 = (weighted_MP * value_MP).sum(1, keepdim=True) * inverse(
            (weighted_MP * factor_MP).sum(1, keepdim=True)
        )
        tried_M1 = store_scale(tried_M1.clamp_(min=0))
        factor_MP = (value_MP * inverse(tried_M1)).round_().clamp_(least, most)
        error_M = (weight_MP * (value_MP - tried_M1 * factor_MP).square()).sum(1)
        better_M = error_M < best_M
        best_M = torch.where(better_M, error_M, best_M)
        unit_M1 = torch.where(better_M.unsqueeze(1), tried_M1, unit_M1)
    return unit_M1, (value_MP * inverse(unit_M1)).round_().clamp_(least, most)


def _with_feedback(w_NK: Tensor, parts: Blocks, kind: BlockType, factor: Factor) -> Tensor:
    """Codes, each column's error made up for by those after it; (N, K) uint8 in storage order."""
    a_NG, b_NG = blocks.groups(parts, kind)
    columns = w_NK.shape[1]
    order_K = torch.arange(columns, device=w_NK.device) if factor.order_K is None else factor.order_K
    group_K = order_K // kind.group
    a_GN, b_GN = a_NG.t().contiguous(), None if b_NG is None else b_NG.t().contiguous()
    w_KN = w_NK.t().contiguous()[order_K]
    codes_KN = torch.empty(w_KN.shape, dtype=torch.uint8, device=w_NK.device)
    upper_KK = factor.upper_KK
    for start in range(0, columns, BLOCK):
        stop = min(columns, start + BLOCK)
        error_SN = torch.empty_like(w_KN[start:stop])
        for first in range(start, stop, STRIP):
            last = min(stop, first + STRIP)
            for j in range(first, last):
                a_N, b_N = a_GN[group_K[j]], None if b_GN is None else b_GN[group_K[j]]
                code_N = nearest(w_KN[j], a_N, b_N, kind)
                codes_KN[order_K[j]] = code_N
                hat_N = blocks.values(code_N, kind).mul_(a_N)
                if b_N is not None:
                    hat_N -= b_N
                error_N = (w_KN[j] - hat_N) / upper_KK[j, j]
                error_SN[j - start] = error_N
                if j + 1 < last:
                    w_KN[j + 1 : last].addr_(upper_KK[j, j + 1 : last], error_N, alpha=-1)
            if last < stop:
                done = slice(first - start, last - start)
                w_KN[last:stop].addmm_(upper_KK[first:last, last:stop].t(), error_SN[done], alpha=-1)
        if stop < columns:
            w_KN[stop:].addmm_(upper_KK[start:stop, stop:].t(), error_SN, alpha=-1)
    return codes_KN.t().contiguous()

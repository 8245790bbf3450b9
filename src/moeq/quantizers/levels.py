"""What all quantizers share: level sets as numbers, groups as rows of a matrix, rounding to what is stored.

A group is fitted in units of its own min-max scale ("unit"), so that one list of candidate ratios serves weights of
any magnitude and nothing overflows or underflows on the way. Scales and zeros are rounded to their stored form before
codes are computed, so the codes are the nearest ones for exactly what a reader will decode.

Legend: N output rows, K input columns, G groups per row, M groups in a chunk, g weights per group.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeq import native
from moeq.errors import OptionError, TensorError
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.chunks import Part, chunk_for, cut, root_of, spread, threads_for
from moeq.quantizers.gain import bounded_gain
from moeq.spec import SCALAR_LEVELS, QuantSpec, num_groups

SCALE_MAX: Final = 65504.0
"""Largest finite float16."""
SCALE_MIN: Final = 2.0**-24
"""Smallest positive float16."""
NOTHING: Final = 2.0**-26
"""A group whose largest weight is below this decodes to zeros: float16 scales cannot express it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The level set of a spec as numbers; see `moeq.spec.LEVELS` for the rule.

    Attributes:
        top: the highest code, 2^bits - 1.
        zero: the zero that all groups share, in codes; None when each group stores its own.
        zero_step: resolution of a stored zero in codes; 0 means float16.
        signed: a negative scale gives other levels than a positive one.
    """

    top: int
    zero: float | None
    zero_step: float
    signed: bool

    def store_zero(self, zero: Tensor) -> Tensor:
        """`zero` (in codes, float32) rounded to the nearest value that can be stored."""
        if self.zero is not None:
            return torch.full_like(zero, self.zero)
        if self.zero_step:
            # Same expression as `moeq.format.records.real_zeros`, so that both give the same float32 number.
            return (zero * (1 / self.zero_step)).round_().clamp_(0, 255) * self.zero_step
        return zero.clamp(-SCALE_MAX, SCALE_MAX).half().float()


def levels_of(spec: QuantSpec) -> Levels:
    """The level set of `spec`.

    Raises:
        OptionError: it is none of single weights.
    """
    if spec.levels not in SCALAR_LEVELS:
        raise OptionError(
            f"codes of {spec.levels} are chosen by the quantizer {spec.levels} alone",
            option="quantizer",
            fix=f"use {spec.levels}, or another plan",
        )
    top = 2**spec.bits - 1
    zero = {"sym": float(2 ** (spec.bits - 1)), "half": top / 2}.get(spec.levels)
    return Levels(
        top=top, zero=zero, zero_step=top / 255 if spec.levels == "asym" else 0.0, signed=spec.levels == "sym"
    )


def store_scale(scale: Tensor) -> Tensor:
    """`scale` rounded to float16 and back; zero stays zero, anything else keeps its sign and stays finite."""
    magnitude = scale.abs().clamp_(SCALE_MIN, SCALE_MAX).half().float()
    return magnitude.mul_(scale.sign())


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return x.reciprocal().masked_fill_(x == 0, 0)


def check_finite(*extremes: Tensor) -> None:
    """Raise TensorError if weights with these smallest and largest values are not all finite."""
    if not all(bool(torch.isfinite(extreme).all()) for extreme in extremes):
        raise not_finite()


def not_finite() -> TensorError:
    """The error about weights that are not numbers."""
    return TensorError("the weights hold NaN or infinity", fix="repair the checkpoint, such weights cannot be rounded")


class Groups:
    """M groups of g weights, in units of their min-max scale, with buffers to try parameters on them.

    A parameter pair is (ratio, zero): scale = unit * ratio, zero in codes, both (M, 1) (a ratio may be a number).

    Args:
        buffers_4Mg: float32, contiguous; the first holds the weights and is overwritten like the others. Kept by the
            caller from chunk to chunk, because fresh memory costs page faults as dear as several passes.
        levels: the level set.
        root_g: square roots of the columns' weights in the error, (g,) or (M, g).

    Attributes:
        v_Mg: weights / unit.
        unit_M1: the min-max scale of each group, float32; 0 where the group is all (nearly) zero.
        zero_M1: the min-max zero of each group, already rounded to its stored form.
        levels: the level set.
        root_g: square roots of the columns' weights in the error, or None for equal weights.
        scratch_Mg: a buffer for whoever fits.
    """

    __slots__ = ("_q_Mg", "_sums", "_t_Mg", "levels", "root_g", "scratch_Mg", "unit_M1", "v_Mg", "zero_M1")

    def __init__(self, buffers_4Mg: Tensor, levels: Levels, root_g: Tensor | None = None) -> None:
        w_Mg, self._t_Mg, self._q_Mg, self.scratch_Mg = buffers_4Mg
        low_M1 = w_Mg.amin(1, keepdim=True)
        high_M1 = w_Mg.amax(1, keepdim=True)
        check_finite(low_M1, high_M1)
        # The range always holds zero: a stored zero is a code between 0 and the top one.
        low_M1.clamp_(max=0)
        high_M1.clamp_(min=0)
        unit_M1 = _unit(low_M1, high_M1, levels)
        per_unit_M1 = inverse(unit_M1)
        self.levels = levels
        self.root_g = root_g
        self.unit_M1 = unit_M1
        self.zero_M1 = levels.store_zero(-low_M1 * per_unit_M1)
        self.v_Mg = w_Mg.mul_(per_unit_M1)
        self._sums: tuple[Tensor, Tensor] | None = None

    def stored(self, ratio_M1: Tensor) -> Tensor:
        """The nearest ratio whose scale can be stored."""
        scale_M1 = store_scale(self.unit_M1 * ratio_M1)
        return scale_M1 * inverse(self.unit_M1)

    def scale(self, ratio_M1: Tensor) -> Tensor:
        """The scale of `ratio_M1` in weight units, as stored."""
        return store_scale(self.unit_M1 * ratio_M1)

    def code(self, ratio: Tensor | float, zero_M1: Tensor) -> tuple[Tensor, Tensor]:
        """Round to nearest.

        Returns:
            (exact positions t, codes q), both (M, g) float32 in codes; buffers, valid until the next call.
        """
        if isinstance(ratio, float):
            torch.add(zero_M1, self.v_Mg, alpha=1 / ratio, out=self._t_Mg)
        else:
            torch.mul(self.v_Mg, inverse(ratio), out=self._t_Mg)
            self._t_Mg.add_(zero_M1)
        torch.round(self._t_Mg, out=self._q_Mg)
        return self._t_Mg, self._q_Mg.clamp_(0, self.levels.top)

    def best_of(self, ratios: tuple[float, ...]) -> Tensor:
        """The ratio (at the min-max zero) of smallest column-weighted squared error for each group, (M, 1)."""
        error_RM = self.v_Mg.new_empty(len(ratios), len(self.v_Mg))
        for ratio, error_M in zip(ratios, error_RM, strict=True):
            t_Mg, q_Mg = self.code(ratio, self.zero_M1)
            t_Mg.sub_(q_Mg)
            if self.root_g is not None:
                t_Mg.mul_(self.root_g)
            torch.linalg.vector_norm(t_Mg, dim=1, out=error_M)
        ratio_R = error_RM.new_tensor(ratios)
        best_M = error_RM.mul_(ratio_R.abs().unsqueeze(1)).argmin(0)
        return ratio_R[best_M].unsqueeze(1)

    def refit(self, ratio_M1: Tensor, zero_M1: Tensor) -> tuple[Tensor, Tensor]:
        """Least squares for (ratio, zero) with the codes held fixed: the error never grows.

        With d = code - zero, the squared error of a ratio r and a zero moved by m is
        sum h (v - r (d - m))^2, a straight-line fit. The zero is rounded to its stored form before r is solved for
        it, and stays where it was if that rounding costs more than the move gains.

        Returns:
            new ratio and zero, as stored.
        """
        t_Mg, d_Mg = self.code(ratio_M1, zero_M1)
        d_Mg.sub_(zero_M1)
        hd_Mg = d_Mg if self.root_g is None else d_Mg * self.root_g.square()
        vd_M1 = torch.mul(self.v_Mg, hd_Mg, out=t_Mg).sum(1, keepdim=True)
        if self.levels.zero is not None:
            return self._solved(vd_M1, self._energy(d_Mg), ratio_M1), zero_M1
        d_M1 = hd_Mg.sum(1, keepdim=True)
        dd_M1 = self._energy(d_Mg)
        v_M1, count_M1 = self._moments()
        slope_M1 = (vd_M1 - d_M1 * v_M1 / count_M1) / (dd_M1 - d_M1.square() / count_M1)
        wish_M1 = zero_M1 + (d_M1 - v_M1 / slope_M1) / count_M1
        new_zero_M1 = self.levels.store_zero(torch.where(torch.isfinite(wish_M1), wish_M1, zero_M1))
        move_M1 = new_zero_M1 - zero_M1
        moved_vd_M1 = vd_M1 - move_M1 * v_M1
        moved_dd_M1 = dd_M1 + move_M1 * (count_M1 * move_M1 - 2 * d_M1)
        # vd^2 / dd is what a fitted ratio removes from the squared error.
        moves_M1 = moved_vd_M1.square() * dd_M1 > vd_M1.square() * moved_dd_M1
        new_M1 = self._solved(
            torch.where(moves_M1, moved_vd_M1, vd_M1), torch.where(moves_M1, moved_dd_M1, dd_M1), ratio_M1
        )
        return new_M1, torch.where(moves_M1, new_zero_M1, zero_M1)

    def gain(self, ratio_M1: Tensor, zero_M1: Tensor, q_Mg: Tensor | None = None) -> Tensor:
        """What the scale must grow by, codes held fixed, so that <w_hat, w> = <w, w> (docs/decisions/0013), (M, 1).

        `q_Mg`: the codes, when they were just computed; overwritten.
        """
        d_Mg = (self.code(ratio_M1, zero_M1)[1] if q_Mg is None else q_Mg).sub_(zero_M1)
        if self.root_g is not None:
            d_Mg.mul_(self.root_g.square())
        vd_M1 = torch.mul(self.v_Mg, d_Mg, out=self._t_Mg).sum(1, keepdim=True).mul_(ratio_M1)
        v_Mg = self.v_Mg if self.root_g is None else torch.mul(self.v_Mg, self.root_g, out=d_Mg)
        return bounded_gain(torch.linalg.vector_norm(v_Mg, dim=1, keepdim=True).square_() / vd_M1)

    def _energy(self, d_Mg: Tensor) -> Tensor:
        """sum h d^2 of each group, (M, 1); overwrites `d_Mg` when columns have weights."""
        if self.root_g is not None:
            d_Mg.mul_(self.root_g)
        return torch.linalg.vector_norm(d_Mg, dim=1, keepdim=True).square_()

    def _solved(self, vd_M1: Tensor, dd_M1: Tensor, ratio_M1: Tensor) -> Tensor:
        """The ratio vd / dd as stored, or the old one where that is no usable scale."""
        new_M1 = vd_M1 / dd_M1
        # Signs differ only in degenerate groups; a zero quotient means that no code has anything to scale.
        return torch.where(new_M1 * ratio_M1 > 0, self.stored(new_M1), ratio_M1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(sum h v, sum h) of each group, (M, 1) or broadcastable to it."""
        if self._sums is None:
            if self.root_g is None:
                count_M1 = torch.full_like(self.unit_M1[:1], self.v_Mg.shape[1])
                self._sums = (self.v_Mg.sum(1, keepdim=True), count_M1)
            else:
                h_g = self.root_g.square()
                self._sums = ((self.v_Mg * h_g).sum(1, keepdim=True), h_g.sum(-1, keepdim=True).view(-1, 1))
        return self._sums


def _unit(low_M1: Tensor, high_M1: Tensor, levels: Levels) -> Tensor:
    """The scale that just reaches the ends of the range (low <= 0 <= high)."""
    absmax_M1 = torch.maximum(-low_M1, high_M1)
    if levels.zero is None:
        unit_M1 = high_M1 / levels.top - low_M1 / levels.top
    elif levels.signed:
        # The side that reaches farther gets the extra level 0 - zero = -2^(bits - 1).
        unit_M1 = torch.where(-low_M1 >= high_M1, absmax_M1, -absmax_M1) / levels.zero
    else:
        unit_M1 = absmax_M1 / levels.zero
    unit_M1.clamp_(-SCALE_MAX, SCALE_MAX)
    return unit_M1.masked_fill_(absmax_M1 < NOTHING, 0)


Fit = Callable[[Groups], tuple[Tensor, Tensor]]
"""Chooses (ratio, zero), both (M, 1) and as stored."""


def check_matrix(w_NK: Tensor) -> None:
    """Raise TensorError unless `w_NK` is a floating-point matrix with at least one element."""
    if w_NK.ndim != 2 or not w_NK.is_floating_point() or not w_NK.numel():
        raise TensorError(
            f"cannot round a tensor of shape {tuple(w_NK.shape)} and dtype {w_NK.dtype}",
            fix="give a non-empty floating-point matrix (N, K)",
        )


def fit_groups(
    w_NK: Tensor,
    spec: QuantSpec,
    fit: Fit,
    codes_NK: Tensor | None = None,
    root_K: Tensor | None = None,
    *,
    gain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose the parameters of every group of a matrix, chunk by chunk.

    Args:
        w_NK: weights, any float dtype and device.
        spec: how they are stored.
        fit: chooses the parameters of a chunk of groups.
        codes_NK: uint8, receives the codes when given.
        root_K: square roots of the columns' weights in the error.
        gain: multiply scales by `Groups.gain` after codes are chosen.

    Returns:
        scale and zero (in codes), both (N, G) float32 on the device of `w_NK`, exactly as stored.

    Raises:
        TensorError: the weights hold NaN or infinity.
    """
    check_matrix(w_NK)
    rows, columns = w_NK.shape
    levels = levels_of(spec)
    w_NK = w_NK.detach()
    scale_NG = torch.empty(rows, num_groups(columns, spec.group_size), device=w_NK.device)
    zero_NG = torch.empty_like(scale_NG)
    threads = threads_for(w_NK)
    parts = list(cut(rows, columns, spec.group_size, chunk_for(w_NK, threads)))
    size = max((part.r1 - part.r0) * (part.c1 - part.c0) for part in parts)

    def work(parts: Iterator[Part]) -> None:
        workspace = torch.empty(4 * size, device=w_NK.device)
        for part in parts:
            inside = (slice(part.r0, part.r1), slice(part.c0, part.c1))
            weights = w_NK[inside]
            buffers_4Mg = workspace[: 4 * weights.numel()].view(4, -1, part.width)
            buffers_4Mg[0].view(weights.shape).copy_(weights)
            groups = Groups(buffers_4Mg, levels, None if root_K is None else root_of(part, root_K))
            ratio_M1, zero_M1 = fit(groups)
            place = (inside[0], slice(part.group, part.group + (part.c1 - part.c0) // part.width))
            scale_NG[place] = groups.scale(ratio_M1).view(part.r1 - part.r0, -1)
            zero_NG[place] = zero_M1.view(part.r1 - part.r0, -1)
            q_Mg = None
            if codes_NK is not None:
                _, q_Mg = groups.code(ratio_M1, zero_M1)
                codes_NK[inside] = q_Mg.view(part.r1 - part.r0, -1)
            if gain:
                grown_M1 = groups.scale(ratio_M1 * groups.gain(ratio_M1, zero_M1, q_Mg))
                scale_NG[place] = grown_M1.view(part.r1 - part.r0, -1)

    spread(work, parts, threads)
    return scale_NG, zero_NG


def to_stored(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, spec: QuantSpec) -> QuantizedMatrix:
    """Pack decisions (all exactly representable already) into the dtypes that are stored, on the CPU."""
    levels = levels_of(spec)
    stored: Tensor | None = None
    if levels.zero is None:
        stored = (zero_NG * (1 / levels.zero_step)).round().to(torch.uint8) if levels.zero_step else zero_NG.half()
    return QuantizedMatrix(
        codes_NK=codes_NK.cpu(), scale_NG=scale_NG.half().cpu(), zero_NG=None if stored is None else stored.cpu()
    )


def quantize_groups(
    w_NK: Tensor, spec: QuantSpec, fit: Fit, *, gain: bool = False, rounding: native.Rounding | None = None
) -> QuantizedMatrix:
    """Round a matrix group by group, each with the parameters that `fit` chooses, and optionally match its gain.

    Args:
        w_NK: weights, any float dtype and device.
        spec: how they are stored.
        fit: chooses the parameters of a chunk of groups.
        gain: match the gain of every group (docs/decisions/0013).
        rounding: what `fit` does, as numbers for the compiled kernels; they are taken for weights on the CPU.

    Raises:
        TensorError: not a floating-point matrix, or it holds NaN or infinity.
    """
    check_matrix(w_NK)
    if rounding is not None and w_NK.device.type == "cpu":
        if native.available():
            return _quantize_natively(w_NK, spec, rounding, gain)
        native.warn_missing()
    codes_NK = torch.empty(w_NK.shape, dtype=torch.uint8, device=w_NK.device)
    scale_NG, zero_NG = fit_groups(w_NK, spec, fit, codes_NK, gain=gain)
    return to_stored(codes_NK, scale_NG, zero_NG, spec)


def _quantize_natively(w_NK: Tensor, spec: QuantSpec, rounding: native.Rounding, gain: bool) -> QuantizedMatrix:
    """`quantize_groups` with the compiled kernels, in as many threads as torch may use."""
    w_NK = w_NK.detach()
    w_NK = (w_NK if w_NK.dtype in native.DTYPES else w_NK.float()).contiguous()

    def work(part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        done = native.round_matrix(part, spec, rounding, gain=gain)
        if done is None:
            raise not_finite()
        return done

    threads = threads_for(w_NK)
    if threads == 1:
        codes_NK, scale_NG, zero_NG = work(w_NK)
        return QuantizedMatrix(codes_NK=codes_NK, scale_NG=scale_NG, zero_NG=zero_NG)
    with ThreadPoolExecutor(threads) as pool:
        codes, scales, zeros = zip(*pool.map(work, w_NK.chunk(threads)), strict=True)
    zero_NG = None if zeros[0] is None else torch.cat(zeros)
    return QuantizedMatrix(codes_NK=torch.cat(codes), scale_NG=torch.cat(scales), zero_NG=zero_NG)

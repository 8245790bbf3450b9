"""GPTQ: rounding column by column, each column's error made up for by the columns not yet rounded.

Follows Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
With H = sum x x^T and U the upper Cholesky factor of the damped H^-1 (H^-1 = U^T U), rounding column j of the
weights by an error e_j is best answered by subtracting e_j / U_jj * U_jk from every later column k.

The working copy is transposed, so that a column of the weights is a contiguous row, and updates are done at three
distances: the rest of a strip of `STRIP` columns at once, the rest of the block after each strip, and the rest of the
matrix after each block; the last two are matrix products.

Legend: N output rows, K input columns, G groups per row, M groups in a chunk, S columns of a strip or block.
"""

from typing import ClassVar, Final

import torch
from torch import Tensor

from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gain import match_rows
from moeq.quantizers.hessian import Factor, FactorCache, check_inputs
from moeq.quantizers.levels import (
    SCALE_MAX,
    Fit,
    Groups,
    check_finite,
    fit_groups,
    inverse,
    levels_of,
    quantize_groups,
    to_stored,
)
from moeq.quantizers.rtn import fit_range
from moeq.spec import WHOLE_ROW, QuantSpec

BLOCK: Final = 128
"""Columns after whose rounding the rest of the matrix is updated; a multiple of every group size."""
STRIP: Final = 16
"""Columns after whose rounding the rest of the block is updated; divides every group size."""


def round_columns(
    w_NK: Tensor, factor: Factor, spec: QuantSpec, fit: Fit, *, root_K: Tensor | None = None, feedback: bool = True
) -> QuantizedMatrix:
    """Round `w_NK` with error feedback.

    Args:
        w_NK: weights, any float dtype, on the device of the factor.
        factor: the factored Hessian of their inputs.
        spec: how they are stored.
        fit: chooses the parameters of a group from its weights as they are when its first column comes; from the
            original ones when columns are processed out of order.
        root_K: square roots of the columns' weights in the error that `fit` sees, in storage order.
        feedback: whether errors are made up for inside a block too, not only after it.
    """
    return _Columns(w_NK, factor, spec, fit, root_K).run(feedback=feedback)


class _Columns:
    """A transposed working copy of the weights that is rounded from the first column to the last."""

    __slots__ = (
        "codes_KN",
        "factor",
        "fit",
        "group_K",
        "inverse_GN",
        "root_K",
        "scale_GN",
        "spec",
        "static",
        "top",
        "w_KN",
        "width",
        "zero_GN",
    )

    def __init__(self, w_NK: Tensor, factor: Factor, spec: QuantSpec, fit: Fit, root_K: Tensor | None) -> None:
        rows, columns = w_NK.shape
        order_K = factor.order_K
        position_K = torch.arange(columns, device=w_NK.device) if order_K is None else order_K
        self.width = columns if spec.group_size == WHOLE_ROW else spec.group_size
        self.spec = spec
        self.fit = fit
        self.factor = factor
        self.root_K = root_K
        self.top = levels_of(spec).top
        self.group_K: list[int] = (position_K // self.width).tolist()
        # Out of order, a group is not together when its first column comes; a whole row is at the start.
        self.static = order_K is not None or self.width == columns
        if self.static:
            scale_NG, zero_NG = fit_groups(w_NK, spec, fit, root_K=root_K)
        else:
            scale_NG, zero_NG = torch.zeros(2, rows, -(-columns // self.width), device=w_NK.device).unbind()
        self.scale_GN = scale_NG.t().contiguous()
        self.zero_GN = zero_NG.t().contiguous()
        self.inverse_GN = inverse(self.scale_GN)
        w_KN = w_NK.detach().t().float()
        w_KN = w_KN.clone(memory_format=torch.contiguous_format)
        self.w_KN = w_KN if order_K is None else w_KN.index_select(0, order_K)
        check_finite(self.w_KN.amin(), self.w_KN.amax())
        # What lies beyond the largest scale would only make the feedback overflow.
        self.w_KN.clamp_(-SCALE_MAX * self.top, SCALE_MAX * self.top)
        self.codes_KN = torch.empty(columns, rows, dtype=torch.uint8, device=w_NK.device)

    def run(self, *, feedback: bool) -> QuantizedMatrix:
        columns = len(self.w_KN)
        for start in range(0, columns, BLOCK):
            stop = min(columns, start + BLOCK)
            error_SN = self._block(start, stop) if feedback else self._open_block(start, stop)
            if stop < columns:
                self.w_KN[stop:].addmm_(self.factor.upper_KK[start:stop, stop:].t(), error_SN, alpha=-1)
        codes_KN = self.codes_KN
        if self.factor.order_K is not None:
            codes_KN = torch.empty_like(codes_KN)
            codes_KN[self.factor.order_K] = self.codes_KN
        return to_stored(
            codes_KN.t().contiguous(), self.scale_GN.t().contiguous(), self.zero_GN.t().contiguous(), self.spec
        )

    def _fit_group_at(self, column: int) -> None:
        """If a group starts at `column`, fit it to the weights as they are now."""
        if self.static or column % self.width:
            return
        stop = min(len(self.w_KN), column + self.width)
        spec = QuantSpec(bits=self.spec.bits, group_size=WHOLE_ROW, levels=self.spec.levels)
        root_g = None if self.root_K is None else self.root_K[column:stop]
        scale_N1, zero_N1 = fit_groups(self.w_KN[column:stop].t(), spec, self.fit, root_K=root_g)
        group = self.group_K[column]
        self.scale_GN[group] = scale_N1[:, 0]
        self.zero_GN[group] = zero_N1[:, 0]
        self.inverse_GN[group] = inverse(scale_N1[:, 0])

    def _block(self, start: int, stop: int) -> Tensor:
        """Round a block, with feedback inside it; returns errors / U_jj, (S, N)."""
        w_SN = self.w_KN[start:stop]
        upper_SS = self.factor.upper_KK[start:stop, start:stop]
        error_SN = torch.empty_like(w_SN)
        q_SN = torch.empty_like(w_SN)
        for first in range(0, stop - start, STRIP):
            strip = slice(first, first + STRIP)
            self._fit_group_at(start + first)
            self._strip(start + first, w_SN[strip], upper_SS[strip, strip], q_SN[strip], error_SN[strip])
            rest_SN = w_SN[first + STRIP :]
            if len(rest_SN):
                rest_SN.addmm_(upper_SS[strip, first + STRIP :].t(), error_SN[strip], alpha=-1)
        self.codes_KN[start:stop] = q_SN
        return error_SN

    def _strip(self, start: int, w_SN: Tensor, upper_SS: Tensor, q_SN: Tensor, error_SN: Tensor) -> None:
        """Round the columns from `start` on one by one; fills codes and errors / U_jj, both (S, N)."""
        d_N = torch.empty_like(w_SN[0])
        pivots = upper_SS.diagonal().tolist()
        rows = zip(w_SN.unbind(), q_SN.unbind(), error_SN.unbind(), pivots, strict=True)
        for i, (w_N, q_N, error_N, pivot) in enumerate(rows):
            group = self.group_K[start + i]
            zero_N = self.zero_GN[group]
            torch.addcmul(zero_N, w_N, self.inverse_GN[group], out=q_N)
            torch.sub(q_N.round_().clamp_(0, self.top), zero_N, out=d_N)
            torch.addcmul(w_N, d_N, self.scale_GN[group], value=-1, out=error_N).mul_(1 / pivot)
            if i + 1 < len(w_SN):
                w_SN[i + 1 :].addr_(upper_SS[i, i + 1 :], error_N, alpha=-1)

    def _open_block(self, start: int, stop: int) -> Tensor:
        """Round a block without feedback inside it; returns errors / U_jj, (S, N)."""
        for column in range(start, stop):
            self._fit_group_at(column)
        group_S = torch.tensor(self.group_K[start:stop], device=self.w_KN.device)
        zero_SN = self.zero_GN[group_S]
        w_SN = self.w_KN[start:stop]
        q_SN = torch.addcmul(zero_SN, w_SN, self.inverse_GN[group_S]).round_().clamp_(0, self.top)
        self.codes_KN[start:stop] = q_SN
        error_SN = w_SN - q_SN.sub_(zero_SN).mul_(self.scale_GN[group_S])
        return error_SN / self.factor.upper_KK.diagonal()[start:stop].unsqueeze(1)


class Gptq:
    """GPTQ with searched clip ranges, in which each input counts by its second moment H_jj.

    Inputs that no token excited are rounded plainly, and so is everything if there was no token at all.

    Args:
        damp: damping in units of the Hessian's mean diagonal; grows tenfold while the Hessian stays singular.
        act_order: process inputs by falling second moment, with parameters fitted to the original weights, instead
            of in storage order. How the matrix is stored does not change, and the error is the same or lower.
        gain: match the gain of groups when they are fitted and of rows, over the calibration inputs, in the end
            (docs/decisions/0013).
    """

    __slots__ = ("_factors", "gain")

    needs_hessian: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("gain", "act_order", "damp")
    weights_per_second: ClassVar[float] = 4e6

    def __init__(self, *, damp: float = 0.01, act_order: bool = True, gain: bool = False) -> None:
        self.gain = gain
        self._factors = FactorCache(damp=damp, act_order=act_order)

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`.

        Raises:
            OptionError: no Hessian given.
            TensorError: the weights are no finite matrix, or the Hessian does not fit them.
            CalibrationError: the Hessian is not finite or cannot be made positive definite.
        """
        hessian_KK = check_inputs(w_NK, hessian_KK, "gptq")
        factor = self._factors.get(hessian_KK, w_NK.device)
        if factor is None:
            return quantize_groups(w_NK, spec, lambda groups: fit_range(groups, spec.bits), gain=self.gain)

        def fit(groups: Groups) -> tuple[Tensor, Tensor]:
            ratio_M1, zero_M1 = fit_range(groups, spec.bits)
            if self.gain:
                ratio_M1 = groups.stored(ratio_M1 * groups.gain(ratio_M1, zero_M1))
            return ratio_M1, zero_M1

        rounded = round_columns(w_NK, factor, spec, fit, root_K=factor.root_K)
        return match_rows(w_NK, rounded, spec, hessian_KK) if self.gain else rounded

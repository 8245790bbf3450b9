"""Hessians of calibration inputs, factored for GPTQ.

Legend: K input columns.
"""

import threading
import weakref
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeq.errors import CalibrationError, OptionError, TensorError
from moeq.quantizers.levels import check_matrix

MAX_DAMP: Final = 1e3
"""Damping (in units of the mean diagonal) above which a Hessian is declared broken."""
ROOT_FLOOR: Final = 0.1
STRIP: Final = 256
"""Columns of a triangular matrix that are worked on together: few leave out most zeros, many multiply fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What GPTQ needs of a Hessian.

    Attributes:
        upper_KK: U with U^T U = (H + damping)^-1, up to a common factor; columns in processing order.
        order_K: columns in processing order, or None for storage order.
        dead_K: inputs that no token ever excited (H_jj = 0), in storage order.
        root_K: root mean square of the inputs (units: that of an average live input), in storage order; not below
            `ROOT_FLOOR`, because inputs that calibration hardly saw still need levels.
        damp: the damping that made H positive definite, in units of its mean diagonal.
    """

    upper_KK: Tensor
    order_K: Tensor | None
    dead_K: Tensor
    root_K: Tensor
    damp: float


def factorize(hessian_KK: Tensor, *, damp: float = 0.01, act_order: bool = False) -> Factor:
    """Factor the inverse of a damped Hessian.

    Dead inputs get a diagonal of their own, so they neither send nor receive errors and are rounded plainly. When
    the Cholesky decomposition fails, damping grows tenfold until it does not.

    Args:
        hessian_KK: sum of x x^T, not all zero.
        damp: damping in units of the mean diagonal of the live inputs.
        act_order: process inputs by falling diagonal.

    Raises:
        CalibrationError: the Hessian holds NaN or infinity, or no damping helps.
    """
    diagonal_K = hessian_KK.diagonal().float()
    dead_K = diagonal_K <= 0
    mean = float(diagonal_K[~dead_K].double().mean()) if not bool(dead_K.all()) else 0.0
    if not 0 < mean < torch.inf:
        raise CalibrationError(
            "the Hessian's diagonal is zero or not finite", fix="check the calibration activations for overflow"
        )
    order_K = torch.argsort(diagonal_K, descending=True, stable=True) if act_order else None
    damped_KK = _reversed(hessian_KK.float(), order_K)
    # In units of the mean diagonal nothing depends on how many tokens were summed.
    damped_KK.mul_(1 / mean)
    damped_KK.diagonal().masked_fill_(damped_KK.diagonal() <= 0, 1)
    added = 0.0
    while damp <= MAX_DAMP:
        damped_KK.diagonal().add_(damp - added)
        added = damp
        inverse_KK = inverse_root(damped_KK)
        if inverse_KK is not None:
            # H reversed = L L^T makes H = R R^T with R upper, so U = R^-1 without ever forming H^-1.
            upper_KK = inverse_KK.flip(0, 1)
            if bool(torch.isfinite(upper_KK).all()):
                root_K = (diagonal_K / mean).clamp_(min=ROOT_FLOOR**2).sqrt_()
                return Factor(upper_KK=upper_KK, order_K=order_K, dead_K=dead_K, root_K=root_K, damp=damp)
        damp = max(damp * 10, 1e-6)
    raise CalibrationError("the Hessian cannot be made positive definite", fix="check the calibration activations")


def _reversed(hessian_KK: Tensor, order_K: Tensor | None) -> Tensor:
    """A copy of a symmetric matrix with rows and columns from the last in processing order to the first."""
    if order_K is None:
        return hessian_KK.flip(0, 1)
    # Whole rows are copied much faster than scattered columns, and rows and columns are the same here.
    backwards_K = order_K.flip(0)
    return hessian_KK.index_select(0, backwards_K).t().contiguous().index_select(0, backwards_K)


def inverse_root(matrix_KK: Tensor) -> Tensor | None:
    """L^-1 for a symmetric matrix L L^T with L lower triangular, or None if there is no such L.

    Blocked, so that nearly everything is products of strips of `STRIP` columns, and none of them is of zeros: with
    the strips written as elements, L_ji = (H_ji - sum over k < i of L_jk L_ik^T) L_ii^-T and
    (L^-1)_ij = -L_ii^-1 (sum over j <= k < i of L_ik (L^-1)_kj).
    """
    columns = len(matrix_KK)
    lower_KK = matrix_KK.clone()
    inverse_KK = torch.zeros_like(matrix_KK)
    for start in range(0, columns, STRIP):
        stop = min(columns, start + STRIP)
        corner_SS, info = torch.linalg.cholesky_ex(lower_KK[start:stop, start:stop])
        if int(info):
            return None
        unit_SS = torch.eye(stop - start, dtype=corner_SS.dtype, device=corner_SS.device)
        corner_SS = torch.linalg.solve_triangular(corner_SS, unit_SS, upper=False)
        inverse_KK[start:stop, start:stop] = corner_SS
        for at in range(0, start, STRIP):
            product_SS = lower_KK[start:stop, at:start] @ inverse_KK[at:start, at : at + STRIP]
            torch.mm(-corner_SS, product_SS, out=inverse_KK[start:stop, at : at + STRIP])
        lower_KK[stop:, start:stop] = lower_KK[stop:, start:stop] @ corner_SS.t()
        for at in range(stop, columns, STRIP):
            strip_SS = lower_KK[at : at + STRIP, start:stop]
            lower_KK[at:, at : at + STRIP].addmm_(lower_KK[at:, start:stop], strip_SS.t(), alpha=-1)
    return inverse_KK


class _Last(threading.local):
    """The last Hessian, its diagonal as it was and its factor; each thread has its own."""

    known: tuple[weakref.ref[Tensor], Tensor, Factor] | None = None

    def __reduce__(self) -> tuple[type["_Last"], tuple[()]]:
        """Another process begins with nothing."""
        return _Last, ()


class FactorCache:
    """Remembers the factor of each thread's last Hessian: gate and up share theirs.

    A Hessian is recognised by being the same object with the same diagonal; adding tokens changes the diagonal.
    """

    __slots__ = ("_act_order", "_damp", "_last")

    def __init__(self, *, damp: float, act_order: bool) -> None:
        if not 0 <= damp <= MAX_DAMP:
            raise OptionError(f"{damp} is no damping", option="damp", fix=f"choose a number from 0 to {MAX_DAMP:g}")
        self._damp = damp
        self._act_order = act_order
        self._last = _Last()

    def get(self, hessian_KK: Tensor, device: torch.device) -> Factor | None:
        """The factor of `hessian_KK` on `device`, or None if no token excited any input; see `factorize`."""
        factor = self._remembered(hessian_KK, device)
        if factor is None and bool(hessian_KK.any()):
            # The old factor goes first: two of a large layer need not fit.
            self._last.known = None
            factor = factorize(hessian_KK.to(device), damp=self._damp, act_order=self._act_order)
            self._last.known = (weakref.ref(hessian_KK), hessian_KK.diagonal().clone(), factor)
        return factor

    def _remembered(self, hessian_KK: Tensor, device: torch.device) -> Factor | None:
        if self._last.known is None:
            return None
        reference, diagonal_K, factor = self._last.known
        same = reference() is hessian_KK and torch.equal(diagonal_K, hessian_KK.diagonal())
        return factor if same and factor.upper_KK.device == device else None


def check_inputs(w_NK: Tensor, hessian_KK: Tensor | None, quantizer: str) -> Tensor:
    """The Hessian, once it is known to be one of the inputs of `w_NK`.

    Raises:
        OptionError: there is none.
        TensorError: it has another shape, or the weights are no floating-point matrix.
    """
    check_matrix(w_NK)
    columns = w_NK.shape[1]
    if hessian_KK is None:
        raise OptionError(
            f"{quantizer} needs calibration statistics",
            option="quantizer",
            fix="give calibration text, or choose rtn or hqq, which need none",
        )
    if hessian_KK.shape != (columns, columns):
        raise TensorError(
            f"the Hessian has shape {tuple(hessian_KK.shape)}, the weights have {columns} inputs",
            fix="collect it from the inputs of this matrix",
        )
    return hessian_KK

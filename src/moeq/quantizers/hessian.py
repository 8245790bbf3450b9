"""Hessians of calibration inputs, factored for GPTQ.

Legend: K input columns.
"""

import weakref
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeq.errors import CalibrationError, OptionError, TensorError

MAX_DAMP: Final = 1e3
"""Damping (in units of the mean diagonal) above which a Hessian is declared broken."""
ROOT_FLOOR: Final = 0.1


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
    # In units of the mean diagonal nothing depends on how many tokens were summed.
    damped_KK = hessian_KK.float() / mean
    damped_KK.diagonal().masked_fill_(dead_K, 1)
    order_K = None
    if act_order:
        order_K = torch.argsort(diagonal_K, descending=True, stable=True)
        damped_KK = damped_KK[order_K][:, order_K]
    # H reversed = L L^T makes H = R R^T with R upper, so U = R^-1 without ever forming H^-1.
    damped_KK = damped_KK.flip(0, 1)
    added = 0.0
    while damp <= MAX_DAMP:
        damped_KK.diagonal().add_(damp - added)
        added = damp
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        if not int(info):
            eye_KK = torch.eye(len(lower_KK), device=lower_KK.device)
            upper_KK = torch.linalg.solve_triangular(lower_KK, eye_KK, upper=False).flip(0, 1)
            if bool(torch.isfinite(upper_KK).all()):
                root_K = (diagonal_K / mean).clamp_(min=ROOT_FLOOR**2).sqrt_()
                return Factor(upper_KK=upper_KK, order_K=order_K, dead_K=dead_K, root_K=root_K, damp=damp)
        damp = max(damp * 10, 1e-6)
    raise CalibrationError("the Hessian cannot be made positive definite", fix="check the calibration activations")


class FactorCache:
    """Remembers the factor of the last Hessian: gate and up share theirs.

    A Hessian is recognised by being the same object with the same diagonal; adding tokens changes the diagonal.
    """

    __slots__ = ("_act_order", "_damp", "_last")

    def __init__(self, *, damp: float, act_order: bool) -> None:
        if not 0 <= damp <= MAX_DAMP:
            raise OptionError(f"{damp} is no damping", option="damp", fix=f"choose a number from 0 to {MAX_DAMP:g}")
        self._damp = damp
        self._act_order = act_order
        self._last: tuple[weakref.ref[Tensor], Tensor, Factor] | None = None

    def get(self, hessian_KK: Tensor, device: torch.device) -> Factor:
        """The factor of `hessian_KK` on `device`; see `factorize`."""
        last = self._last
        if last is not None:
            known, diagonal_K, factor = last
            if (
                known() is hessian_KK
                and factor.upper_KK.device == device
                and torch.equal(diagonal_K, hessian_KK.diagonal())
            ):
                return factor
        # The old factor goes first: two of a large layer need not fit.
        self._last = None
        factor = factorize(hessian_KK.to(device), damp=self._damp, act_order=self._act_order)
        self._last = (weakref.ref(hessian_KK), hessian_KK.diagonal().clone(), factor)
        return factor


def check_hessian(hessian_KK: Tensor | None, columns: int, quantizer: str) -> Tensor:
    """The Hessian, once it is known to fit weights with `columns` inputs.

    Raises:
        OptionError: there is none.
        TensorError: it has another shape.
    """
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

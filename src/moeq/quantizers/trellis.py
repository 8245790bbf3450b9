"""Codes of a trellis: the levels of a weight depend on the codes above it, which takes a quarter of the error away.

Trellis-coded quantization (Marcellin and Fischer, 1990) down the rows of one column, chosen by Viterbi's search, with
the error feedback of GPTQ from column to column (`moeq.quantizers.gptq`): rows of a column are independent there, so
the two fit together without approximation. What codes stand for is in `moeq.trellis.codes`.

Scales come first, from the original weights: the search without feedback, then least squares.

Legend: N output rows, K input columns, G groups per row, S columns of a block, C histories.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moeq import native
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gain import bounded_gain
from moeq.quantizers.gptq import BLOCK, Gptq
from moeq.quantizers.hessian import Factor, FactorCache, check_inputs
from moeq.quantizers.levels import SCALE_MAX, check_finite, check_matrix, inverse, store_scale
from moeq.quantizers.rtn import Rtn
from moeq.spec import TRELLISES, WHOLE_ROW, QuantSpec, num_groups
from moeq.trellis import codes as trellis
from moeq.trellis.tables import TABLES, TAPS, UNITS


class Trellis:
    """Trellis codes at 1 to 4 bits; wider ones are rounded by gptq, or to nearest without a Hessian.

    Args:
        damp: damping of the Hessian in units of its mean diagonal.
        act_order: process inputs by falling second moment.
        gain: match the gain of groups when they are fitted and of rows in the end (docs/decisions/0013).
    """

    __slots__ = ("_factors", "_plain", "_scalar", "gain")

    needs_hessian: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("gain", "act_order", "damp")
    weights_per_second: ClassVar[float] = 2e6

    def __init__(self, *, damp: float = 0.01, act_order: bool = True, gain: bool = False) -> None:
        self.gain = gain
        self._factors = FactorCache(damp=damp, act_order=act_order)
        self._scalar = Gptq(damp=damp, act_order=act_order, gain=gain)
        self._plain = Rtn(gain=gain)

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`. Without a Hessian errors are not made up for.

        Raises:
            TensorError: the weights are no finite matrix, or the Hessian does not fit them.
            CalibrationError: the Hessian is not finite or cannot be made positive definite.
        """
        if not spec.history:
            plain = self._plain if hessian_KK is None else self._scalar
            return plain.quantize(w_NK, spec, hessian_KK)
        check_matrix(w_NK)
        factor = None
        if hessian_KK is not None:
            hessian_KK = check_inputs(w_NK, hessian_KK, "trellis")
            factor = self._factors.get(hessian_KK, w_NK.device)
        check_finite(w_NK.amin(), w_NK.amax())
        w_KN = w_NK.detach().float().cpu().t().contiguous()
        root_K = torch.ones(len(w_KN)) if factor is None else factor.root_K.cpu()
        scale_GN = _scales(w_KN, spec, root_K, gain=self.gain)
        codes_NK = _round(w_KN, scale_GN, spec, factor).t().contiguous()
        scale_NG = scale_GN.t().clone(memory_format=torch.contiguous_format)
        if self.gain and factor is not None and hessian_KK is not None:
            hat_NK = trellis.entries(codes_NK, spec.bits) * _spread(scale_GN, spec, w_KN.shape[0]).t()
            along_NK = w_KN.t() @ hessian_KK.float().cpu()
            gain_N = bounded_gain((along_NK * w_KN.t()).sum(1) / (along_NK * hat_NK).sum(1))
            scale_NG = (scale_NG * gain_N.unsqueeze(1)).clamp_(max=SCALE_MAX)
        return QuantizedMatrix(codes_NK=codes_NK, scale_NG=scale_NG.half(), zero_NG=None)


def _spread(scale_GN: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """Scales of groups as scales of weights, (K, N)."""
    width = columns if spec.group_size == WHOLE_ROW else spec.group_size
    return scale_GN.repeat_interleave(width, dim=0)[:columns]


def _scales(w_KN: Tensor, spec: QuantSpec, root_K: Tensor, *, gain: bool) -> Tensor:
    """Scales as stored, (G, N): least squares for the codes of a search with root mean squares.

    A second search and fit changed errors of trained weights by less than a hundredth.
    """
    columns = len(w_KN)
    groups = num_groups(columns, spec.group_size)
    width = columns if groups == 1 else spec.group_size
    weight_K = root_K.square()

    def sums(value_KN: Tensor) -> Tensor:
        weighted = functional.pad(value_KN * weight_K.unsqueeze(1), (0, 0, 0, groups * width - columns))
        return weighted.view(groups, width, -1).sum(1)

    total_G1 = sums(torch.ones(columns, 1))
    scale_GN = store_scale((sums(w_KN.square()) / total_G1).sqrt() / UNITS[spec.bits])
    codes_KN = _search(w_KN, scale_GN, spec)
    e_KN = trellis.entries(codes_KN.t().contiguous(), spec.bits).t()
    both_GN, own_GN = sums(w_KN * e_KN), sums(e_KN.square())
    fitted_GN = both_GN * inverse(own_GN)
    if gain:
        fitted_GN = fitted_GN * bounded_gain(sums(w_KN.square()) * inverse(both_GN * fitted_GN))
    return torch.where(fitted_GN > 0, store_scale(fitted_GN), scale_GN)


def _search(w_KN: Tensor, scale_GN: Tensor, spec: QuantSpec) -> Tensor:
    """Codes without error feedback, (K, N)."""
    codes = []
    scale_KN = _spread(scale_GN, spec, len(w_KN))
    for start in range(0, len(w_KN), BLOCK):
        part = slice(start, start + BLOCK)
        w_SN = w_KN[part].clone()
        codes.append(_columns(spec.bits, w_SN, scale_KN[part], torch.eye(len(w_SN)))[0])
    return torch.cat(codes)


def _round(w_KN: Tensor, scale_GN: Tensor, spec: QuantSpec, factor: Factor | None) -> Tensor:
    """Codes with error feedback, (K, N) in storage order."""
    if factor is None:
        return _search(w_KN, scale_GN, spec)
    columns = len(w_KN)
    upper_KK = factor.upper_KK.cpu()
    order_K = torch.arange(columns) if factor.order_K is None else factor.order_K.cpu()
    work_KN, scale_KN = w_KN[order_K], _spread(scale_GN, spec, columns)[order_K]
    codes_KN = torch.empty(work_KN.shape, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(columns, start + BLOCK))
        codes_SN, error_SN = _columns(spec.bits, work_KN[part], scale_KN[part], upper_KK[part, part])
        codes_KN[order_K[part]] = codes_SN
        if part.stop < columns:
            work_KN[part.stop :].addmm_(upper_KK[part, part.stop :].t(), error_SN, alpha=-1)
    return codes_KN


def _columns(bits: int, w_SN: Tensor, scale_SN: Tensor, upper_SS: Tensor) -> tuple[Tensor, Tensor]:
    if native.available():
        return native.trellis_columns(bits, w_SN, scale_SN, upper_SS)
    native.warn_missing()
    return search_columns(bits, w_SN, scale_SN, upper_SS)


def search_columns(bits: int, w_SN: Tensor, scale_SN: Tensor, upper_SS: Tensor) -> tuple[Tensor, Tensor]:
    """`moeq.native.trellis_columns` with torch alone, the truth that it is tested against."""
    codes_SN, error_SN = torch.empty(w_SN.shape, dtype=torch.uint8), torch.empty_like(w_SN)
    for j in range(len(w_SN)):
        codes_SN[j] = best_path(w_SN[j], scale_SN[j], bits)
        hat_N = trellis.entries(codes_SN[j].unsqueeze(1), bits)[:, 0] * scale_SN[j]
        error_SN[j] = (w_SN[j] - hat_N) / upper_SS[j, j]
        w_SN[j + 1 :] -= upper_SS[j, j + 1 :].unsqueeze(1) * error_SN[j]
    return codes_SN, error_SN


def best_path(w_N: Tensor, scale_N: Tensor, bits: int) -> Tensor:
    """Codes (N,) of least squared error, by Viterbi's search."""
    states = 1 << TRELLISES[bits]
    branch = torch.arange(states << bits)
    parity = trellis.parities(bits)[(branch >> bits) << 1 | (branch & 1)]
    level = torch.tensor(TABLES[bits], dtype=torch.float32)[
        ((branch & ((1 << bits) - 1)) >> 1 << len(TAPS[bits])) | parity
    ]
    # Branches, a history and a code each, by the history that they lead to.
    order = torch.argsort(((branch >> bits) << 1 | (branch & 1)) & (states - 1), stable=True).view(states, -1)
    comes_from, level = order >> bits, level[order]
    cost_C = torch.full((states,), 1e30)
    cost_C[0] = 0
    back = []
    for w, scale in zip(w_N.tolist(), scale_N.tolist(), strict=True):
        cost_C, chosen_C = (cost_C[comes_from] + (w - scale * level).square()).min(1)
        back.append(chosen_C)
    state = int(cost_C.argmin())
    found = []
    for chosen_C in reversed(back):
        chosen = int(order[state, chosen_C[state]])
        found.append(chosen & ((1 << bits) - 1))
        state = chosen >> bits
    return torch.tensor(found[::-1], dtype=torch.uint8)

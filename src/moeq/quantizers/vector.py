"""Vector rounding with error feedback: a code names an entry of a codebook of neighbouring weights.

Follows van Baalen et al., "GPTVQ: The Blessing of Dimensionality for LLM Quantization" (2024), as TileQ uses it: blocks
of rows and columns have a codebook of their own, found by k-means in which each input counts by what an error of it
costs, when the columns of the block are reached; then the vectors of the block are rounded from left to right, each
error made up for by the columns not yet rounded, as GPTQ does (`moeq.quantizers.gptq`). With U^T U = H^-1 an error E
of a vector's columns g costs ||E U_gg^-1||^2 and is best answered by subtracting E U_gg^-1 U_gk from every later
column k. Rows are brought to the same length first and keep a scale of their own; entries have 8 bits.

Legend: N output rows, K input columns, d weights of a vector, V vectors, C entries of a codebook, B columns of a block.
"""

from typing import ClassVar, Final

import torch
from torch import Tensor

from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gain import bounded_gain
from moeq.quantizers.gptq import Gptq
from moeq.quantizers.hessian import Factor, FactorCache, check_inputs
from moeq.quantizers.levels import SCALE_MAX, check_finite, inverse, store_scale
from moeq.spec import Codebooks, QuantSpec

ITERATIONS: Final = 10
SAMPLE: Final = 1 << 14
"""Vectors that a codebook is fitted to; blocks with more are thinned out evenly."""
TOP: Final = 127
"""Largest entry of a codebook, in units of the row's scale."""
REACH: Final = 16.0
"""Weights beyond this many root mean squares of their row are cut off at the largest entry."""
CHUNK: Final = 1 << 14
"""Vectors whose nearest entries are searched together."""


class Vector:
    """Codebooks at 2 and 3 bits; any other width is rounded by gptq.

    Columns are processed in storage order: vectors are neighbours there.

    Args:
        damp: damping of the Hessian in units of its mean diagonal.
        act_order: option of gptq, for the other widths.
        gain: match the gain of each row over the calibration inputs (docs/decisions/0013).
    """

    __slots__ = ("_factors", "_scalar", "gain")

    needs_hessian: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("gain", "act_order", "damp")
    weights_per_second: ClassVar[float] = 0.7e6

    def __init__(self, *, damp: float = 0.01, act_order: bool = True, gain: bool = False) -> None:
        self.gain = gain
        self._factors = FactorCache(damp=damp, act_order=False)
        self._scalar = Gptq(damp=damp, act_order=act_order, gain=gain)

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """Round `w_NK`; see `moeq.quantizers.base.Quantizer`.

        Returns:
            codes (N, K / d); scales of the rows, (N, 1); entries of the codebooks, (down, across, C d) uint8.

        Raises:
            OptionError: no Hessian given, or K is no multiple of d.
            TensorError: the weights are no finite matrix, or the Hessian does not fit them.
            CalibrationError: the Hessian is not finite or cannot be made positive definite.
        """
        if spec.codebooks is None:
            return self._scalar.quantize(w_NK, spec, hessian_KK)
        hessian_KK = check_inputs(w_NK, hessian_KK, "vector")
        check_finite(w_NK.amin(), w_NK.amax())
        factor = self._factors.get(hessian_KK, w_NK.device)
        w_NK = w_NK.detach().float()
        scale_N1 = row_scales(w_NK)
        codes_NV, entries, unit_NK = _round(w_NK * inverse(scale_N1), factor, spec.codebooks)
        rounded = QuantizedMatrix(codes_NK=codes_NV.cpu(), scale_NG=scale_N1.half().cpu(), zero_NG=entries)
        if not self.gain:
            return rounded
        hat_NK = unit_NK * scale_N1
        along_NK = w_NK if factor is None else w_NK @ hessian_KK.float()
        gain_N = bounded_gain((along_NK * w_NK).sum(1) / (along_NK * hat_NK).sum(1))
        grown_N1 = (scale_N1 * gain_N.unsqueeze(1)).clamp_(max=SCALE_MAX)
        return QuantizedMatrix(codes_NK=rounded.codes_NK, scale_NG=grown_N1.half().cpu(), zero_NG=entries)


def row_scales(w_NK: Tensor) -> Tensor:
    """The unit of each row's entries, as stored, (N, 1): 8 bits reach as far as the longest row's weights."""
    root_N1 = w_NK.square().mean(1, keepdim=True).sqrt()
    reach = float((w_NK.abs().amax(1, keepdim=True) * inverse(root_N1)).amax().clamp(max=REACH))
    return store_scale(root_N1 * (reach / TOP))


def _round(w_NK: Tensor, factor: Factor | None, books: Codebooks) -> tuple[Tensor, Tensor, Tensor]:
    """Round from left to right.

    Returns:
        codes (N, K / d); entries of the codebooks, (down, across, C d) uint8, on the CPU; what they stand for, (N, K).
    """
    rows, columns = w_NK.shape
    down, across = books.grid((rows, columns))
    work_NK = w_NK.clone()
    upper_KK = torch.eye(columns, device=w_NK.device) if factor is None else factor.upper_KK
    codes_NV = torch.empty(rows, columns // books.dim, dtype=torch.uint8, device=w_NK.device)
    entries = torch.empty(down, across, books.entries * books.dim, dtype=torch.uint8)
    hat_NK = torch.empty_like(w_NK)
    for block in range(across):
        part = slice(block * books.columns, min(columns, (block + 1) * books.columns))
        cost_B = upper_KK.diagonal()[part].square().reciprocal()
        tables = []
        for index in range(down):
            band = slice(index * books.rows, min(rows, (index + 1) * books.rows))
            table_Cd = codebook(work_NK[band, part].reshape(-1, books.dim), cost_B.view(-1, books.dim), books.entries)
            tables.append(table_Cd.round_().clamp_(-TOP - 1, TOP))
            entries[index, block] = (tables[-1] + TOP + 1).to(torch.uint8).flatten().cpu()
        error_NB = _block(work_NK[:, part], upper_KK[part, part], tables, books, codes_NV, part.start // books.dim)
        vectors = slice(part.start // books.dim, part.stop // books.dim)
        for index, table_Cd in enumerate(tables):
            band = slice(index * books.rows, (index + 1) * books.rows)
            hat_NK[band, part] = table_Cd[codes_NV[band, vectors].long()].flatten(1)
        if part.stop < columns and factor is not None:
            work_NK[:, part.stop :].addmm_(error_NB, upper_KK[part, part.stop :], alpha=-1)
    return codes_NV, entries, hat_NK


def _block(
    w_NB: Tensor, upper_BB: Tensor, tables: list[Tensor], books: Codebooks, codes_NV: Tensor, first: int
) -> Tensor:
    """Round the columns of a block in place, vector by vector; fills codes, returns errors times U_gg^-1, (N, B)."""
    error_NB = torch.empty_like(w_NB)
    for start in range(0, w_NB.shape[1], books.dim):
        part = slice(start, start + books.dim)
        corner_dd = upper_BB[part, part]
        unit_dd = torch.eye(books.dim, dtype=corner_dd.dtype, device=corner_dd.device)
        inverse_dd = torch.linalg.solve_triangular(corner_dd, unit_dd, upper=True)
        for index, table_Cd in enumerate(tables):
            band = slice(index * books.rows, (index + 1) * books.rows)
            seen_Nd, known_Cd = w_NB[band, part] @ inverse_dd, table_Cd @ inverse_dd
            code_N = torch.addmm(known_Cd.square().sum(1), seen_Nd, known_Cd.T, alpha=-2).argmin(1)
            codes_NV[band, first + start // books.dim] = code_N.to(torch.uint8)
            error_NB[band, part] = seen_Nd - known_Cd[code_N]
        rest_NB = w_NB[:, part.stop :]
        if rest_NB.shape[1]:
            rest_NB.addmm_(error_NB[:, part], upper_BB[part, part.stop :], alpha=-1)
    return error_NB


def codebook(vectors_Vd: Tensor, cost_Gd: Tensor, entries: int) -> Tensor:
    """Entries (C, d) of small weighted squared error, by k-means.

    The start takes vectors at equal steps of their weighted length (GPTVQ's Mahalanobis initialization). Entries that
    no vector is nearest to stay where they are.

    Args:
        vectors_Vd: the vectors, row after row.
        cost_Gd: what an error of each column costs, for the vectors of one row; repeats from row to row.
        entries: C.
    """
    cost_Vd = cost_Gd.repeat(len(vectors_Vd) // len(cost_Gd), 1)
    if len(vectors_Vd) > SAMPLE:
        # An odd step meets all columns.
        pick = torch.arange(0, len(vectors_Vd), -(-len(vectors_Vd) // SAMPLE) | 1, device=vectors_Vd.device)
        vectors_Vd, cost_Vd = vectors_Vd[pick], cost_Vd[pick]
    cost_Vd = cost_Vd / cost_Vd.mean()
    order_V = torch.argsort((cost_Vd * vectors_Vd.square()).sum(1), stable=True)
    steps = torch.linspace(0, len(order_V) - 1, entries, device=order_V.device).round().long()
    table_Cd = vectors_Vd[order_V[steps]].clone()
    weighted_Vd = cost_Vd * vectors_Vd
    for _ in range(ITERATIONS):
        code_V = nearest(weighted_Vd, cost_Vd, table_Cd)
        mass_Cd = torch.zeros_like(table_Cd).index_add_(0, code_V, cost_Vd)
        sum_Cd = torch.zeros_like(table_Cd).index_add_(0, code_V, weighted_Vd)
        table_Cd = torch.where(mass_Cd > 0, sum_Cd / mass_Cd.clamp(min=1e-30), table_Cd)
    return table_Cd


def nearest(weighted_Vd: Tensor, cost_Vd: Tensor, table_Cd: Tensor) -> Tensor:
    """The entry of least cost (v - c)^2 for each vector, (V,); weighted = cost * v."""
    side_2dC = torch.cat([-2 * table_Cd, table_Cd.square()], dim=1).T
    both_V2d = torch.cat([weighted_Vd, cost_Vd], dim=1)
    return torch.cat([(chunk @ side_2dC).argmin(1) for chunk in both_V2d.split(CHUNK)])

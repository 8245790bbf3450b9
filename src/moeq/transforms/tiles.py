"""One low-rank factorization for all experts of a projection, tiled in two dimensions (TileQ; notes, sections 1 and 3).

Expert k sits in cell (m, n) of a grid. Experts of a grid row share an input factor A_m (R, I), those of a grid column
an output factor B_n (R, O): W_k ~ B_n^T A_m. The stacked matrix with block (m, n) = diag(s_m) W_k^T has one
factorization of rank R, s_m being the sizes of the inputs that the row's experts see; folding 1 / s_m into A_m costs
nothing at run time. Rounds of weighted least squares then fit each side to the other one as it is stored, every expert
weighted by its own inputs; cells without an expert do not count there.

`moeq.transforms.placement` decides which expert sits where.

Legend: E experts, M x N grid, I inputs, O outputs, R rank, p columns of a sketch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

OVERSAMPLING: Final = 8
POWER_STEPS: Final = 3
DEFLATION_STEPS: Final = 8
RIDGE: Final = 1e-6
"""Added to normal equations, in mean diagonals."""

RoundFactor = Callable[[Tensor], tuple[Any, Tensor]]
"""Rounds the rows of a matrix: (what is stored, what it stands for)."""


def exactly(factor: Tensor) -> tuple[Any, Tensor]:
    """A `RoundFactor` that changes nothing."""
    return factor, factor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Where the experts sit.

    Attributes:
        rows: M, row tiles.
        columns: N, column tiles.
        row_E: row of each expert.
        column_E: column of each expert.
    """

    rows: int
    columns: int
    row_E: tuple[int, ...]
    column_E: tuple[int, ...]

    def parts(self) -> list[list[int]]:
        """The experts, in sets that share neither a row nor a column with each other."""
        owner: dict[tuple[str, int], int] = {}
        parts: list[list[int] | None] = []
        for expert, (row, column) in enumerate(zip(self.row_E, self.column_E, strict=True)):
            merged = [expert]
            for key in (("row", row), ("column", column)):
                found = owner.get(key)
                known = None if found is None else parts[found]
                if found is not None and known is not None:
                    merged += known
                    parts[found] = None
            for member in merged:
                owner["row", self.row_E[member]] = owner["column", self.column_E[member]] = len(parts)
            parts.append(merged)
        return [sorted(part) for part in parts if part is not None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """Both sides of a factorization.

    Attributes:
        inputs_MRI: A.
        outputs_NRO: B.
        stored_inputs: A as `RoundFactor` stores it, (M * R, I).
        stored_outputs: B as it is stored, (N * R, O).
    """

    inputs_MRI: Tensor
    outputs_NRO: Tensor
    stored_inputs: Any = None
    stored_outputs: Any = None

    def expert(self, row: int, column: int) -> Tensor:
        """What the factors give for the expert in a cell, (O, I)."""
        return self.outputs_NRO[column].T @ self.inputs_MRI[row]


def input_scale(mean_I: Tensor, alpha: float) -> Tensor:
    """mean |x|^alpha, normalized so that its largest and smallest entries multiply to 1 (notes, equation 4).

    alpha falls in steps of 0.2 while the entries span more than five decades, but not below 0.5; inputs that are never
    seen count as the smallest that are, and an expert without tokens has scales of 1.
    """
    mean_I = mean_I.double()
    seen = mean_I > 0
    if not bool(torch.isfinite(mean_I).all()) or not bool(seen.any()):
        return torch.ones_like(mean_I)
    mean_I = mean_I.clamp(min=float(mean_I[seen].min()))
    while True:
        scale_I = (mean_I / mean_I.mean()) ** alpha
        if alpha <= 0.5 or float(scale_I.max() / scale_I.min()) < 1e5:
            return scale_I / (scale_I.max() * scale_I.min()).sqrt()
        alpha = max(0.5, alpha - 0.2)


class Blocks:
    """The stacked matrix: its products with narrow matrices, block by block; blocks that are empty cost nothing.

    Args:
        a_EIO: the blocks, in any order.
        grid: where they are.
        experts: which of them to use.
    """

    def __init__(self, a_EIO: Tensor, grid: Grid, experts: list[int] | None = None) -> None:
        self.a_EIO, self.grid = a_EIO, grid
        self.experts = list(range(len(a_EIO))) if experts is None else experts

    def right(self, g_NOp: Tensor) -> Tensor:
        """Stacked matrix times g, (M, I, p)."""
        y_MIp = g_NOp.new_zeros(self.grid.rows, self.a_EIO.shape[1], g_NOp.shape[2])
        for k in self.experts:
            y_MIp[self.grid.row_E[k]].addmm_(self.a_EIO[k], g_NOp[self.grid.column_E[k]])
        return y_MIp

    def left(self, y_MIp: Tensor) -> Tensor:
        """Transposed stacked matrix times y, (N, O, p)."""
        g_NOp = y_MIp.new_zeros(self.grid.columns, self.a_EIO.shape[2], y_MIp.shape[2])
        for k in self.experts:
            g_NOp[self.grid.column_E[k]].addmm_(self.a_EIO[k].T, y_MIp[self.grid.row_E[k]])
        return g_NOp

    def start(self, count: int, seed: int) -> Tensor:
        """A random g with `count` columns."""
        shape = self.grid.columns, self.a_EIO.shape[2], count
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.a_EIO)

    def svd(self, rank: int, *, seed: int = 0, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Leading singular triplets by randomized subspace iteration.

        Returns:
            u (M, I, R), sigma (R,), v (N, O, R).
        """
        rows, columns = self.grid.rows * self.a_EIO.shape[1], self.grid.columns * self.a_EIO.shape[2]
        count = min(rank + OVERSAMPLING, rows, columns)
        g_NOp = self.start(count, seed) if start is None else start
        for _ in range(POWER_STEPS):
            g_NOp = _orthonormal(self.left(_orthonormal(self.right(g_NOp))))
        y_MIp = _orthonormal(self.right(g_NOp))
        u_Cp, sigma_p, vh_pp = torch.linalg.svd(self.left(y_MIp).flatten(0, 1), full_matrices=False)
        keep = min(rank, len(sigma_p))
        v_NOR = u_Cp[:, :keep].unflatten(0, (self.grid.columns, -1))
        return y_MIp @ vh_pp[:keep].T, sigma_p[:keep], v_NOR


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x.flatten(0, 1)).Q.view(x.shape)


def svd_factors(blocks: Blocks, rank: int, seed: int = 0) -> Factors:
    """The best factors of the stacked matrix, not rounded; parts of the grid that share nothing have their own."""
    a_EIO, grid = blocks.a_EIO, blocks.grid
    inputs_MRI = a_EIO.new_zeros(grid.rows, rank, a_EIO.shape[1])
    outputs_NRO = a_EIO.new_zeros(grid.columns, rank, a_EIO.shape[2])
    for part in grid.parts():
        rows, columns = sorted({grid.row_E[k] for k in part}), sorted({grid.column_E[k] for k in part})
        small = Grid(
            rows=len(rows),
            columns=len(columns),
            row_E=tuple(rows.index(grid.row_E[k]) if k in part else 0 for k in range(len(a_EIO))),
            column_E=tuple(columns.index(grid.column_E[k]) if k in part else 0 for k in range(len(a_EIO))),
        )
        u_MIR, sigma_R, v_NOR = Blocks(a_EIO, small, part).svd(rank, seed=seed)
        found = len(sigma_R)
        inputs_MRI[rows, :found] = (u_MIR * sigma_R.sqrt()).transpose(1, 2)
        outputs_NRO[columns, :found] = (v_NOR * sigma_R.sqrt()).transpose(1, 2)
    return Factors(inputs_MRI=inputs_MRI, outputs_NRO=outputs_NRO)


def deflated_factors(blocks: Blocks, rank: int, round_vector: Callable[[Tensor], Tensor], *, seed: int = 0) -> Factors:
    """Rank-1 deflation with rounded vectors: later components absorb what rounding lost (notes, equation 5).

    Args:
        blocks: the stacked matrix; a copy of it is deflated.
        rank: components.
        round_vector: rounds a vector (M, I) or (N, O) of length 1 to what is stored.
        seed: of the random starts.
    """
    grid = blocks.grid
    work = Blocks(blocks.a_EIO.clone(), grid, blocks.experts)
    inputs_MRI = work.a_EIO.new_zeros(grid.rows, rank, work.a_EIO.shape[1])
    outputs_NRO = work.a_EIO.new_zeros(grid.columns, rank, work.a_EIO.shape[2])
    for c in range(rank):
        y_MI1 = _unit(work.right(work.start(1, seed * rank + c)))
        for _ in range(DEFLATION_STEPS):
            y_MI1 = _unit(work.right(work.left(y_MI1)))
        w_NO1 = work.left(y_MI1)
        u_MI = round_vector(y_MI1[..., 0])
        v_NO = round_vector(_unit(w_NO1)[..., 0])
        # The best factor for the rounded vectors; that of the exact ones is |w|.
        kept = (work.left(u_MI.unsqueeze(-1))[..., 0] * v_NO).sum()
        sigma = (kept / (u_MI.square().sum() * v_NO.square().sum()).clamp(min=1e-30)).clamp(min=0)
        for k in work.experts:
            work.a_EIO[k].addr_(u_MI[grid.row_E[k]], v_NO[grid.column_E[k]], alpha=-float(sigma))
        inputs_MRI[:, c] = u_MI * sigma.sqrt()
        outputs_NRO[:, c] = v_NO * sigma.sqrt()
    return Factors(inputs_MRI=inputs_MRI, outputs_NRO=outputs_NRO)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp(min=torch.finfo(x.dtype).tiny)


def fit_inputs(w_EOI: Tensor, outputs_NRO: Tensor, weight_EI: Tensor, grid: Grid) -> Tensor:
    """The A that minimizes sum_k ||(W_k - B_n^T A_m) diag(weight_k)^1/2||^2 for given B, (M, R, I)."""
    rank = outputs_NRO.shape[1]
    square_NRR = outputs_NRO @ outputs_NRO.transpose(1, 2)
    inputs_MRI = w_EOI.new_zeros(grid.rows, rank, w_EOI.shape[2])
    for row in sorted(set(grid.row_E)):
        members = [k for k, found in enumerate(grid.row_E) if found == row]
        columns = [grid.column_E[k] for k in members]
        normal_IRR = torch.einsum("ki,krs->irs", weight_EI[members], square_NRR[columns])
        right_RI = sum(
            (outputs_NRO[column] @ w_EOI[k]) * weight_EI[k] for k, column in zip(members, columns, strict=True)
        )
        assert isinstance(right_RI, Tensor)
        inputs_MRI[row] = _solve(normal_IRR, right_RI.T.unsqueeze(-1))[..., 0].T
    return inputs_MRI


def fit_outputs(w_EOI: Tensor, inputs_MRI: Tensor, weight_EI: Tensor, grid: Grid) -> Tensor:
    """The B that minimizes the same for given A, (N, R, O)."""
    rank = inputs_MRI.shape[1]
    outputs_NRO = w_EOI.new_zeros(grid.columns, rank, w_EOI.shape[1])
    for column in sorted(set(grid.column_E)):
        normal_RR = w_EOI.new_zeros(rank, rank)
        right_RO = w_EOI.new_zeros(rank, w_EOI.shape[1])
        for k, found in enumerate(grid.column_E):
            if found == column:
                weighted_RI = inputs_MRI[grid.row_E[k]] * weight_EI[k]
                normal_RR += weighted_RI @ inputs_MRI[grid.row_E[k]].T
                right_RO += weighted_RI @ w_EOI[k].T
        outputs_NRO[column] = _solve(normal_RR, right_RO)
    return outputs_NRO


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """normal^-1 right for positive semidefinite normal equations, (..., R, R)."""
    normal = normal.double()
    mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return torch.linalg.solve(normal + RIDGE * mean * eye, right.double()).to(right.dtype)


def refit(
    w_EOI: Tensor, start: Factors, weight_EI: Tensor, grid: Grid, round_factor: RoundFactor, *, rounds: int = 2
) -> Factors:
    """Alternate least squares, each side fitted to the other as it is stored.

    Args:
        w_EOI: the weights.
        start: factors, not rounded.
        weight_EI: what an error of each expert's inputs counts, their second moments.
        grid: where the experts sit.
        round_factor: to what is stored.
        rounds: 0 only rounds.
    """

    def rounded(factor: Tensor) -> tuple[Any, Tensor]:
        stored, decoded = round_factor(factor.flatten(0, 1))
        return stored, decoded.view(factor.shape)

    stored_outputs, outputs_NRO = rounded(start.outputs_NRO)
    stored_inputs, inputs_MRI = rounded(start.inputs_MRI)
    for last in range(rounds):
        stored_inputs, inputs_MRI = rounded(fit_inputs(w_EOI, outputs_NRO, weight_EI, grid))
        if last + 1 < rounds:
            stored_outputs, outputs_NRO = rounded(fit_outputs(w_EOI, inputs_MRI, weight_EI, grid))
    return Factors(
        inputs_MRI=inputs_MRI,
        outputs_NRO=outputs_NRO,
        stored_inputs=stored_inputs,
        stored_outputs=stored_outputs,
    )


def captured(w_EOI: Tensor, factors: Factors, weight_EI: Tensor, grid: Grid) -> float:
    """1 - ||R||^2 / ||W||^2 with every expert's inputs weighted (notes, section 11, T9)."""
    total = left = 0.0
    for k in range(len(w_EOI)):
        rest_OI = w_EOI[k] - factors.expert(grid.row_E[k], grid.column_E[k])
        total += float((w_EOI[k].square() * weight_EI[k]).sum())
        left += float((rest_OI.square() * weight_EI[k]).sum())
    return 1 - left / total if total else 0.0

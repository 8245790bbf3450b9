"""Which expert sits in which cell of the grid (TileQ; notes, section 3, steps 2 to 4).

What an expert's matrix A = U S V^T has in common with another's does not depend on the signs of singular vectors or on
how they are rotated among equal singular values: a tile's subspace is the span of the strongest directions of its
members' U S (or V S), and an expert loses in it what lies outside, ||A||^2 - ||Ubar^T U S||^2. The sum of what all
experts lose in their row's and column's subspaces bounds the error of the factorization (notes, section 8); it is
minimized by turns: subspaces for given cells, then cells for given subspaces, an assignment problem. Swaps of two
experts that raise the captured energy itself come last.

`literal` is what the released code does, kept to compare with: k-means of flattened singular vectors, whose signs and
order are arbitrary, then cells in rings around the wished one.

Legend: E experts, M x N grid, I inputs, O outputs, s directions of an expert, a directions of a tile.
"""

import itertools
import warnings
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from moeq.transforms.tiles import Blocks, Grid

ROUNDS: Final = 10
RESTARTS: Final = 4
LITERAL_RESTARTS: Final = 10
TIE: Final = 1e-3
"""What leaving the ideal row or column costs, in mean energies of an expert: it breaks ties."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sketch:
    """The strongest directions of every expert's matrix.

    Attributes:
        left_EIs: U S.
        right_EOs: V S.
        sigma_Es: S.
    """

    left_EIs: Tensor
    right_EOs: Tensor
    sigma_Es: Tensor


def sketch(a_EIO: Tensor, directions: int, seed: int = 0) -> Sketch:
    """Leading singular directions of each A, from the same random start."""
    alone = Grid(rows=1, columns=1, row_E=(0,), column_E=(0,))
    lefts, rights, sigmas = [], [], []
    for a_IO in a_EIO:
        u_MIR, sigma_R, v_NOR = Blocks(a_IO.unsqueeze(0), alone).svd(directions, seed=seed)
        lefts.append(u_MIR[0] * sigma_R)
        rights.append(v_NOR[0] * sigma_R)
        sigmas.append(sigma_R)
    return Sketch(left_EIs=torch.stack(lefts), right_EOs=torch.stack(rights), sigma_Es=torch.stack(sigmas))


def matched(found: Sketch, shape: tuple[int, int], rank: int, seed: int = 0) -> Grid:
    """Cells by subspaces: clusters of each side, then assignment and subspaces by turns.

    Args:
        found: of the scaled weights.
        shape: (M, N), M N not below E.
        rank: of the factorization; a tile gets its share of it.
        seed: of the clusters' starts.
    """
    share = max(1, rank // min(shape))
    sides = (found.left_EIs, found.right_EOs)
    labels = [_clusters(side, count, share, seed) for side, count in zip(sides, shape, strict=True)]
    losses = [
        _losses(side, _subspaces(side, label_E, count, share))
        for side, label_E, count in zip(sides, labels, shape, strict=True)
    ]
    grid, best = _assign(losses, labels, shape), float("inf")
    for _ in range(ROUNDS):
        cells = (np.array(grid.row_E), np.array(grid.column_E))
        losses = [
            _losses(side, _subspaces(side, cell_E, count, share))
            for side, cell_E, count in zip(sides, cells, shape, strict=True)
        ]
        total = sum(float(loss[np.arange(len(loss)), cell_E].sum()) for loss, cell_E in zip(losses, cells, strict=True))
        if total >= best * (1 - 1e-6):
            break
        best = total
        grid = _assign(losses, labels, shape)
    return grid


def _subspaces(side_EIs: Tensor, label_E: NDArray[np.integer], count: int, share: int) -> list[Tensor]:
    """The strongest `share` directions of each label's members, (I, a); none for a label without members."""
    spaces = []
    for label in range(count):
        members = np.flatnonzero(label_E == label)
        joint_IS = side_EIs[members].transpose(0, 1).flatten(1)
        if joint_IS.shape[1] == 0:
            spaces.append(joint_IS)
            continue
        # Eigenvectors of the small Gram matrix give the left singular vectors of a tall matrix.
        values_S, vectors_SS = torch.linalg.eigh(joint_IS.T @ joint_IS)
        keep = vectors_SS[:, -share:]
        spaces.append((joint_IS @ keep) / values_S[-share:].clamp(min=1e-30).sqrt())
    return spaces


def _losses(side_EIs: Tensor, spaces: list[Tensor]) -> NDArray[np.float64]:
    """What each expert loses in each subspace, (E, labels)."""
    energy_E = side_EIs.square().sum((1, 2))
    kept = [torch.einsum("ia,eis->eas", space, side_EIs).square().sum((1, 2)) for space in spaces]
    return (energy_E.unsqueeze(1) - torch.stack(kept, dim=1)).double().cpu().numpy()


def _clusters(side_EIs: Tensor, count: int, share: int, seed: int) -> NDArray[np.integer]:
    """Subspace clusters of one side: the best of several starts, each from experts far from each other."""
    generator = np.random.default_rng(seed)
    alone = _losses(
        side_EIs, [_subspaces(side_EIs[k : k + 1], np.zeros(1, int), 1, share)[0] for k in range(len(side_EIs))]
    )
    best: tuple[float, NDArray[np.integer]] | None = None
    for _ in range(RESTARTS):
        centres = [int(generator.integers(len(alone)))]
        while len(centres) < min(count, len(alone)):
            centres.append(int(alone[:, centres].min(1).argmax()))
        label_E = alone[:, centres].argmin(1)
        for _ in range(ROUNDS):
            losses = _losses(side_EIs, _subspaces(side_EIs, label_E, count, share))
            moved_E = losses.argmin(1)
            if (moved_E == label_E).all():
                break
            label_E = moved_E
        losses = _losses(side_EIs, _subspaces(side_EIs, label_E, count, share))
        total = float(losses[np.arange(len(losses)), label_E].sum())
        if best is None or total < best[0]:
            best = total, label_E
    assert best is not None
    return best[1]


def _assign(losses: list[NDArray[np.float64]], ideal: list[NDArray[np.integer]], shape: tuple[int, int]) -> Grid:
    """The cells of least total loss, one expert at most in each."""
    rows, columns = shape
    tie = TIE * float(np.mean(losses[0].mean() + losses[1].mean()))
    priced = [
        loss + tie * (np.arange(count) != ideal_E[:, None])
        for loss, ideal_E, count in zip(losses, ideal, shape, strict=True)
    ]
    cost_EC = (priced[0][:, :, None] + priced[1][:, None, :]).reshape(len(losses[0]), rows * columns)
    _, cell_E = linear_sum_assignment(cost_EC)
    return grid_of(cell_E, shape)


def grid_of(cell_E: NDArray[np.integer], shape: tuple[int, int]) -> Grid:
    """A grid from cell numbers m N + n."""
    row_E, column_E = np.divmod(cell_E, shape[1])
    return Grid(rows=shape[0], columns=shape[1], row_E=tuple(row_E.tolist()), column_E=tuple(column_E.tolist()))


def in_order(num_experts: int, shape: tuple[int, int]) -> Grid:
    """Expert after expert, row by row; where every expert has a row and column of its own, on the diagonal."""
    if shape == (num_experts, num_experts):
        return grid_of(np.arange(num_experts) * (num_experts + 1), shape)
    return grid_of(np.arange(num_experts), shape)


def at_random(num_experts: int, shape: tuple[int, int], seed: int = 0) -> Grid:
    """Any cells."""
    return grid_of(np.random.default_rng(seed).permutation(shape[0] * shape[1])[:num_experts], shape)


def swapped(a_EIO: Tensor, grid: Grid, rank: int, tries: int, seed: int = 0) -> Grid:
    """Swap two experts wherever that raises the energy that `rank` components capture.

    Args:
        a_EIO: the scaled blocks.
        grid: where they are.
        rank: of the factorization.
        tries: pairs to look at, chosen at random among those that share neither row nor column.
        seed: of the choice.
    """
    pairs = [
        (k, other)
        for k, other in itertools.combinations(range(len(a_EIO)), 2)
        if grid.row_E[k] != grid.row_E[other] or grid.column_E[k] != grid.column_E[other]
    ]
    if not tries or not pairs:
        return grid
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:tries]
    _, sigma_R, v_NOR = Blocks(a_EIO, grid).svd(rank, seed=seed)
    best = float(sigma_R.square().sum())
    for index in chosen:
        k, other = pairs[index]
        row, column = list(grid.row_E), list(grid.column_E)
        row[k], row[other], column[k], column[other] = row[other], row[k], column[other], column[k]
        tried = replace(grid, row_E=tuple(row), column_E=tuple(column))
        _, sigma_R, v_new = Blocks(a_EIO, tried).svd(rank, start=v_NOR)
        energy = float(sigma_R.square().sum())
        if energy > best * (1 + 1e-6):
            best, grid, v_NOR = energy, tried, v_new
    return grid


def literal(found: Sketch, shape: tuple[int, int], seed: int = 0) -> Grid:
    """The released code's placement: k-means of flattened singular vectors, greedy rings."""
    wished = [
        _flat_clusters(side, found.sigma_Es, count, seed)
        for side, count in zip((found.left_EIs, found.right_EOs), shape, strict=True)
    ]
    free = set(itertools.product(range(shape[0]), range(shape[1])))
    cell_E = np.zeros(len(wished[0]), dtype=np.int64)
    for k, (row, column) in enumerate(zip(*wished, strict=True)):
        # Distances wrap: the released code takes indices modulo the grid.
        nearest = min(sorted(free), key=lambda cell: _ring(cell[0] - row, shape[0]) + _ring(cell[1] - column, shape[1]))
        free.remove(nearest)
        cell_E[k] = nearest[0] * shape[1] + nearest[1]
    return grid_of(cell_E, shape)


def _ring(distance: int, size: int) -> int:
    return min(distance % size, -distance % size)


def _flat_clusters(side_EIs: Tensor, sigma_Es: Tensor, count: int, seed: int) -> list[int]:
    flat = (side_EIs / sigma_Es.unsqueeze(1).clamp(min=1e-30)).flatten(1).double().cpu().numpy()
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    best: tuple[float, NDArray[np.integer]] | None = None
    for restart in range(LITERAL_RESTARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cluster that stays empty is as good as any here
            centres, label_E = kmeans2(flat, count, minit="++", rng=np.random.default_rng((seed, restart)))
        inertia = float(np.square(flat - centres[label_E]).sum())
        if best is None or inertia < best[0]:
            best = inertia, label_E
    assert best is not None
    return [int(label) for label in best[1]]

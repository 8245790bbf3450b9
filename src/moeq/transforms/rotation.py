"""Permutation and block Walsh-Hadamard rotation of a residual's inputs (LoPRo, used by TileQ; notes, section 3).

D = P G is orthogonal: P sorts the inputs by rising importance, G leaves the first `plain` of them as they are and mixes
the others in blocks with a normalized Walsh-Hadamard matrix. A residual R is stored as R D, and met by inputs x D.

Legend: I inputs, N rows.
"""

import math

import torch
from torch import Tensor


def hadamard(x: Tensor, block: int) -> Tensor:
    """Normalized Walsh-Hadamard transform of the last dimension in blocks; its own inverse.

    Args:
        x: (..., I), I a multiple of `block`.
        block: a power of two.
    """
    shape = x.shape
    x = x.reshape(-1, block)
    half = 1
    while half < block:
        pairs = x.view(-1, block // (2 * half), 2, half)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        half *= 2
    return (x.reshape(shape)) / math.sqrt(block)


def _mixed(x: Tensor, block: int, plain: int) -> Tensor:
    if plain >= x.shape[-1]:
        return x
    return torch.cat([x[..., :plain], hadamard(x[..., plain:], block)], dim=-1)


def rotate(x: Tensor, order_I: Tensor, block: int, plain: int) -> Tensor:
    """x D, (..., I).

    Args:
        x: (..., I).
        order_I: the inputs by rising importance, int64.
        block: size of the mixed blocks, a power of two.
        plain: leading inputs that are not mixed; the rest is a multiple of `block`.
    """
    return _mixed(x.index_select(-1, order_I), block, plain)


def unrotate(y: Tensor, order_I: Tensor, block: int, plain: int) -> Tensor:
    """y D^T, the inverse of `rotate`."""
    return _mixed(y, block, plain).index_select(-1, torch.argsort(order_I))


def rotated_hessian(hessian_II: Tensor, order_I: Tensor, block: int, plain: int) -> Tensor:
    """D^T H D: the second moments of inputs that were rotated."""
    half_II = rotate(hessian_II, order_I, block, plain)
    return rotate(half_II.T, order_I, block, plain).T.contiguous()


def importance_order(mean_I: Tensor, moment_I: Tensor) -> Tensor:
    """The inputs by rising c_j / (log2 h_j - min log2 h + 1), int64 (notes, equation 6).

    Args:
        mean_I: c, the mean magnitude of the residual's columns.
        moment_I: h, second moments of the inputs; those that were never seen count as the smallest that were.
    """
    moment_I = moment_I.double()
    seen = moment_I > 0
    floor = float(moment_I[seen].min()) if bool(seen.any()) else 1.0
    log_I = moment_I.clamp(min=floor).log2()
    return torch.argsort(mean_I.double() / (log_I - log_I.min() + 1), stable=True)

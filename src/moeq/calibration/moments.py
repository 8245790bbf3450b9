"""Second moments of inputs, chunk by chunk: the Hessians of calibration.

Legend: S rows of a chunk, K input columns.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

STRIP: Final = 256
"""Rows of the sum that are multiplied out together, from the diagonal on."""


def second_moment(chunks: Iterable[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """Sum over the first rows of chunks of x x^T, (K, K) float32.

    Args:
        chunks: rows (S, K), at least one chunk, and how many of its rows count.
        device: where the sum is.
    """
    total: Tensor | None = None
    for chunk, count in chunks:
        total = add_rows(total, chunk[:count].to(device, torch.float32))
    assert total is not None
    return mirrored(total)


def add_rows(total_KK: Tensor | None, x_SK: Tensor) -> Tensor:
    """Add x^T x of float32 rows to a sum, in place; only the upper half is multiplied out. None begins one."""
    if total_KK is None:
        total_KK = x_SK.new_zeros(x_SK.shape[1], x_SK.shape[1])
    for start in range(0, len(total_KK), STRIP):
        total_KK[start : start + STRIP, start:].addmm_(x_SK[:, start : start + STRIP].T, x_SK[:, start:])
    return total_KK


def mirrored(total_KK: Tensor) -> Tensor:
    """A sum of `add_rows` with its lower half, in place."""
    for start in range(STRIP, len(total_KK), STRIP):
        total_KK[start:, start - STRIP : start] = total_KK[start - STRIP : start, start:].T
    return total_KK

"""How heavy the tail of a matrix's spectrum is: PL_Alpha_Hill on square tiles (AlphaQ, arXiv 2606.04980, section 3).

A Gaussian matrix has squared singular values that end at a hard edge; training pulls some of them far beyond it. Hill's
estimator turns the largest tenth of them into an exponent alpha: about 6.4 for tiles of pure noise, less the heavier
the tail. Spectra of oblong matrices end elsewhere than those of square ones, so a matrix is cut into square tiles, and
the squared singular values of all tiles form one sample.

alpha depends strongly on the share of the tail and on the size of the tiles: never mix two rules in one program.

Legend: N output rows, K input columns, T tiles, n side of a tile, S pooled squared singular values.
"""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

TILE: Final = 128
"""Side of a tile, and distance between tiles."""
TAIL: Final = 0.1
"""Share of the pooled values that counts as tail."""
MIN_TAIL: Final = 10
"""Values in the tail, at least."""
FLOOR: Final = 1e-12
"""Smallest threshold, relative to the largest value, and smallest sum of logarithms."""
TAILS: Final = ("decile", "middle")
"""Rules for the tail: the top tenth (AlphaQ), or the upper half counting its threshold ("xmin_mid" of FARMS)."""
_BATCH: Final = 64
"""Tiles decomposed at a time: 8 MB in float64, which stays in the caches' reach."""


def tiles(w_NK: Tensor, *, cap: int | None = None, rng: np.random.Generator | None = None) -> Tensor:
    """Cut a matrix into squares whose corners are multiples of `TILE`; ragged borders are dropped.

    Args:
        w_NK: weights, any float dtype.
        cap: at most this many tiles, drawn without replacement; None for all of them.
        rng: draws the tiles; needed if there are more than `cap`.

    Returns:
        (T, n, n) in the dtype of the weights; (1, N, K) when a side is shorter than `TILE`.
    """
    rows, columns = (size // TILE for size in w_NK.shape)
    if not rows or not columns:
        return w_NK.unsqueeze(0)
    w_RTCT = w_NK[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE)
    count = rows * columns
    if cap is None or count <= cap:
        return w_RTCT.transpose(1, 2).reshape(count, TILE, TILE)
    if rng is None:
        raise ValueError("drawing tiles needs a generator")
    drawn = torch.from_numpy(np.sort(rng.choice(count, size=cap, replace=False))).to(w_NK.device)
    return w_RTCT[drawn // columns, :, drawn % columns]


def squared_singular_values(w_Tnn: Tensor) -> Tensor:
    """The squared singular values of all tiles, float64, (S,), in no particular order.

    They are the eigenvalues of the smaller Gram matrix in float64: three quarters of the time of float32 singular
    values, and as exact where it matters (errors of 1e-16 of the tile's largest value, against 1e-14).

    Args:
        w_Tnn: finite weights, (T, rows, columns).
    """
    if w_Tnn.shape[1] > w_Tnn.shape[2]:
        w_Tnn = w_Tnn.mT
    parts = []
    for w_Bnn in w_Tnn.split(_BATCH):
        wide_Bnn = w_Bnn.double()
        parts.append(torch.linalg.eigvalsh(wide_Bnn @ wide_Bnn.mT).clamp_(min=0))
    return torch.cat(parts).flatten()


def hill(values_S: Tensor, tail: str = "decile") -> float:
    """The exponent of a power law fitted to the largest values (AlphaQ's PL_Alpha_Hill).

    alpha = 1 + k / sum_{i=1..k} ln(lambda_(S-i+1) / lambda_(S-k)) with k = max(10, floor(S / 10)), at most S - 1; for
    the "middle" rule the threshold is lambda_(floor(S/2)), counted from 0, and belongs to the tail itself. Published
    code floors the threshold at 1e-12; here the floor is relative to the largest value, so that the exponent never
    depends on the scale of the weights.

    Args:
        values_S: not negative, any order.
        tail: one of `TAILS`.

    Returns:
        alpha > 1; NaN if there are fewer than two values or all of them are zero.
    """
    count = values_S.numel()
    if count < 2:
        return math.nan
    if tail == "decile":
        k = min(max(MIN_TAIL, count // 10), count - 1)
        largest_k1 = torch.topk(values_S.double(), k + 1).values
    else:
        k = count - count // 2
        largest_k1 = torch.topk(values_S.double(), k).values
    top = float(largest_k1[0])
    if not top > 0:
        return math.nan
    # All values of the tail are at least the threshold: with it, they too are kept off zero.
    ratio_k1 = (largest_k1 / top).clamp_(min=FLOOR)
    logs = float((ratio_k1[:k] / ratio_k1[-1]).log_().sum())
    return 1 + k / max(logs, FLOOR)


def tail_exponent(
    w_NK: Tensor, *, tail: str = "decile", cap: int | None = None, rng: np.random.Generator | None = None
) -> float:
    """alpha of a matrix: `hill` of the pooled squared singular values of its `tiles`.

    The estimator's own relative deviation is about 0.8 % with 256 tiles and shrinks with their square root: at large
    gamma a cap costs bits (AlphaQ, section 5), so the default takes all tiles.

    Args:
        w_NK: finite weights.
        tail: one of `TAILS`.
        cap: tiles, at most.
        rng: draws the tiles.

    Returns:
        alpha > 1; NaN for vectors and for zeros.
    """
    if min(w_NK.shape) < 2:
        return math.nan
    return hill(squared_singular_values(tiles(w_NK, cap=cap, rng=rng)), tail)


def variance(w_NK: Tensor) -> float:
    """Population variance of all entries, the mean taken out (AlphaQ, section 3.5)."""
    return float(torch.var(w_NK.float(), correction=0))

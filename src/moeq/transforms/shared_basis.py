"""One basis of the hidden dimension for all experts of a layer (BitsMoE, section 2).

Gate and up matrices W_e (I, H) share the input side: the right singular vectors of all of them stacked are the
eigenvectors of sum_e W_e^T W_e. Down matrices (H, I) share the output side, the eigenvectors of sum_e W_e W_e^T. A
basis is kept as the rows of a matrix B (H, H), strongest direction first, and the components of an expert are what
gives it back, W_e = P_e^T B or B^T P_e, whatever B was rounded to: P_e comes from the inverse of the rounded B.

Legend: E experts, H hidden size, I expert width, N rows, K columns of a matrix.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from moeq.errors import TensorError

STRIP: Final = 512
"""Rows of a Gram matrix that are computed together, from the diagonal on."""
DAMP: Final = 1e-2
"""Damping of the inputs' second moments, in mean diagonals, where a basis is made for them."""


def add_gram(total_HH: Tensor, side_KH: Tensor) -> None:
    """Add side^T side to the upper half of `total_HH` (float64); products of one matrix are float32."""
    for start in range(0, len(total_HH), STRIP):
        product = side_KH[:, start : start + STRIP].T @ side_KH[:, start:]
        total_HH[start : start + STRIP, start:] += product


def gram(matrices: Iterable[Tensor], projection: str, hidden: int, device: torch.device) -> Tensor:
    """Sum over matrices of W^T W, or W W^T for "down", (H, H) float64; one matrix in memory at a time.

    Raises:
        TensorError: a weight is NaN or infinite.
    """
    total_HH = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
    for w_NK in matrices:
        side_KH = w_NK.T if projection == "down" else w_NK
        add_gram(total_HH, side_KH.to(device, torch.float32))
    if not bool(torch.isfinite(total_HH).all()):
        raise TensorError("the weights hold NaN or infinity", fix="repair the checkpoint, such weights have no basis")
    return total_HH.triu().add_(total_HH.triu(1).T)


def eigenbasis(gram_HH: Tensor) -> Tensor:
    """Eigenvectors in rows, the largest eigenvalue first, (H, H) float64.

    The sign of each is such that its largest entry is positive.
    """
    vectors_HH = torch.linalg.eigh(gram_HH).eigenvectors.flip(1).T.contiguous()
    largest = vectors_HH.gather(1, vectors_HH.abs().argmax(1, keepdim=True))
    return vectors_HH * largest.sign()


def weighted_basis(gram_HH: Tensor, moment_HH: Tensor) -> Tensor:
    """A basis for inputs that are not alike in all directions, (H, H) float64 (BitsMoE notes, section 12 c).

    With C = E[x x^T] its rows are V^T C^-1/2, V the eigenvectors of C^1/2 G C^1/2: components then meet inputs of
    unit second moment, and their energy is that of what they contribute to the layer's answers.

    Args:
        gram_HH: G, from `gram`.
        moment_HH: C, up to a factor, float64.
    """
    values_H, vectors_HH = torch.linalg.eigh(moment_HH)
    values_H = values_H.clamp_(min=0) + DAMP * values_H.mean().clamp(min=torch.finfo(values_H.dtype).tiny)
    root_HH = (vectors_HH * values_H.sqrt()) @ vectors_HH.T
    inverse_HH = (vectors_HH / values_H.sqrt()) @ vectors_HH.T
    return eigenbasis(root_HH @ gram_HH @ root_HH) @ inverse_HH


def inverse_of(basis_HH: Tensor) -> Tensor:
    """B^-1 in float32, for `components`.

    Raises:
        TensorError: the rounded basis is singular.
    """
    inverse_HH = torch.linalg.inv_ex(basis_HH.double()).inverse
    if not bool(torch.isfinite(inverse_HH).all()):
        raise TensorError("the rounded basis is singular", fix="use basis_bits=16, or the basis of the weights")
    return inverse_HH.float()


def components(w_NK: Tensor, inverse_HH: Tensor, projection: str) -> Tensor:
    """The components of one expert's matrix, (H, I) float32: row k multiplies direction k.

    Args:
        w_NK: (I, H) for gate and up, (H, I) for down.
        inverse_HH: of the basis, from `inverse_of`.
        projection: "gate", "up" or "down".
    """
    w_NK = w_NK.to(inverse_HH.device, torch.float32)
    # W = P^T B gives P = (W B^-1)^T; W = B^T P gives P = B^-T W.
    return inverse_HH.T @ (w_NK if projection == "down" else w_NK.T)

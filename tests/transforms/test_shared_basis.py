"""Bases give back every expert, whatever they were rounded to (BitsMoE notes, section 2)."""

import pytest
import torch
from torch import Tensor

from moeq.errors import TensorError
from moeq.transforms import shared_basis

HIDDEN, INNER, EXPERTS = 48, 20, 5


def matrices(projection: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (HIDDEN, INNER) if projection == "down" else (INNER, HIDDEN)
    return [torch.randn(shape, generator=generator) for _ in range(EXPERTS)]


def restored(p_HI: Tensor, basis_HH: Tensor, projection: str) -> Tensor:
    return basis_HH.T @ p_HI if projection == "down" else p_HI.T @ basis_HH


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_components_give_back_the_matrix(projection: str, noise: float) -> None:
    gram_HH = shared_basis.gram(matrices(projection), projection, HIDDEN, torch.device("cpu"))
    basis_HH = shared_basis.eigenbasis(gram_HH).float()
    basis_HH = basis_HH + noise * torch.randn(basis_HH.shape, generator=torch.Generator().manual_seed(2))
    inverse_HH = shared_basis.inverse_of(basis_HH)
    for w_NK in matrices(projection):
        p_HI = shared_basis.components(w_NK, inverse_HH, projection)
        error = (restored(p_HI, basis_HH, projection) - w_NK).norm() / w_NK.norm()
        assert p_HI.shape == (HIDDEN, INNER)
        assert error < 1e-4


@pytest.mark.parametrize("projection", ["gate", "down"])
def test_the_basis_is_that_of_the_stacked_matrices(projection: str) -> None:
    gram_HH = shared_basis.gram(matrices(projection), projection, HIDDEN, torch.device("cpu"))
    stacked = torch.cat([w.T if projection == "down" else w for w in matrices(projection)]).double()
    torch.testing.assert_close(gram_HH, stacked.T @ stacked, rtol=1e-5, atol=1e-4)
    basis_HH = shared_basis.eigenbasis(gram_HH)
    torch.testing.assert_close(basis_HH @ basis_HH.T, torch.eye(HIDDEN).double(), rtol=0, atol=1e-10)
    energy_H = (stacked @ basis_HH.T).square().sum(0)
    torch.testing.assert_close(energy_H.sqrt(), torch.linalg.svdvals(stacked), rtol=1e-4, atol=1e-4)


def test_errors_of_components_add_up_to_that_of_the_matrix() -> None:
    """Identity (b) of section 2: rows of the basis are orthonormal."""
    gram_HH = shared_basis.gram(matrices("gate"), "gate", HIDDEN, torch.device("cpu"))
    basis_HH = shared_basis.eigenbasis(gram_HH).float()
    p_HI = shared_basis.components(matrices("gate")[0], shared_basis.inverse_of(basis_HH), "gate")
    rounded_HI = (p_HI * 4).round() / 4
    lost = (restored(rounded_HI, basis_HH, "gate") - matrices("gate")[0]).square().sum()
    assert float(lost) == pytest.approx(float((rounded_HI - p_HI).square().sum()), rel=1e-4)


def test_a_basis_for_inputs_meets_inputs_of_unit_size() -> None:
    x_TH = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 5, HIDDEN)
    moment_HH = (x_TH.T @ x_TH / len(x_TH)).double()
    gram_HH = shared_basis.gram(matrices("gate"), "gate", HIDDEN, torch.device("cpu"))
    basis_HH = shared_basis.weighted_basis(gram_HH, moment_HH).float()
    seen_H = (x_TH @ basis_HH.T).square().mean(0)
    assert float(seen_H.max()) <= 1.0 + 1e-3
    assert float(seen_H.median()) > 0.8


def test_weights_that_are_not_finite_are_refused() -> None:
    bad = matrices("gate")
    bad[2][3, 4] = torch.nan
    with pytest.raises(TensorError, match="NaN"):
        shared_basis.gram(bad, "gate", HIDDEN, torch.device("cpu"))
    with pytest.raises(TensorError, match="singular"):
        shared_basis.inverse_of(torch.zeros(HIDDEN, HIDDEN))

"""The rotation of the residual is orthogonal and fast (TileQ notes, section 11, T3)."""

import pytest
import torch
from scipy.linalg import hadamard as matrix_of

from moeq.transforms import rotation


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_hadamard_is_sylvesters_matrix(block: int) -> None:
    x = torch.randn(3, 2 * block, generator=generator(0))
    matrix = torch.from_numpy(matrix_of(block)).float() / block**0.5
    expected = torch.cat([x[:, :block] @ matrix, x[:, block:] @ matrix], dim=1)
    torch.testing.assert_close(rotation.hadamard(x, block), expected)


@pytest.mark.parametrize(("inputs", "block", "plain"), [(96, 32, 32), (96, 32, 0), (64, 16, 64), (40, 8, 16)])
def test_rotation_is_orthogonal_and_leaves_errors_as_they_are(inputs: int, block: int, plain: int) -> None:
    order_I = torch.randperm(inputs, generator=generator(1))
    d_II = rotation.rotate(torch.eye(inputs), order_I, block, plain)
    torch.testing.assert_close(d_II.T @ d_II, torch.eye(inputs), rtol=0, atol=1e-6)
    r_NI = torch.randn(5, inputs, generator=generator(2))
    x_SI = torch.randn(200, inputs, generator=generator(3))
    rotated_NI = rotation.rotate(r_NI, order_I, block, plain)
    torch.testing.assert_close(rotated_NI, r_NI @ d_II)
    torch.testing.assert_close(rotation.unrotate(rotated_NI, order_I, block, plain), r_NI)
    torch.testing.assert_close(rotation.rotate(x_SI, order_I, block, plain) @ rotated_NI.T, x_SI @ r_NI.T)
    hessian_II = x_SI.T @ x_SI
    turned_II = rotation.rotated_hessian(hessian_II, order_I, block, plain)
    torch.testing.assert_close(turned_II, d_II.T @ hessian_II @ d_II, rtol=1e-4, atol=1e-3)
    before, after = (r_NI @ hessian_II @ r_NI.T).trace(), (rotated_NI @ turned_II @ rotated_NI.T).trace()
    torch.testing.assert_close(before, after, rtol=1e-5, atol=0)


def test_importance_rises_with_weights_and_falls_with_inputs() -> None:
    order = rotation.importance_order(torch.tensor([1.0, 3.0, 2.0]), torch.ones(3))
    assert order.tolist() == [0, 2, 1]
    # Inputs that are much larger come first; dead ones count as the smallest seen.
    order = rotation.importance_order(torch.ones(3), torch.tensor([1.0, 1024.0, 0.0]))
    assert order.tolist() == [1, 0, 2]
    assert rotation.importance_order(torch.ones(3), torch.zeros(3)).tolist() == [0, 1, 2]

import threading

import pytest
import torch

from moeq.errors import CalibrationError, OptionError, TensorError
from moeq.quantizers.hessian import FactorCache, check_inputs, factorize, inverse_root


def hessian(columns: int = 24, tokens: int = 100, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse() -> None:
    h = hessian()
    factor = factorize(h, damp=0.05)
    mean = h.diagonal().mean()
    damped = (h / mean + 0.05 * torch.eye(24)).double()
    torch.testing.assert_close(factor.upper_KK, factor.upper_KK.triu())
    torch.testing.assert_close(
        factor.upper_KK.double(), torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), rtol=1e-4, atol=1e-5
    )
    assert factor.damp == 0.05


def test_act_order_permutes_by_falling_diagonal() -> None:
    h = hessian()
    order = factorize(h, act_order=True).order_K
    assert order is not None
    assert bool((h.diagonal()[order].diff() <= 0).all())
    permuted = factorize(h[order][:, order])
    torch.testing.assert_close(factorize(h, act_order=True).upper_KK, permuted.upper_KK)


def test_damping_grows_until_a_singular_matrix_is_definite() -> None:
    h = hessian()
    h[0, 1] = h[1, 0] = 1.5 * float((h[0, 0] * h[1, 1]).sqrt())
    factor = factorize(h, damp=1e-3)
    assert factor.damp in (pytest.approx(0.1), pytest.approx(1.0))
    assert bool(torch.isfinite(factor.upper_KK).all())
    assert factorize(torch.ones(8, 8), damp=0.0).damp > 0


def test_dead_inputs_stand_alone() -> None:
    h = hessian()
    h[5] = h[:, 5] = 0
    factor = factorize(h)
    assert factor.dead_K.nonzero().flatten().tolist() == [5]
    row = factor.upper_KK[5].clone()
    row[5] = 0
    assert not row.any()
    assert not factor.upper_KK[:5, 5].any()
    assert float(factor.root_K[5]) == pytest.approx(0.1)
    assert factorize(h, damp=0.0).damp == 0


def test_scale_does_not_matter() -> None:
    h = hessian()
    for size in (1e-12, 1e12):
        torch.testing.assert_close(factorize(h * size).upper_KK, factorize(h).upper_KK, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (4, 2)])
def test_broken_hessians_are_refused(value: float, place: tuple[int, int]) -> None:
    h = hessian()
    h[place] = h[place[::-1]] = value
    with pytest.raises(CalibrationError):
        factorize(h)


def test_an_empty_hessian_has_no_factor() -> None:
    with pytest.raises(CalibrationError):
        factorize(torch.zeros(4, 4))


@pytest.mark.parametrize("inference", [False, True])
def test_the_cache_knows_the_same_hessian_until_it_changes(inference: bool) -> None:
    with torch.inference_mode(inference):
        cache = FactorCache(damp=0.01, act_order=False)
        h = hessian()
        device = torch.device("cpu")
        first = cache.get(h, device)
        assert cache.get(h, device) is first
        assert cache.get(h.clone(), device) is not first
        first = cache.get(h, device)
        x = torch.ones(1, 24)
        h += x.T @ x
        assert cache.get(h, device) is not first


def test_the_cache_is_each_threads_own() -> None:
    """Workers take turns at arbitrary moments: one must not push out what another is about to ask for again."""
    cache = FactorCache(damp=0.01, act_order=False)
    mine, device = hessian(), torch.device("cpu")
    first = cache.get(mine, device)
    thread = threading.Thread(target=lambda: cache.get(hessian(seed=1), device))
    thread.start()
    thread.join()
    assert cache.get(mine, device) is first


def test_the_cache_has_no_factor_without_tokens() -> None:
    cache = FactorCache(damp=0.01, act_order=False)
    assert cache.get(torch.zeros(4, 4), torch.device("cpu")) is None


@pytest.mark.parametrize("size", [1, 24, 256, 300, 600])
def test_the_inverse_root_in_strips_is_that_of_the_whole(size: int) -> None:
    matrix = hessian(size, 4 * size).double() / size + torch.eye(size)
    inverse = inverse_root(matrix)
    assert inverse is not None
    torch.testing.assert_close(inverse @ matrix @ inverse.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(inverse, inverse.tril())


@pytest.mark.parametrize("place", [0, 299, 599])
def test_indefinite_matrices_have_no_root(place: int) -> None:
    matrix = torch.eye(600)
    matrix[place, place] = -1
    assert inverse_root(matrix) is None


def test_missing_and_misfit_hessians_are_named() -> None:
    with pytest.raises(OptionError, match="gptq needs"):
        check_inputs(torch.eye(4), None, "gptq")
    with pytest.raises(TensorError, match="4 inputs"):
        check_inputs(torch.eye(4), torch.eye(3), "gptq")
    with pytest.raises(TensorError, match="cannot round"):
        check_inputs(torch.eye(4).long(), torch.eye(4), "gptq")

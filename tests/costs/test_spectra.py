import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moeq.costs import spectra


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("exponent", "expected"), [(2, 1.9998), (3, 2.9997), (4, 3.9995), (6, 5.9992)])
def test_hill_of_power_law_quantiles(exponent: int, expected: float) -> None:
    places = (torch.arange(1, 10_001, dtype=torch.float64) - 0.5) / 10_000
    values = (1 - places) ** (-1 / (exponent - 1))
    assert spectra.hill(values) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [(range(1, 101), 17.988), (range(1, 13), 1.8089), ([2.0**power for power in range(32)], 1.2623)],
)
def test_hill_of_few_values(values: list[float], expected: float) -> None:
    assert spectra.hill(torch.tensor(list(values), dtype=torch.float64)) == pytest.approx(expected, abs=5e-4)


def test_hill_by_its_formula_whatever_the_order() -> None:
    values = gaussian(1, 137).square().flatten().double()
    ordered = sorted(values.tolist())
    decile = 1 + 13 / sum(math.log(value / ordered[-14]) for value in ordered[-13:])
    assert spectra.hill(values) == pytest.approx(decile, rel=1e-12)
    middle = 1 + 69 / sum(math.log(value / ordered[68]) for value in ordered[68:])
    assert spectra.hill(values, "middle") == pytest.approx(middle, rel=1e-12)


def test_hill_of_two_values_takes_the_smaller_as_threshold() -> None:
    assert spectra.hill(torch.tensor([1.0, math.e])) == pytest.approx(2.0)


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0, 0.0]])
def test_hill_is_undefined_without_values(values: list[float]) -> None:
    assert math.isnan(spectra.hill(torch.tensor(values)))


def test_hill_floors_threshold_and_sum() -> None:
    one = torch.zeros(100, dtype=torch.float64)
    one[0] = 5e-9
    assert spectra.hill(one) == pytest.approx(1 + 10 / math.log(1e12))
    assert spectra.hill(torch.ones(100)) == pytest.approx(1 + 10 / 1e-12)


def test_squared_singular_values_are_those_of_svd() -> None:
    w = torch.stack([gaussian(30, 50, seed) for seed in range(3)])
    expected = torch.linalg.svdvals(w.double()).square().flatten().sort().values
    for each in (w, w.mT):
        values = spectra.squared_singular_values(each).sort().values
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)


def test_squared_singular_values_batch_by_batch() -> None:
    w = torch.randn(70, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([spectra.squared_singular_values(each.unsqueeze(0)) for each in w])
    torch.testing.assert_close(spectra.squared_singular_values(w), expected)


def test_tiles_lie_on_a_grid_and_drop_ragged_borders() -> None:
    w = torch.arange(300 * 400, dtype=torch.float32).view(300, 400)
    tiles = spectra.tiles(w)
    assert tiles.shape == (6, 128, 128)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, 3)
        assert torch.equal(tile, w[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128])


def test_capped_tiles_are_different_ones_of_the_grid() -> None:
    w = gaussian(512, 640)
    grid = {tile.numpy().tobytes() for tile in spectra.tiles(w)}
    drawn = spectra.tiles(w, cap=7, rng=np.random.default_rng(3))
    assert {tile.numpy().tobytes() for tile in drawn} < grid
    assert len({tile.numpy().tobytes() for tile in drawn}) == 7
    assert torch.equal(drawn, spectra.tiles(w, cap=7, rng=np.random.default_rng(3)))
    assert not torch.equal(drawn, spectra.tiles(w, cap=7, rng=np.random.default_rng(4)))
    assert len(spectra.tiles(w, cap=20)) == 20
    with pytest.raises(ValueError, match="generator"):
        spectra.tiles(w, cap=19)


@pytest.mark.parametrize("shape", [(127, 400), (400, 127), (3, 5)])
def test_matrices_smaller_than_a_tile_are_taken_whole(shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    assert spectra.tiles(w).shape == (1, *shape)
    expected = spectra.hill(torch.linalg.svdvals(w.double()).square())
    assert spectra.tail_exponent(w) == pytest.approx(expected, rel=1e-9)
    assert spectra.tail_exponent(w.T) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1)])
def test_vectors_have_no_exponent(shape: tuple[int, int]) -> None:
    assert math.isnan(spectra.tail_exponent(torch.ones(shape)))


def test_zeros_have_no_exponent() -> None:
    assert math.isnan(spectra.tail_exponent(torch.zeros(256, 128)))


def test_transposing_changes_nothing() -> None:
    w = gaussian(256, 384)
    assert spectra.tail_exponent(w.T) == pytest.approx(spectra.tail_exponent(w), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 2.0**20])
def test_scale_changes_nothing(scale: float) -> None:
    w = gaussian(128, 256)
    assert spectra.tail_exponent(w * scale) == pytest.approx(spectra.tail_exponent(w), rel=1e-5)


def test_noise_scores_6_4() -> None:
    assert spectra.tail_exponent(gaussian(2048, 2048)) == pytest.approx(6.39, abs=0.2)  # four standard deviations


def test_bfloat16_scores_like_float32() -> None:
    w = gaussian(512, 512)
    assert spectra.tail_exponent(w.bfloat16()) == pytest.approx(spectra.tail_exponent(w), rel=0.01)


@pytest.mark.parametrize(("freedom", "expected"), [(2.5, 3.3), (3.0, 4.2), (4.0, 5.6), (6.0, 6.2)])
def test_heavy_entries_lower_the_exponent(freedom: float, expected: float) -> None:
    entries = np.random.default_rng(0).standard_t(freedom, size=(1024, 1024))
    assert spectra.tail_exponent(torch.from_numpy(entries)) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(("strength", "expected"), [(0.05, 6.17), (0.1, 4.68), (0.2, 3.42), (0.4, 3.12)])
def test_low_rank_structure_lowers_the_exponent(strength: float, expected: float) -> None:
    w = gaussian(1024, 1024) + strength * gaussian(1024, 32, 1) @ gaussian(32, 1024, 2)
    assert spectra.tail_exponent(w) == pytest.approx(expected, abs=0.15)


def test_oblong_spectra_need_tiles() -> None:
    whole = spectra.hill(torch.linalg.svdvals(gaussian(256, 1024)).square())
    assert whole == pytest.approx(10.7, abs=0.8)
    assert spectra.tail_exponent(gaussian(256, 1024)) == pytest.approx(6.39, abs=0.5)


def test_middle_rule_scores_noise_2_1() -> None:
    assert spectra.tail_exponent(gaussian(1024, 1024), tail="middle") == pytest.approx(2.117, abs=0.03)


def test_all_tiles_estimate_more_closely_than_some() -> None:
    def spread(cap: int | None) -> float:
        rng = np.random.default_rng(0)
        return float(np.std([spectra.tail_exponent(gaussian(512, 512, seed), cap=cap, rng=rng) for seed in range(12)]))

    assert spread(None) < spread(2)


def test_variance_takes_out_the_mean() -> None:
    w = gaussian(64, 96).double().mul(0.02).add(5)
    assert spectra.variance(w) == pytest.approx(float(w.var(correction=0)), rel=1e-3)
    assert spectra.variance(torch.full((4, 4), 3.0)) == 0

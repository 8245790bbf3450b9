import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from costviews import CANDIDATES, gaussian, make_view
from torch import Tensor

from moeq.costs import spectra
from moeq.costs.base import LayerCosts, LayerView
from moeq.costs.spectral_tail import (
    SpectralTail,
    gamma_for_spread,
    paper_distortion,
    rearrange,
    rescore,
    tail_scores,
)
from moeq.costs.weight_error import WeightError
from moeq.errors import OptionError, TensorError
from moeq.spec import QuantSpec

THREE = (QuantSpec(bits=1), QuantSpec(bits=2), QuantSpec(bits=3))
FOUR = (*THREE, QuantSpec(bits=4))


def bumped(seed: int, strength: float, rows: int = 128, columns: int = 128) -> Tensor:
    low = gaussian(rows, 16, seed + 100) @ gaussian(16, columns, seed + 200)
    return 0.02 * (gaussian(rows, columns, seed) + strength * low)


def experts(count: int = 3, layer: int = 0) -> list[dict[str, Tensor]]:
    return [
        {
            name: bumped(30 * layer + 3 * expert + place, 0.1 * expert + 0.05 * place)
            for place, name in enumerate(("gate", "up", "down"))
        }
        for expert in range(count)
    ]


def measure(*views: LayerView, **options: Any) -> list[LayerCosts]:
    cost = SpectralTail(**options)
    for view in views:
        cost.visit(view, None)
    return cost.result()


def best_bits(costs_UC: np.ndarray, bits: tuple[int, ...], total: int) -> tuple[int, ...]:
    """The cheapest widths that add up to at most `total`, by trying all."""
    choices = itertools.product(range(len(bits)), repeat=len(costs_UC))
    fitting = (choice for choice in choices if sum(bits[column] for column in choice) <= total)
    best = min(fitting, key=lambda choice: sum(costs_UC[unit, column] for unit, column in enumerate(choice)))
    return tuple(bits[column] for column in best)


@pytest.mark.parametrize(("gamma", "expected"), [(0, (2, 2, 2)), (1, (2, 2, 2)), (5, (3, 2, 1)), (10, (3, 2, 1))])
@pytest.mark.parametrize("variance", [1.0, 3e-7])
def test_program_of_three_widths(gamma: float, expected: tuple[int, ...], variance: float) -> None:
    costs = rescore(np.array([4.0, 5, 6]), np.full(3, variance), paper_distortion(THREE), gamma=gamma)
    assert best_bits(costs, (1, 2, 3), 6) == expected


@pytest.mark.parametrize(("gamma", "expected"), [(1, (3, 2, 2)), (5, (3, 2, 2)), (10, (4, 2, 1))])
def test_program_of_four_widths(gamma: float, expected: tuple[int, ...]) -> None:
    costs = rescore(np.array([4.0, 5, 6]), np.ones(3), paper_distortion(FOUR), gamma=gamma)
    assert best_bits(costs, (1, 2, 3, 4), 7) == expected


def test_rescore_by_its_formula() -> None:
    alpha, variance, size = np.array([3.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 1.5])
    costs = rescore(alpha, variance, paper_distortion(THREE), gamma=7, size_U=size)
    for unit, column in itertools.product(range(3), range(3)):
        expected = (5 / alpha[unit]) ** 7 * variance[unit] * size[unit] * 4.0 ** -(column + 1)
        assert costs[unit, column] == pytest.approx(expected)


def test_the_median_decides_nothing() -> None:
    alpha = np.array([3.0, 4.0, 6.0, 6.2])
    costs = rescore(alpha, np.ones(4), paper_distortion(THREE), gamma=9)
    by_hand = (1.0 / alpha[:, np.newaxis]) ** 9 * paper_distortion(THREE)
    assert np.ptp(costs / by_hand) < 1e-6 * (costs / by_hand).max()


def test_units_without_an_exponent_score_one_and_leave_the_median_alone() -> None:
    for nothing in (math.nan, 0.0):
        scores = tail_scores(np.array([4.0, nothing, 5.0, 6.0, nothing]), 3)
        np.testing.assert_allclose(scores, [(5 / 4) ** 3, 1, 1, (5 / 6) ** 3, 1])
    np.testing.assert_array_equal(tail_scores(np.array([math.nan, 0.0]), 3), [1, 1])


def test_a_gamma_that_overflows_is_refused() -> None:
    with pytest.raises(OptionError, match="gamma"):
        tail_scores(np.array([1.1, 6.0, 6.0]), 1000)


def test_gamma_for_a_spread_gives_that_spread() -> None:
    alpha = np.array([3.2, 4.0, 5.5, 6.1, math.nan, 0.0])
    gamma = gamma_for_spread(alpha, 0.7)
    bits = gamma * np.log(5 / alpha[:4]) / math.log(4)
    assert bits.std() == pytest.approx(0.7)
    assert gamma_for_spread(alpha, 1.4) == pytest.approx(2 * gamma)
    assert gamma_for_spread(np.array([5.0, 5.0]), 0.7) == 0
    assert gamma_for_spread(np.array([math.nan]), 0.7) == 0


def test_rearranged_alphas_are_the_same_ones() -> None:
    alpha = np.array([5.0, 3.0, math.nan, 4.0, 6.0])
    np.testing.assert_array_equal(rearrange(alpha, "scores", 0), alpha)
    np.testing.assert_array_equal(rearrange(alpha, "reversed", 0), [4.0, 6.0, math.nan, 5.0, 3.0])
    assert np.isnan(rearrange(alpha, "none", 0)).all()
    many = np.append(np.arange(2.0, 30.0), math.nan)
    shuffled = rearrange(many, "shuffled", 1)
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(many))
    assert math.isnan(shuffled[-1])
    np.testing.assert_array_equal(shuffled, rearrange(many, "shuffled", 1))
    assert (shuffled[:-1] != rearrange(many, "shuffled", 2)[:-1]).any()
    assert (shuffled[:-1] != many[:-1]).any()


def test_costs_are_score_times_variance_times_noise() -> None:
    weights = [experts(), experts(layer=1)]
    results = measure(*(make_view(each, index=index) for index, each in enumerate(weights)), gamma=8)
    matrices = [w for layer in weights for expert in layer for w in expert.values()]
    alpha = np.array([spectra.tail_exponent(w) for w in matrices])
    expected = (np.median(alpha) / alpha) ** 8 * np.array([float(w.var(correction=0)) for w in matrices])
    costs = np.concatenate([each.costs_UC for each in results])
    np.testing.assert_allclose(costs, expected[:, None] * [[1 / 4, 1 / 16, 1 / 64, 1 / 256]], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([each.statistics["alpha"] for each in results]), alpha)


def test_statistics_give_the_costs_of_another_gamma() -> None:
    for unit, noise in itertools.product(("matrix", "expert"), ("paper", "weights")):
        view = make_view(experts(), unit=unit)
        (old,) = measure(view, gamma=3, noise=noise)
        (new,) = measure(view, gamma=11, noise=noise)
        known = old.statistics
        scores = tail_scores(known["alpha"], 11)
        np.testing.assert_allclose(old.costs_UC * (scores / known["score"])[:, None], new.costs_UC, rtol=1e-9)
        if noise == "paper":
            again = rescore(
                known["alpha"], known["variance"], paper_distortion(CANDIDATES), gamma=11, size_U=known["size"]
            )
            np.testing.assert_allclose(again, new.costs_UC, rtol=1e-9)


def test_gamma_is_set_by_the_spread_unless_given() -> None:
    view = make_view(experts())
    (measured,) = measure(view, spread=0.5)
    assert (np.log(measured.statistics["score"]) / math.log(4)).std() == pytest.approx(0.5)
    (plain,) = measure(view, gamma=0)
    np.testing.assert_array_equal(plain.statistics["score"], np.ones(9))
    (none,) = measure(view, alpha="none")
    np.testing.assert_array_equal(none.costs_UC, plain.costs_UC)


def test_experts_have_the_mean_exponent_and_all_the_noise() -> None:
    weights = experts()
    (matrices,) = measure(make_view(weights), gamma=8)
    (whole,) = measure(make_view(weights, unit="expert"), gamma=8)
    alpha = matrices.statistics["alpha"].reshape(3, 3).mean(1)
    np.testing.assert_allclose(whole.statistics["alpha"], alpha)
    noise = (matrices.costs_UC / matrices.statistics["score"][:, None]).reshape(3, 3, 4).sum(1)
    np.testing.assert_allclose(whole.costs_UC, (np.median(alpha) / alpha)[:, None] ** 8 * noise)
    np.testing.assert_allclose(whole.statistics["size"], 3)


def test_larger_matrices_count_by_their_weights() -> None:
    weights = [{"up": gaussian(128, 128), "down": torch.cat([gaussian(128, 128)] * 3)}]
    (measured,) = measure(make_view(weights), gamma=0)
    np.testing.assert_allclose(measured.statistics["size"], [0.5, 1.5])
    np.testing.assert_allclose(measured.costs_UC[1], 3 * measured.costs_UC[0], rtol=1e-5)


def test_scaling_all_weights_scales_all_costs() -> None:
    weights = experts()
    (small,) = measure(make_view(weights), gamma=20)
    (large,) = measure(make_view([{name: 8 * w for name, w in each.items()} for each in weights]), gamma=20)
    np.testing.assert_allclose(large.costs_UC, 64 * small.costs_UC, rtol=1e-5)
    np.testing.assert_allclose(large.statistics["score"], small.statistics["score"], rtol=1e-6)


def test_alpha_only_forgets_the_variance() -> None:
    scales = (1, 5, 9)
    weights = [{"up": scale * w, "down": w} for scale in scales for w in [bumped(scale, 0.1)]]
    for unit in ("matrix", "expert"):
        (measured,) = measure(make_view(weights, unit=unit), gamma=0, variance=False)
        np.testing.assert_allclose(measured.costs_UC / measured.costs_UC[0], 1, rtol=1e-12)
        assert np.ptp(measured.statistics["variance"]) > 0


def test_measured_noise_is_that_of_the_quantizer() -> None:
    weights = [{"up": gaussian(128, 512) * 0.02, "down": gaussian(512, 128, 1) * 0.02}]
    (expected,) = measure(make_view(weights), gamma=0, noise="measured", quantizer="minmax")
    (real,) = measure(make_view(weights), gamma=0, noise="weights", quantizer="minmax")
    (paper,) = measure(make_view(weights), gamma=0)
    np.testing.assert_allclose(expected.costs_UC, real.costs_UC, rtol=0.03)
    assert (np.abs(paper.costs_UC / real.costs_UC - 1) > 0.2).any()


def test_noise_of_the_weights_is_their_rounding_error() -> None:
    weights = [{"up": bumped(0, 0.3), "down": torch.full((128, 128), 0.3)}]
    cost = WeightError()
    for unit in ("matrix", "expert"):
        view = make_view(weights, unit=unit)
        (real,) = measure(view, gamma=0, noise="weights")
        cost.visit(view, None)
        (errors,) = cost.result()
        np.testing.assert_allclose(real.costs_UC, errors.costs_UC / 128**2, rtol=1e-6, atol=1e-15)


def test_matrices_without_an_exponent_are_noted() -> None:
    weights = [
        {"up": torch.zeros(128, 128), "down": bumped(0, 0.1)},
        {"up": bumped(1, 0.2), "down": bumped(2, 0.3)},
    ]
    for noise in ("paper", "measured", "weights"):
        (matrices,) = measure(make_view(weights), gamma=5, noise=noise)
        np.testing.assert_array_equal(matrices.statistics["scored"], [0, 1, 1, 1])
        assert matrices.statistics["alpha"][0] == 0
        assert matrices.statistics["score"][0] == 1
        assert (matrices.costs_UC[0] == 0).all()
        (whole,) = measure(make_view(weights, unit="expert"), gamma=5, noise=noise)
        np.testing.assert_array_equal(whole.statistics["scored"], [0.5, 1])
        assert whole.statistics["alpha"][0] == pytest.approx(matrices.statistics["alpha"][1])
        assert np.isfinite(whole.costs_UC).all()
        assert np.isfinite(matrices.costs_UC).all()


def test_vectors_cost_their_noise() -> None:
    weights = [{"up": gaussian(1, 64), "down": gaussian(64, 1)}]
    for options in ({}, {"noise": "weights"}, {"variance": False}):
        (measured,) = measure(make_view(weights), **options)
        assert np.isfinite(measured.costs_UC).all()
        assert (measured.costs_UC >= 0).all()
        np.testing.assert_array_equal(measured.statistics["scored"], 0)


def test_drawn_windows_depend_on_the_seed_only() -> None:
    weights = [{"up": bumped(0, 0.1, 512, 512), "down": bumped(1, 0.1, 512, 512)}]
    view = make_view(weights, index=3)
    (first,) = measure(view, windows=3, seed=1)
    (again,) = measure(view, windows=3, seed=1)
    (other,) = measure(view, windows=3, seed=2)
    np.testing.assert_array_equal(first.statistics["alpha"], again.statistics["alpha"])
    assert (first.statistics["alpha"] != other.statistics["alpha"]).all()
    (whole,) = measure(view, windows=16)
    (unlimited,) = measure(view)
    np.testing.assert_array_equal(whole.statistics["alpha"], unlimited.statistics["alpha"])


def test_falsifiers_keep_the_alphas_and_move_the_scores() -> None:
    view = make_view(experts())
    (plain,) = measure(view, gamma=8)
    (turned,) = measure(view, gamma=8, alpha="reversed")
    np.testing.assert_array_equal(turned.statistics["alpha"], plain.statistics["alpha"])
    np.testing.assert_allclose(np.sort(turned.statistics["score"]), np.sort(plain.statistics["score"]))
    ranks = [np.argsort(np.argsort(each.statistics["score"])) for each in (plain, turned)]
    np.testing.assert_array_equal(ranks[0] + ranks[1], 8)
    (shuffled,) = measure(view, gamma=8, alpha="shuffled", seed=5)
    np.testing.assert_allclose(np.sort(shuffled.statistics["score"]), np.sort(plain.statistics["score"]))
    assert (shuffled.statistics["score"] != plain.statistics["score"]).any()


def test_layers_come_by_index_whatever_the_order_of_visits() -> None:
    views = [make_view(experts(2), index=0), make_view(experts(1, layer=1), index=1)]
    forward, backward = measure(*views, gamma=4), measure(*reversed(views), gamma=4)
    assert [len(each.costs_UC) for each in backward] == [6, 3]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one.costs_UC, other.costs_UC)
    assert SpectralTail().result() == []


def test_the_middle_rule_gives_smaller_exponents() -> None:
    view = make_view(experts())
    (decile,), (middle,) = measure(view), measure(view, tail="middle")
    assert (middle.statistics["alpha"] < decile.statistics["alpha"]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weights = experts()
    weights[2]["gate"][5, 7] = bad
    with pytest.raises(TensorError, match="gate weights of expert 2") as caught:
        SpectralTail().visit(make_view(weights, index=1), None)
    assert caught.value.tensor == "model.layers.1.mlp.experts.2.gate.weight"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gamma", -1.0),
        ("gamma", math.nan),
        ("gamma", math.inf),
        ("gamma", "much"),
        ("gamma", True),
        ("spread", -0.1),
        ("spread", "auto"),
        ("windows", 0),
        ("windows", 2.5),
        ("seed", -1),
        ("variance", "no"),
        ("tail", "half"),
        ("noise", "none"),
        ("alpha", "random"),
        ("quantizer", "gptq"),
        ("quantizer", "unheard"),
    ],
)
def test_options_that_cannot_be_used(option: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        SpectralTail(**{option: value})
    assert caught.value.option == option


def test_threads_change_nothing() -> None:
    view = make_view(experts())
    (alone,) = measure(view, windows=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (together,) = measure(view, windows=2)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(alone.costs_UC, together.costs_UC, rtol=1e-12)

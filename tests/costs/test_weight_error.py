import math

import numpy as np
import pytest
import torch
from costviews import CANDIDATES, gaussian, make_view
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeq.costs.base import LayerCosts, LayerView
from moeq.costs.matrices import dataless_quantizer, each_matrix, gaussian_error, rounding_error
from moeq.costs.weight_error import WeightError
from moeq.errors import OptionError, TensorError
from moeq.format.records import dequantize
from moeq.quantizers.registry import make_quantizer
from moeq.spec import WHOLE_ROW, QuantSpec


def experts(count: int = 2) -> list[dict[str, Tensor]]:
    return [
        {name: gaussian(48, 64, 3 * expert + place) * (1 + expert) for place, name in enumerate(("gate", "up", "down"))}
        for expert in range(count)
    ]


def measure(cost: WeightError, *views: LayerView) -> list[LayerCosts]:
    for view in views:
        cost.visit(view, None)
    return cost.result()


def test_costs_are_what_the_quantizer_loses() -> None:
    weights = experts()
    (measured,) = measure(WeightError(quantizer="hqq"), make_view(weights))
    quantizer = make_quantizer("hqq")
    for unit, w in enumerate(w for expert in weights for w in (expert["gate"], expert["up"], expert["down"])):
        for column, spec in enumerate(CANDIDATES):
            q = quantizer.quantize(w, spec, None)
            error = (dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec) - w).double().square().sum()
            assert measured.costs_UC[unit, column] == pytest.approx(float(error), rel=1e-6)
        assert measured.statistics["energy"][unit] == pytest.approx(float(w.double().square().sum()))


def test_an_expert_costs_what_its_matrices_cost() -> None:
    weights = experts(3)
    (matrices,) = measure(WeightError(), make_view(weights))
    (whole,) = measure(WeightError(), make_view(weights, unit="expert"))
    np.testing.assert_allclose(whole.costs_UC, matrices.costs_UC.reshape(3, 3, 4).sum(1))
    (relative,) = measure(WeightError(relative=True), make_view(weights, unit="expert"))
    np.testing.assert_allclose(relative.costs_UC, whole.costs_UC / whole.statistics["energy"][:, None])


def test_relative_errors_do_not_depend_on_the_scale() -> None:
    (measured,) = measure(WeightError(relative=True), make_view([{"up": w, "down": w * 64} for w in [gaussian(8, 64)]]))
    np.testing.assert_allclose(measured.costs_UC[0], measured.costs_UC[1], rtol=1e-5)
    assert (measured.costs_UC < 1).all()
    assert (np.diff(measured.costs_UC) < 0).all()


def test_zeros_cost_nothing() -> None:
    weights = [{"up": torch.zeros(8, 64), "down": gaussian(8, 64)}]
    for relative in (False, True):
        (measured,) = measure(WeightError(relative=relative), make_view(weights))
        assert (measured.costs_UC[0] == 0).all()
        assert (measured.costs_UC[1] > 0).all()


def test_layers_come_by_index_whatever_the_order_of_visits() -> None:
    first, second = make_view(experts(1), index=0), make_view(experts(2), index=1)
    results = measure(WeightError(), second, first)
    assert [len(each.costs_UC) for each in results] == [3, 6]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weights = experts()
    weights[1]["down"][5, 7] = bad
    with pytest.raises(TensorError, match="down weights of expert 1") as caught:
        WeightError().visit(make_view(weights, index=4), None)
    assert caught.value.tensor == "model.layers.4.mlp.experts.1.down.weight"


@pytest.mark.parametrize("name", ["gptq", "gptq-mc"])
def test_quantizers_that_need_data_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="minmax, rtn, hqq"):
        WeightError(quantizer=name)


def test_threads_change_nothing() -> None:
    view = make_view(experts(4))
    (alone,) = measure(WeightError(), view)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        (together,) = measure(WeightError(), view)
        assert torch.get_num_threads() == 3
        order = each_matrix(view, lambda expert, projection, _: (expert, projection, torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(alone.costs_UC, together.costs_UC)
    assert order == [(expert, name, 1) for expert in range(4) for name in ("gate", "up", "down")]


def test_errors_in_threads_reach_the_caller() -> None:
    weights = experts(4)
    weights[3]["up"][0, 0] = math.nan
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(TensorError, match="expert 3"):
            WeightError().visit(make_view(weights), None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_are_rounded_in_parts_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    w, spec = gaussian(50, 96), QuantSpec(bits=3, group_size=64)
    whole = rounding_error(w, dataless_quantizer("rtn"), spec)
    monkeypatch.setattr("moeq.costs.matrices._ROUNDED", 7 * 96)
    assert rounding_error(w, dataless_quantizer("rtn"), spec) == pytest.approx(whole, rel=1e-6)


def test_gaussian_errors_are_known() -> None:
    minmax = dataless_quantizer("minmax")
    assert gaussian_error(minmax, QuantSpec(bits=2), 512) == pytest.approx(0.252, rel=0.03)
    assert gaussian_error(minmax, QuantSpec(bits=4), 512) == pytest.approx(0.0100, rel=0.03)
    row = gaussian_error(minmax, QuantSpec(bits=4, group_size=WHOLE_ROW), 128)
    assert row == gaussian_error(minmax, QuantSpec(bits=4), 512)
    assert gaussian_error(minmax, QuantSpec(bits=4, group_size=WHOLE_ROW), 512) > row


@settings(max_examples=20)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    bits=st.sampled_from((1, 2, 3, 4, 8)),
    group_size=st.sampled_from((32, 128, WHOLE_ROW)),
    scale=st.sampled_from((1e-6, 0.02, 1e3)),
)
def test_any_shape_has_finite_costs(rows: int, columns: int, bits: int, group_size: int, scale: float) -> None:
    weights = [{"up": gaussian(rows, columns) * scale, "down": gaussian(columns, rows) * scale}]
    spec = QuantSpec(bits=bits, group_size=group_size)
    (measured,) = measure(WeightError(), make_view(weights, candidates=(spec,)))
    assert np.isfinite(measured.costs_UC).all()
    assert (measured.costs_UC >= 0).all()

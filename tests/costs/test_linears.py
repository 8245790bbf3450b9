"""Costs of linears outside the experts: their formulas, and that they compare with those of experts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from expert_toy import make_toy, stacked_view
from torch import Tensor

from moeq.arch import hooks
from moeq.costs.base import Heard, LinearView
from moeq.costs.fisher import Fisher
from moeq.costs.linears import FisherLinears, WeightErrorLinears, make_linear_cost
from moeq.costs.weight_error import WeightError
from moeq.errors import CalibrationError, OptionError
from moeq.format.records import dequantize
from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec

SPECS = tuple(QuantSpec(bits=bits, group_size=32) for bits in (4, 6, 8))
RTN = make_quantizer("rtn", gain=True)
ROWS, COLUMNS, TOKENS = 24, 40, 50


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W_NK, HEARD = rand(ROWS, COLUMNS), Heard(x_TK=rand(TOKENS, COLUMNS, seed=1), grad_TN=rand(TOKENS, ROWS, seed=2) * 1e-3)


def view(w_NK: Tensor = W_NK, path: str = "a.q", block: str = "a") -> LinearView:
    return LinearView(path=path, block=block, read=lambda: w_NK, candidates=SPECS, device=torch.device("cpu"))


def rounded(w_NK: Tensor, spec: QuantSpec) -> Tensor:
    found = RTN.quantize(w_NK, spec, None)
    return dequantize(found.codes_NK, found.scale_NG, found.zero_NG, spec).double()


def measure(*calls: Heard, tokens: int = TOKENS, **options: Any) -> tuple[float, ...]:
    cost = FisherLinears(RTN, **options)
    for heard in calls or (HEARD,):
        cost.visit(view(), heard)
    return cost.result(tokens)["a.q"]


def part(tokens: slice, scale: float = 1.0) -> Heard:
    return Heard(x_TK=HEARD.x_TK[tokens], grad_TN=HEARD.grad_TN[tokens] * scale)


@pytest.mark.parametrize("seqlen", [None, 10])
def test_formulas(seqlen: int | None) -> None:
    unit = 1 / TOKENS if seqlen is None else (seqlen - 1) ** 2 / (TOKENS * (seqlen - 1) / seqlen)
    diagonal, full = (measure(form=form, seqlen=seqlen) for form in ("diagonal", "full"))
    for column, spec in enumerate(SPECS):
        product_TN = HEARD.grad_TN * (HEARD.x_TK @ (rounded(W_NK, spec) - W_NK).T)
        assert diagonal[column] == pytest.approx(float(product_TN.square().sum()) / 2 * unit, rel=1e-6)
        assert full[column] == pytest.approx(float(product_TN.sum(1).square().sum()) / 2 * unit, rel=1e-6)
    assert diagonal[0] > diagonal[1] > diagonal[2] > 0


@pytest.mark.parametrize("options", [{}, {"form": "full"}, {"seqlen": 10, "linear": True}])
def test_calls_and_batches_add_up(options: dict[str, Any]) -> None:
    whole = measure(**options)
    np.testing.assert_allclose(measure(part(slice(0, 30)), part(slice(30, None)), **options), whole, rtol=1e-9)
    if "linear" not in options:  # a linear that every token passes twice costs what both calls cost
        np.testing.assert_allclose(measure(HEARD, HEARD, **options), 2 * np.array(whole), rtol=1e-9)


def test_blocks_may_come_again() -> None:
    cost = FisherLinears(RTN)
    cost.visit(view(), part(slice(0, 30)))
    cost.visit(view(rand(ROWS, COLUMNS, seed=5), path="b.q", block="b"), HEARD)
    cost.visit(view(), part(slice(30, None)))
    found = cost.result(TOKENS)
    np.testing.assert_allclose(found["a.q"], measure(), rtol=1e-9)
    assert found["b.q"] != found["a.q"]


def test_tiny_gradients_do_not_underflow_and_infinite_costs_are_refused() -> None:
    tiny = Heard(x_TK=HEARD.x_TK.float(), grad_TN=HEARD.grad_TN.float() * 1e-24)
    np.testing.assert_allclose(measure(tiny), 1e-48 * np.array(measure()), rtol=1e-3)
    with pytest.raises(CalibrationError, match=r"a\.q"):
        measure(Heard(x_TK=HEARD.x_TK * 1e200, grad_TN=HEARD.grad_TN))
    assert measure(part(slice(0, 0))) == (0.0, 0.0, 0.0)


def test_the_linear_term_is_that_of_experts() -> None:
    """Tokens that all lose by a rounding make it cost its first-order term too; nothing falls below zero."""
    change_NK = rounded(W_NK, SPECS[0]) - W_NK
    against = Heard(x_TK=HEARD.x_TK, grad_TN=(HEARD.x_TK @ change_NK.T) * 1e-6)
    worse = measure(against, seqlen=10, linear=True)[0]
    first_order = 10 / TOKENS * float((against.grad_TN * (against.x_TK @ change_NK.T)).sum())
    assert worse == pytest.approx(first_order, rel=0.1)
    assert measure(replace(against, grad_TN=-against.grad_TN), seqlen=10, linear=True)[0] == 0


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_one_matrix_costs_the_same_as_a_linear_and_as_an_experts_last(form: str) -> None:
    """The down projection of an expert that sees every token with weight 1 is a linear."""
    toy = make_toy("qwen3_moe", TOKENS)
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    asked = replace(toy.asked, index_Tk=torch.zeros(TOKENS, 1, dtype=torch.int64), weights_Tk=ones)
    experts = Fisher(perturb="rtn", gain=True, floor=0, form=form, seqlen=10)
    experts.visit(toy.view("matrix", SPECS), asked)
    (layer,) = experts.result()
    gate_NK, up_NK, down_NK = (stacked_view(toy.experts, toy.layer, 0, name) for name in ("gate", "up", "down"))
    with torch.no_grad():
        inner_TK = hooks.activation(toy.experts, 0, asked.x_TH @ gate_NK.T, asked.x_TH @ up_NK.T)
    assert asked.grad_TH is not None
    linears = FisherLinears(RTN, form=form, seqlen=10)
    linears.visit(view(down_NK.detach()), Heard(x_TK=inner_TK, grad_TN=asked.grad_TH))
    np.testing.assert_allclose(linears.result(TOKENS)["a.q"], layer.costs_UC[2], rtol=1e-9)
    for relative in (False, True):
        experts_too, linears_too = (
            WeightError(relative=relative),
            WeightErrorLinears(make_quantizer("rtn"), relative=relative),
        )
        experts_too.visit(toy.view("matrix", SPECS), None)
        linears_too.visit(view(down_NK.detach()), None)
        np.testing.assert_allclose(linears_too.result(0)["a.q"], experts_too.result()[0].costs_UC[2], rtol=1e-12)


@pytest.mark.parametrize("name", ["output-error", "spectral-tail"])
def test_costs_that_do_not_compare_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="fisher, weight-error") as caught:
        make_linear_cost(name, RTN)
    assert caught.value.option == "dense-bits"
    assert make_linear_cost("fisher", RTN, form="full", perturb="gptq", floor=3).needs == "gradients"

"""GEMQ's cost: equal to the paper's slow computation, in both forms, and what is added to it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from expert_toy import FAMILIES, SPECS, UNROUTED, Toy, make_toy
from torch import Tensor

from moeq.artifacts import Inventory
from moeq.costs.base import Asked, LayerCosts
from moeq.costs.fisher import Fisher
from moeq.costs.paper_rtn import paper_rtn
from moeq.errors import CalibrationError, OptionError

TOKENS = 60


def measure(toy: Toy, *batches: Asked, unit: str = "expert", **options: Any) -> LayerCosts:
    cost = Fisher(**{"perturb": "paper", "floor": 0, **options})
    for asked in batches or (toy.asked,):
        cost.visit(toy.view(unit), asked)
    (layer,) = cost.result()
    return layer


def change(toy: Toy, expert: int, column: int) -> Tensor:
    """The layer's output with an expert rounded, less the output: the family's own forward of all tokens."""
    spec = SPECS[column]
    view, before = toy.view(), toy.forward()
    rounded = {name: paper_rtn(view.read(expert, name), spec.bits, spec.group_size) for name in toy.layer.projections}
    with toy.replaced(expert, rounded):
        return toy.forward() - before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_rerunning_the_whole_layer(family: str, dtype: torch.dtype) -> None:
    """GEMQ section 2.2 (all tokens, one expert rounded) against 2.3 (its routed tokens)."""
    toy = make_toy(family, TOKENS, dtype)
    diagonal, full = (measure(toy, form=form).costs_UC for form in ("diagonal", "full"))
    g_TH = toy.asked.grad_TH
    # One float32 rerun rounds at the size of the output, not of its change.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for expert in range(toy.layer.num_experts):
        for column in range(len(SPECS)):
            product_TH = (g_TH * change(toy, expert, column)).double()
            wanted = float(product_TH.square().sum()) / 2 / TOKENS
            assert diagonal[expert, column] == pytest.approx(wanted, rel=tolerance, abs=0)
            wanted = float(product_TH.sum(1).square().sum()) / 2 / TOKENS
            assert full[expert, column] == pytest.approx(wanted, rel=10 * tolerance, abs=0)
            assert (wanted == 0) == (expert == UNROUTED)


def test_scales_with_squared_weights_and_gradients() -> None:
    toy = make_toy()
    costs_UC = measure(toy).costs_UC
    np.testing.assert_allclose(measure(toy, toy.scaled(weights=3)).costs_UC, 9 * costs_UC, rtol=1e-12)
    np.testing.assert_allclose(measure(toy, toy.scaled(grad=0.1)).costs_UC, 0.01 * costs_UC, rtol=1e-12)


def test_tiny_gradients_do_not_underflow() -> None:
    toy = make_toy(dtype=torch.float32)
    costs_UC = measure(toy).costs_UC
    assert toy.asked.grad_TH is not None
    tiny = replace(toy.asked, grad_TH=toy.asked.grad_TH * 1e-24)
    np.testing.assert_allclose(measure(toy, tiny).costs_UC, 1e-48 * costs_UC, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"form": "full"}, {"seqlen": 20}, {"floor": 8}])
def test_batches_add_up(options: dict[str, Any]) -> None:
    toy = make_toy()
    whole = measure(toy, unit="matrix", **options)
    parts = measure(toy, toy.part(slice(0, 40)), toy.part(slice(40, None)), unit="matrix", **options)
    np.testing.assert_allclose(parts.costs_UC, whole.costs_UC, rtol=1e-12)
    for name, values in whole.statistics.items():
        np.testing.assert_allclose(parts.statistics[name], values, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_in_the_order_of_the_inventory(family: str) -> None:
    toy = make_toy(family)
    inventory = Inventory(
        model_type="",
        architecture="",
        model_hash="",
        layers=(toy.layer,),
        dense=(),
        source_bytes=0,
        parameters=0,
        element_bytes=2,
    )
    before = toy.forward()
    costs_UC = measure(toy, unit="matrix").costs_UC
    units = [unit for unit, _ in inventory.cost_units("matrix")]
    assert len(units) == len(costs_UC)
    for unit, row in zip(units, costs_UC, strict=True):
        rounded = paper_rtn(toy.view().read(unit.expert, unit.projection), 2, 32)
        with toy.replaced(unit.expert, {unit.projection: rounded}):
            product_TH = toy.asked.grad_TH * (toy.forward() - before)
        assert row[1] == pytest.approx(float(product_TH.square().sum()) / 2 / TOKENS, rel=1e-9, abs=0)
    assert len(measure(toy).costs_UC) == len(list(inventory.cost_units("expert")))


def test_statistics() -> None:
    toy = make_toy()
    statistics = measure(toy, unit="matrix").statistics
    for expert in range(toy.layer.num_experts):
        chosen_Tk = toy.asked.index_Tk == expert
        rows = slice(3 * expert, 3 * expert + 3)
        assert statistics["tokens"][rows].tolist() == [int(chosen_Tk.sum())] * 3
        assert statistics["weight_sum"][rows] == pytest.approx([float(toy.asked.weights_Tk[chosen_Tk].sum())] * 3)
        wanted = float(toy.asked.grad_TH[chosen_Tk.any(1)].square().mean()) if expert != UNROUTED else 0
        assert statistics["gradient"][rows] == pytest.approx([wanted] * 3)


def test_units_of_seqlen() -> None:
    """Gradients of a mean over P tokens are P times smaller; the cost in nats per predicted token knows it."""
    toy = make_toy()
    plain = measure(toy)
    known = measure(toy, toy.scaled(grad=1 / 19), seqlen=20)
    np.testing.assert_allclose(known.costs_UC, plain.costs_UC * 20 / 19, rtol=1e-12)
    np.testing.assert_allclose(known.statistics["gradient"], plain.statistics["gradient"], rtol=1e-12)


def test_predicts_the_rise_of_a_quadratic_loss() -> None:
    """Sequences of P + 1 tokens whose summed loss is 1/2 (c.z)^2 + a c.z at each predicted token: exact Taylor."""
    toy = make_toy(num_tokens=60, dtype=torch.float64)
    seqlen, slope = 20, 1.0
    generator = torch.Generator().manual_seed(5)
    c_H = torch.randn(toy.asked.x_TH.shape[1], generator=generator, dtype=torch.float64) * 0.1
    # Gradients +-(c) of unit curvature: with a sign at random their mean square is the Hessian c c'.
    sign_T = torch.randint(0, 2, (60,), generator=generator) * 2.0 - 1
    predicted = seqlen - 1
    asked = replace(toy.asked, grad_TH=(sign_T.unsqueeze(1) * c_H * slope / predicted).double())
    costs_UC = measure(toy, asked, form="full", seqlen=seqlen).costs_UC
    for expert in range(toy.layer.num_experts):
        dz_TH = change(toy, expert, 1)
        rise = float((0.5 * (dz_TH @ c_H).square()).sum()) / (3 * predicted)
        assert costs_UC[expert, 1] == pytest.approx(rise, rel=1e-9, abs=0)


def test_linear_term() -> None:
    """All gradients along the change: the first order is certain; at random signs it is noise and goes."""
    toy = make_toy(dtype=torch.float64)
    plain = {"form": "full", "seqlen": 20}
    dz_TH = change(toy, 0, 1)
    uphill = replace(toy.asked, grad_TH=dz_TH * 1e-3)
    quadratic, both = (measure(toy, uphill, linear=linear, **plain).costs_UC[0, 1] for linear in (False, True))
    first = 1e-3 * float(dz_TH.square().sum()) / 3
    noise = 1e-6 * float(dz_TH.square().sum(1).square().sum()) / 9
    assert both - quadratic == pytest.approx(first * (1 - noise / first**2), rel=1e-9)
    assert noise < 0.2 * first**2
    downhill = replace(toy.asked, grad_TH=-dz_TH * 1e-3)
    assert measure(toy, downhill, linear=True, **plain).costs_UC[0, 1] == 0
    sign_T1 = 1.0 - 2 * (torch.arange(len(dz_TH)).unsqueeze(1) % 2)
    scattered = replace(toy.asked, grad_TH=dz_TH * 1e-3 * sign_T1 / dz_TH.norm(dim=1, keepdim=True).clamp(min=1e-9))
    quadratic, both = (measure(toy, scattered, linear=linear, **plain).costs_UC[0, 1] for linear in (False, True))
    assert both == pytest.approx(quadratic, rel=1e-12)
    assert quadratic > 0


def test_floor_lends_the_layers_mean_to_the_starved() -> None:
    toy = make_toy()
    # Expert 2 gets one token, expert 3 none.
    toy.asked.index_Tk[:] = torch.tensor([0, 1])
    toy.asked.index_Tk[17] = torch.tensor([2, 0])
    plain, floored = (measure(toy, unit="matrix", floor=floor).costs_UC for floor in (0, 4))
    mean_PC = plain.reshape(4, 3, -1).sum(0) / 120
    np.testing.assert_allclose(floored[9:], 4 * mean_PC * TOKENS / TOKENS, rtol=1e-12)
    np.testing.assert_allclose(floored[6:9], 4 * (plain[6:9] + 4 * mean_PC) / 5, rtol=1e-12)
    np.testing.assert_allclose(floored[:3], 60 * (plain[:3] + 4 * mean_PC) / 64, rtol=1e-12)
    assert not plain[9:].any()
    assert floored[9:].all()


def test_nobody_asked_costs_nothing() -> None:
    toy = make_toy()
    for floor in (0, 32):
        layer = measure(toy, toy.part(slice(0, 0)), floor=floor)
        assert not layer.costs_UC.any()
        assert not layer.statistics["tokens"].any()


def test_layers_come_back_by_index() -> None:
    toys = {index: make_toy(num_tokens=20 + index) for index in (1, 0)}
    cost = Fisher(perturb="paper")
    for index, toy in toys.items():
        cost.visit(replace(toy.view(), index=index), toy.asked)
    assert [layer.statistics["tokens"].sum() for layer in cost.result()] == [40, 42]


def test_broken_gradients_are_an_error() -> None:
    toy = make_toy()
    assert toy.asked.grad_TH is not None
    toy.asked.grad_TH[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="layer 0"):
        measure(toy)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"form": "round"}, "form"),
        ({"linear": True}, "linear"),
        ({"linear": "yes"}, "linear"),
        ({"floor": -1}, "floor"),
        ({"floor": "some"}, "floor"),
        ({"seqlen": 1}, "seqlen"),
        ({"perturb": "magic"}, "perturb"),
    ],
)
def test_refused_options(options: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError, match=f"option {option}"):
        Fisher(**options)

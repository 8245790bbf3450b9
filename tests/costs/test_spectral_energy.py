"""The cost of components against what happens when one component changes (BitsMoE notes, section 3)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_toy import UNROUTED, Toy, make_toy
from torch import Tensor

from moeq.costs.component_table import ProjectionCosts
from moeq.costs.spectral_energy import SpectralEnergy
from moeq.errors import OptionError
from moeq.format.records import dequantize
from moeq.spec import QuantSpec

SPECS = tuple(QuantSpec(bits=bits, group_size=32, levels="half", layout="spectral") for bits in (1, 2, 4))


def measured(toy: Toy, parts: int = 1, **options: Any) -> dict[str, ProjectionCosts]:
    cost = SpectralEnergy(basis_bits=16, **options)
    num_tokens = len(toy.asked.x_TH)
    for part in range(parts):
        span = slice(num_tokens * part // parts, num_tokens * (part + 1) // parts)
        cost.visit(toy.view("component", SPECS), toy.part(span))
    return next(iter(cost.layers()))


def basis(costs: ProjectionCosts) -> Tensor:
    if costs.scale_HG is None:
        return costs.rows.double()
    return dequantize(costs.rows, costs.scale_HG, None, QuantSpec(bits=8, levels="sym")).double()


def changed_output(toy: Toy, projection: str, expert: int, change: Tensor) -> Tensor:
    """What adding `change` to one matrix does to the layer's answers, (T, H)."""
    before = toy.forward()
    weight = toy.view().read(expert, projection)
    with toy.replaced(expert, {projection: weight + change.to(weight.dtype)}):
        return toy.forward() - before


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("importance", ["routing", "fisher"])
def test_factors_are_the_mean_harm_of_small_random_changes(projection: str, importance: str) -> None:
    toy = make_toy(num_tokens=40)
    costs = measured(toy, importance=importance, energy=False, shrink=0.0)[projection]
    directions = basis(costs)
    generator = torch.Generator().manual_seed(0)
    inner = toy.layer.shapes["down"][1]
    ratios = []
    for expert in (0, 1):
        for k in (0, 5):
            harm, draws = 0.0, 300
            for _ in range(draws):
                delta_I = 1e-5 * torch.randn(inner, generator=generator, dtype=torch.float64)
                change = (
                    torch.outer(directions[k], delta_I) if projection == "down" else torch.outer(delta_I, directions[k])
                )
                dz_TH = changed_output(toy, projection, expert, change)
                if importance == "routing":
                    harm += float(dz_TH.square().sum())
                else:
                    assert toy.asked.grad_TH is not None
                    harm += float((dz_TH * toy.asked.grad_TH).sum(1).square().sum())
            expected = float(costs.weight_EH[expert, k]) * inner * 1e-10 * len(toy.asked.x_TH)
            ratios.append(harm / draws / expected)
    # Routing's scale for gate and up takes input and slope of a token for independent: right on average only.
    tolerance = 0.25 if importance == "fisher" or projection == "down" else 0.6
    assert all(abs(ratio - 1) < tolerance for ratio in ratios), ratios


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("importance", ["routing", "fisher"])
def test_dropping_is_measured_by_all_components_together(projection: str, importance: str) -> None:
    """Against small steps of the real layer towards nothing: linear in the step, so that they say what all would do."""
    toy = make_toy(num_tokens=40)
    cost = SpectralEnergy(basis_bits=16, importance=importance, shrink=0.0)
    for start in (0, 10):  # in two batches
        cost.visit(toy.view("component", SPECS), toy.part(slice(start, 10 if not start else 40)))
    costs = next(iter(cost.layers()))[projection]
    step, together = 1e-5, 0.0
    for expert in range(toy.layer.num_experts):
        dz_TH = changed_output(toy, projection, expert, -step * toy.view().read(expert, projection)) / step
        if importance == "routing":
            together += float(dz_TH.square().sum())
        else:
            assert toy.asked.grad_TH is not None
            together += float((dz_TH * toy.asked.grad_TH).sum(1).square().sum())
    apart = float(costs.weight_EH.double().sum()) * 40
    found = cost.dropping()[0][projection]
    assert found == pytest.approx(max(1.0, together / apart), rel=0.05)


def test_what_acts_together_is_dearer_to_drop() -> None:
    """Tokens that are all alike: every component meets the same number in all of them."""
    toy = make_toy(num_tokens=40)
    alike = replace(
        toy.asked,
        x_TH=toy.asked.x_TH[:1].expand_as(toy.asked.x_TH).contiguous(),
        grad_TH=None if toy.asked.grad_TH is None else toy.asked.grad_TH[:1].expand(40, -1).contiguous(),
    )
    found = []
    for asked in (toy.asked, alike):
        cost = SpectralEnergy(basis_bits=16)
        cost.visit(toy.view("component", SPECS), asked)
        found.append(max(cost.dropping()[0].values()))
    assert found[1] > 1.5 * found[0]
    assert SpectralEnergy(drop=2.5).dropping() == ()
    fixed = SpectralEnergy(basis_bits=16, drop=2.5)
    fixed.visit(toy.view("component", SPECS), toy.asked)
    assert fixed.dropping() == ({"gate": 2.5, "up": 2.5, "down": 2.5},)


def test_batches_add_up() -> None:
    toy = make_toy()
    whole, parts = measured(toy), measured(toy, parts=3)
    for name in ("gate", "up", "down"):
        torch.testing.assert_close(whole[name].weight_EH, parts[name].weight_EH, rtol=1e-4, atol=0)
        torch.testing.assert_close(whole[name].curve_C, parts[name].curve_C)


def test_experts_without_tokens_count_as_the_layers_mean() -> None:
    toy = make_toy()
    assert float(measured(toy, shrink=0.0)["gate"].weight_EH[UNROUTED].max()) == 0
    found = measured(toy)["gate"]
    assert float(found.weight_EH[UNROUTED].min()) > 0


def test_energy_is_that_of_the_weights_and_errors_fall() -> None:
    toy = make_toy()
    costs = measured(toy, activation=False, errors="exact")
    for name, each in costs.items():
        weight = sum(float(toy.view().read(expert, name).square().sum()) for expert in range(toy.layer.num_experts))
        assert float(each.energy_EH.sum()) == pytest.approx(weight, rel=1e-2)
        torch.testing.assert_close(each.weight_EH, each.energy_EH)
        assert each.curve_C.tolist() == sorted(each.curve_C.tolist(), reverse=True)
        assert each.errors_EHC is not None
        relative = float((each.errors_EHC.sum((0, 1)) / each.energy_EH.sum())[1])
        assert relative == pytest.approx(float(each.curve_C[1]), rel=0.3)


def test_joint_gate_and_up_share_a_basis() -> None:
    costs, apart = measured(make_toy()), measured(make_toy(), joint=False)
    assert torch.equal(costs["gate"].rows, costs["up"].rows)
    assert not torch.equal(apart["gate"].rows, apart["up"].rows)


@pytest.mark.parametrize("family", ["nemotron_h"])
def test_experts_without_a_gate_are_refused(family: str) -> None:
    with pytest.raises(OptionError, match="no gate"):
        measured(make_toy(family))


@pytest.mark.parametrize(
    "option", [{"basis_bits": 4}, {"basis": "fft"}, {"joint": 1}, {"perturb": "gptq"}, {"drop": 0.5}, {"drop": "often"}]
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        SpectralEnergy(**option)

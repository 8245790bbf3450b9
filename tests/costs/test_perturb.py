"""Differences on routed tokens equal what a rerun of the whole layer says; every family, every unit."""

from typing import Any

import pytest
import torch
from expert_toy import FAMILIES, SPECS, UNROUTED, Toy, make_toy
from torch import Tensor

from moeq.costs import perturb as module
from moeq.costs.base import Asked
from moeq.costs.paper_rtn import paper_rtn
from moeq.costs.perturb import chosen_tokens, make_rounder, perturb, working_dtype
from moeq.errors import OptionError, TensorError
from moeq.format.records import dequantize
from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec


def collect(
    toy: Toy, unit: str, rounder: str = "paper", specs: tuple[QuantSpec, ...] = SPECS, **options: Any
) -> Tensor:
    """s dE of every unit and candidate at every token, (U, C, T, H); zero where not routed."""
    view, asked = toy.view(unit, specs), toy.asked
    out = torch.zeros(view.num_units, len(specs), *asked.x_TH.shape, dtype=working_dtype(asked))
    with torch.no_grad():
        for part in perturb(view, asked, make_rounder(rounder, **options)):
            for difference in part.differences:
                place = out[difference.unit, difference.candidate]
                place[part.tokens_S] += difference.diff_SH * part.weights_S.unsqueeze(1)
    return out


def rerun(toy: Toy, expert: int, projections: tuple[str, ...], spec: QuantSpec) -> Tensor:
    """The change of the layer's output, the slow way: the family's own forward of all tokens."""
    view = toy.view()
    rounded = {name: paper_rtn(view.read(expert, name), spec.bits, spec.group_size) for name in projections}
    before = toy.forward()
    with toy.replaced(expert, rounded):
        return toy.forward() - before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["expert", "matrix"])
def test_differences_equal_a_rerun_of_the_layer(family: str, unit: str) -> None:
    toy = make_toy(family)
    found = collect(toy, unit)
    projections = toy.layer.projections
    row = 0
    for expert in range(toy.layer.num_experts):
        for changed in [projections] if unit == "expert" else [(name,) for name in projections]:
            for column, spec in enumerate(SPECS):
                wanted = rerun(toy, expert, changed, spec)
                assert float((found[row, column] - wanted).abs().max()) <= 1e-10 * max(1, float(wanted.abs().max()))
                assert (float(wanted.abs().max()) == 0) == (expert == UNROUTED)
            row += 1
    assert row == len(found)


def test_an_unrouted_expert_is_not_even_read() -> None:
    toy = make_toy()
    parts = list(perturb(toy.view(), toy.asked, make_rounder("rtn")))
    assert {part.expert for part in parts} == set(range(toy.layer.num_experts)) - {UNROUTED}


@pytest.mark.parametrize("rounder", ["paper", "rtn", "gptq"])
def test_chunks_of_tokens_change_nothing(rounder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy()
    whole = collect(toy, "matrix", rounder)
    monkeypatch.setattr(module, "CHUNK_VALUES", 7 * sum(rows for rows, _ in toy.layer.shapes.values()))
    parts = list(perturb(toy.view(), toy.asked, make_rounder(rounder)))
    assert max(len(part.tokens_S) for part in parts) == 7
    torch.testing.assert_close(collect(toy, "matrix", rounder), whole, rtol=1e-9, atol=1e-9)


def test_bfloat16_models_are_measured_in_float32() -> None:
    toy = make_toy(dtype=torch.bfloat16)
    specs = (QuantSpec(bits=8, group_size=32),)
    found = collect(toy, "expert", "rtn", specs)
    assert found.dtype == torch.float32
    exact = make_toy(dtype=torch.float64)
    exact.experts.load_state_dict(toy.experts.state_dict())
    inputs = {"x_TH": toy.asked.x_TH.double(), "weights_Tk": toy.asked.weights_Tk.double()}
    asked = Asked(experts=exact.experts, index_Tk=toy.asked.index_Tk, **inputs)
    wanted = collect(Toy(experts=exact.experts, layer=toy.layer, asked=asked), "expert", "rtn", specs)
    assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("rounder", ["minmax", "rtn", "hqq"])
def test_a_quantizer_rounds_as_it_would_store(rounder: str) -> None:
    toy = make_toy()
    view, spec = toy.view("matrix"), SPECS[1]
    found = collect(toy, "matrix", rounder)
    rounded = make_quantizer(rounder).quantize(view.read(1, "up"), spec, None)
    weight = dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)
    before = toy.forward()
    with toy.replaced(1, {"up": weight.double()}):
        wanted = toy.forward() - before
    torch.testing.assert_close(found[4, 1], wanted, rtol=1e-9, atol=1e-9)


def squares(found: Tensor) -> Tensor:
    return found.square().sum((2, 3))[torch.arange(len(found)) // 3 != UNROUTED]


def test_gptq_beats_rtn_on_the_outputs_it_is_fitted_to() -> None:
    """One matrix at a time: up to the nonlinearity behind gate and up, that is what its Hessian measures."""
    toy = make_toy(num_tokens=900)
    hidden = toy.asked.x_TH.shape[1]
    mix_HH = torch.randn(hidden, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    toy.asked.x_TH.mul_(0.9 ** torch.arange(hidden)).copy_(toy.asked.x_TH @ mix_HH / 3)
    specs = SPECS[1:]
    rtn, gptq = (squares(collect(toy, "matrix", name, specs)) for name in ("rtn", "gptq"))
    assert bool((gptq < rtn).all())
    assert float(gptq.sum()) < 0.8 * float(rtn.sum())


def test_gptq_sees_the_tokens_of_its_expert() -> None:
    """Inputs that live in few directions on an expert's tokens are rounded almost without harm there."""
    toy = make_toy(num_tokens=900)
    narrow = torch.randn(4, toy.asked.x_TH.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    to_zero = (toy.asked.index_Tk == 0).any(1)
    toy.asked.x_TH[to_zero] = toy.asked.x_TH[to_zero][:, :4] @ narrow
    rtn, gptq = (squares(collect(toy, "matrix", name)) for name in ("rtn", "gptq"))
    ratio = (gptq / rtn)[:, 2]  # 4 bits
    assert float(ratio[:2].max()) < 0.5 * float(ratio[3:5].min())


def test_starved_experts_borrow_tokens() -> None:
    """One routed token would make a Hessian of rank one, at which GPTQ ruins all other directions."""
    toy = make_toy(num_tokens=300)
    toy.asked.index_Tk[:] = torch.tensor([0, 1])
    toy.asked.index_Tk[17] = torch.tensor([2, 0])
    found = collect(toy, "matrix", "gptq")
    assert bool(torch.isfinite(found).all())
    gptq, rtn = (squares(collect(toy, "matrix", name))[6:, 1] for name in ("gptq", "rtn"))
    assert bool((gptq < 4 * rtn).all())
    assert float(gptq.sum()) > 0


def test_options_reach_the_quantizer() -> None:
    toy = make_toy(num_tokens=300)
    plain = collect(toy, "expert", "gptq")
    assert not torch.equal(plain, collect(toy, "expert", "gptq", damp=1.0))
    assert not torch.equal(plain, collect(toy, "expert", "gptq", act_order=False))
    assert not torch.equal(collect(toy, "expert"), collect(toy, "expert", "rtn", gain=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturb": "rounding"}, "choose one of paper, minmax"),
        ({"perturb": "paper", "damp": 0.1}, "it has no options"),
        ({"perturb": "rtn", "damp": 0.1}, "does not know 'damp'"),
        ({"perturb": "gptq", "damp": "much"}, "option damp"),
        ({"perturb": "gptq", "act_order": 3}, "option act_order"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_rounder(**options)


def test_broken_weights_are_named() -> None:
    toy = make_toy()
    toy.experts.down_proj.data[1, 0, 0] = torch.inf
    with pytest.raises(TensorError, match=r"experts\.1\.down"):
        list(perturb(toy.view(), toy.asked, make_rounder("paper")))


@pytest.mark.parametrize("count", [1, 5, 40, 199])
def test_chosen_tokens_stand_for_all(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.rand(200, generator=generator, dtype=torch.float64) ** 6
    kept, stands = chosen_tokens(sizes, count)
    assert abs(len(kept) - count) <= 1
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert (stands >= 1 - 1e-12).all()
    again, _ = chosen_tokens(sizes, count)
    assert torch.equal(kept, again)


def test_sums_over_chosen_tokens_are_right_on_average_and_close_where_it_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(60):
        sizes = torch.rand(400, generator=generator, dtype=torch.float64) ** 8
        values = sizes * (0.5 + torch.rand(400, generator=generator, dtype=torch.float64))
        order = torch.randperm(400, generator=generator)
        kept, stands = chosen_tokens(sizes[order], 40)
        errors.append(float((values[order][kept] * stands).sum() / values.sum()) - 1)
    mean = sum(errors) / len(errors)
    spread = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert abs(mean) < 0.02
    assert spread < 0.08  # plain sampling of a tenth of such sizes is off by a third


def test_tokens_of_no_size_are_chosen_alike() -> None:
    kept, stands = chosen_tokens(torch.zeros(100, dtype=torch.float64), 10)
    assert len(kept) == 10
    assert torch.allclose(stands, torch.full((10,), 10.0, dtype=torch.float64))

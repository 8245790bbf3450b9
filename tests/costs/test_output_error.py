"""PMQ's cost against its formula on reruns of the whole layer."""

from typing import Any

import numpy as np
import pytest
import torch
from expert_toy import FAMILIES, SPECS, UNROUTED, Toy, make_toy

from moeq.costs.base import Asked, LayerCosts
from moeq.costs.output_error import OutputError
from moeq.costs.paper_rtn import paper_rtn
from moeq.errors import CalibrationError, OptionError

TOKENS = 60


def measure(toy: Toy, *batches: Asked, unit: str = "expert", **options: Any) -> LayerCosts:
    cost = OutputError(**options)
    for asked in batches or (toy.asked,):
        cost.visit(toy.view(unit), asked)
    (layer,) = cost.result()
    return layer


def changes(toy: Toy, column: int) -> torch.Tensor:
    """Change of the layer's output when an expert is rounded, for each expert, (E, T, H)."""
    spec, view, before = SPECS[column], toy.view(), toy.forward()
    out = []
    for expert in range(toy.layer.num_experts):
        rounded = {
            name: paper_rtn(view.read(expert, name), spec.bits, spec.group_size) for name in toy.layer.projections
        }
        with toy.replaced(expert, rounded):
            out.append(toy.forward() - before)
    return torch.stack(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_formula_on_reruns(family: str) -> None:
    toy = make_toy(family)
    chosen = [toy.asked.index_Tk == expert for expert in range(toy.layer.num_experts)]
    freq = np.array([float(hit.sum()) for hit in chosen])
    wsum = np.array([float(toy.asked.weights_Tk[hit].sum()) for hit in chosen])
    layer, code, squared = (measure(toy, seqlen=20, **options) for options in ({}, {"code": True}, {"mode": "squared"}))
    for column in range(len(SPECS)):
        dz_ETH = changes(toy, column)
        norms = dz_ETH.unflatten(1, (3, 20)).norm(dim=(2, 3)).sum(1).numpy()
        usage = (freq / TOKENS) * (wsum / TOKENS) ** 1.5
        np.testing.assert_allclose(layer.costs_UC[:, column], usage * (norms / 3) ** 2, rtol=1e-9)
        np.testing.assert_allclose(code.costs_UC[:, column], usage * (norms / 3), rtol=1e-9)
        np.testing.assert_allclose(squared.costs_UC[:, column], dz_ETH.square().sum((1, 2)) / TOKENS, rtol=1e-9)
    assert layer.statistics["freq"].tolist() == freq.tolist()
    assert layer.statistics["wsum"] == pytest.approx(wsum)
    assert not layer.costs_UC[UNROUTED].any()
    assert layer.costs_UC[:UNROUTED].all()


def test_exponents() -> None:
    toy = make_toy()
    found = {g: measure(toy, a=0.0, b=0.0, g=g).costs_UC[:UNROUTED] for g in (1.0, 3.0)}
    np.testing.assert_allclose(found[1.0] ** 3, found[3.0], rtol=1e-9)
    weighted = measure(toy, a=2.0, b=0.0, g=1.0)
    share_U1 = weighted.statistics["freq"][:UNROUTED, None] / TOKENS
    np.testing.assert_allclose(weighted.costs_UC[:UNROUTED], share_U1**2 * found[1.0], rtol=1e-9)


@pytest.mark.parametrize("mode", ["pmq", "squared"])
def test_batches_add_up(mode: str) -> None:
    toy = make_toy()
    whole = measure(toy, unit="matrix", mode=mode, seqlen=20)
    parts = [toy.part(slice(start, start + 20)) for start in (0, 20, 40)]
    for options in ({"seqlen": 20}, {"seqlen": None}):  # a batch is a sequence unless told otherwise
        found = measure(toy, *parts, unit="matrix", mode=mode, **options)
        np.testing.assert_allclose(found.costs_UC, whole.costs_UC, rtol=1e-12)
    together = measure(toy, unit="matrix", mode=mode)
    assert np.allclose(together.costs_UC, whole.costs_UC, rtol=0.01) == (mode == "squared")


def test_scales_with_squared_weights() -> None:
    toy = make_toy()
    plain, scaled = (measure(toy, asked, mode="squared").costs_UC for asked in (toy.asked, toy.scaled(weights=3)))
    np.testing.assert_allclose(scaled, 9 * plain, rtol=1e-12)


def test_matrices_cost_less_than_their_expert() -> None:
    toy = make_toy()
    experts, matrices = (measure(toy, unit=unit, mode="squared").costs_UC for unit in ("expert", "matrix"))
    assert matrices.shape == (3 * len(experts), len(SPECS))
    assert (matrices.reshape(4, 3, -1).max(1)[:UNROUTED] < experts[:UNROUTED]).all()
    assert (np.diff(experts[:UNROUTED], axis=1) < 0).all()


def test_gradients_are_not_asked_for() -> None:
    toy = make_toy()
    asked = Asked(
        experts=toy.experts, x_TH=toy.asked.x_TH, index_Tk=toy.asked.index_Tk, weights_Tk=toy.asked.weights_Tk
    )
    assert OutputError().needs == "activations"
    assert np.array_equal(measure(toy, asked).costs_UC, measure(toy).costs_UC)


def test_overflow_is_an_error() -> None:
    toy = make_toy()
    toy.asked.x_TH[0] = torch.inf
    with pytest.raises(CalibrationError, match="layer 0"):
        measure(toy)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"mode": "local"}, "mode"),
        ({"a": -1}, "a"),
        ({"b": "some"}, "b"),
        ({"g": float("nan")}, "g"),
        ({"code": 1}, "code"),
        ({"seqlen": 2.5}, "seqlen"),
        ({"perturb": "rtn", "damp": 0.1}, "damp"),
    ],
)
def test_refused_options(options: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError, match=f"option {option}"):
        OutputError(**options)

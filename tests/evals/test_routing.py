import copy

import pytest
import torch
from torch import Tensor, nn

from moeq.errors import NotMoeError, OptionError
from moeq.evals.observe import Observation, observe
from moeq.evals.routing import OverlapSum, router_overlap


def observation(*routing: list[list[int]]) -> Observation:
    return Observation(logits_BPV=torch.zeros(0), routing=tuple(torch.tensor([layer]) for layer in routing))


def test_a_model_agrees_with_itself(model: nn.Module, rows: list[Tensor]) -> None:
    got = router_overlap(model, model, rows[:2])
    assert got.value == 1.0
    assert got.layers == (1.0,) * 4


def test_known_values() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    sums = OverlapSum()
    wanted = observation([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    chosen = observation([[1, 0], [3, 9]], [[0, 1], [6, 9]])
    sums.add(wanted, chosen, ids)
    assert sums.result().layers == (0.75, 0.25)
    assert sums.result().value == 0.5
    sums.add(wanted, wanted, ids)
    assert sums.result().layers == (0.875, 0.625)


def test_padding_is_no_expert() -> None:
    sums = OverlapSum()
    sums.add(observation([[3, -1]]), observation([[-1, 3]]), torch.zeros(1, 1))
    assert sums.result().value == 1.0


def test_matches_sets(model: nn.Module, noisy: nn.Module, rows: list[Tensor]) -> None:
    shares: list[list[float]] = [[] for _ in range(4)]
    for row in rows:
        with torch.inference_mode():
            seen = [observe(net, row[None], routing=True).routing for net in (model, noisy)]
        for layer, (wanted, chosen) in enumerate(zip(*seen, strict=True)):
            pairs = zip(wanted[0].tolist(), chosen[0].tolist(), strict=True)
            shares[layer] += [len(set(a) & set(b)) / len(a) for a, b in pairs]
    got = router_overlap(noisy, model, rows, batch_size=5)
    assert got.layers == pytest.approx([sum(layer) / len(layer) for layer in shares], abs=0.005)
    # Noise in the experts cannot reach the first router.
    assert got.layers[0] == 1.0
    assert 0.5 < got.value < 0.99


def test_random_routers_overlap_by_chance(model: nn.Module, rows: list[Tensor]) -> None:
    lost = copy.deepcopy(model)
    with torch.no_grad():
        for layer in lost.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(5, dims=0))
    # Every expert index moved by 5: only what was near a tie by symmetry can still match.
    assert router_overlap(lost, model, rows).value < 0.35


def test_models_without_experts(model: nn.Module, rows: list[Tensor]) -> None:
    dense = copy.deepcopy(model)
    for layer in dense.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(NotMoeError, match="model shows no routed experts"):
        router_overlap(dense, model, rows[:1])
    with pytest.raises(NotMoeError, match="reference shows no routed experts"):
        router_overlap(model, dense, rows[:1])


def test_models_of_other_depth(model: nn.Module, rows: list[Tensor]) -> None:
    shallow = copy.deepcopy(model)
    shallow.model.layers[1].mlp = nn.Identity()
    with pytest.raises(OptionError, match="reference has 4 MoE layers, the model 3"):
        router_overlap(shallow, model, rows[:1])

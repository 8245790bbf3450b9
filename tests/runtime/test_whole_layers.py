"""Decoder layers that are answered whole answer what their modules answer, and only while nothing is unusual."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeq
import zoo
from moeq import native
from moeq.runtime.growing import GrowingLayer, growing_cache
from moeq.runtime.whole_layers import TRIALS, WholeLayer, join_layers

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


def ids(count: int) -> Tensor:
    return torch.randint(3, 4000, (1, count), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def decoded(model: Any, count: int = 40, prompt: int = 20) -> Tensor:
    cache, found = growing_cache(model), []
    for start, stop in [(0, prompt), *((start, start + 1) for start in range(prompt, count))]:
        found.append(model(ids(count)[:, start:stop], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def layers(model: Any) -> list[Any]:
    return list(model.model.layers)


@pytest.fixture
def model(packed_demo: Path) -> Any:
    return moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True)


@pytest.fixture
def apart(packed_demo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, module by module."""
    monkeypatch.setattr("moeq.runtime.whole_layers.join_layers", lambda _: None)
    return moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True)


def test_answers_are_the_same(model: Any, apart: Any) -> None:
    assert all(isinstance(layer, WholeLayer) for layer in layers(model))
    assert not any(isinstance(layer, WholeLayer) for layer in layers(apart))
    torch.testing.assert_close(decoded(model), decoded(apart), rtol=1e-3, atol=1e-3)
    assert all(layer.moeq_trials == 0 and layer.moeq_parts.experts for layer in layers(model)), "they serve"


@torch.inference_mode()
def test_a_plain_generate_is_answered_whole(model: Any, apart: Any) -> None:
    """The cache is one of transformers' own there, whose layers give way to ones that grow."""
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    ours, theirs = (each.generate(ids(20), **options) for each in (model, apart))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert all(layer.moeq_trials == 0 for layer in layers(model)), "they serve"
    assert {type(layer) for layer in ours.past_key_values.layers} == {GrowingLayer}
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-3, atol=1e-3)


def test_the_cache_is_the_same(model: Any, apart: Any) -> None:
    """Also where its room ends, and after it was cut."""
    caches = [growing_cache(each) for each in (model, apart)]
    with torch.inference_mode():
        for each, cache in zip((model, apart), caches, strict=True):
            each(ids(9), past_key_values=cache, use_cache=True)
            for token in ids(5).T:
                each(token[None], past_key_values=cache, use_cache=True)
            cache.crop(-2)
            for layer in cache.layers:
                layer._rooms = [layer.keys.clone(), layer.values.clone()]  # no room is left
            for token in ids(3).T:
                each(token[None], past_key_values=cache, use_cache=True)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert ours.get_seq_length() == 15
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-3)


def test_hooks_and_changes_are_seen(model: Any) -> None:
    decoded(model)
    layer, seen = layers(model)[1], []
    hook = layer.mlp.gate.register_forward_hook(lambda *_: seen.append(1))
    decoded(model, 24)
    assert len(seen) == 5, "a prompt and four tokens"
    hook.remove()
    before = decoded(model)
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2
    after = decoded(model)
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, decoded(copy.deepcopy(model)), rtol=1e-3, atol=1e-3)


def test_scales_that_are_trained_are_seen(model: Any) -> None:
    """And parts that are exchanged, as adapters do."""
    before = decoded(model)
    linear = layers(model)[1].self_attn.v_proj
    loose = linear.loosen()
    with torch.no_grad():
        for parameter in loose.parameters():
            parameter.add_(0.5)
    changed = decoded(model)
    assert float((changed - before).abs().max()) > 1e-3
    layers(model)[1].self_attn.v_proj = nn.Linear(linear.in_features, linear.out_features, bias=False)
    assert float((decoded(model) - changed).abs().max()) > 1e-3


def test_routing_can_be_asked_for(model: Any) -> None:
    decoded(model)
    cache = growing_cache(model)
    with torch.inference_mode():
        model(ids(9), past_key_values=cache, use_cache=True)
        found = model(ids(1), past_key_values=cache, use_cache=True, output_router_logits=True)
    assert len(found.router_logits) == len(layers(model))


def test_who_disagrees_is_answered_by_its_modules(model: Any, apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = WholeLayer._answer
    monkeypatch.setattr(WholeLayer, "_answer", lambda *args: real(*args) * 1.5)
    found = decoded(model, prompt=20, count=20 + TRIALS + 4)
    assert all(layer.moeq_trials == -1 for layer in layers(model))
    monkeypatch.undo()
    torch.testing.assert_close(found, decoded(apart, prompt=20, count=20 + TRIALS + 4), rtol=1e-3, atol=1e-3)


def test_it_can_be_copied_and_pickled(model: Any) -> None:
    wanted = decoded(model)
    torch.testing.assert_close(decoded(copy.deepcopy(model)), wanted)
    again = pickle.loads(pickle.dumps(layers(model)[0].input_layernorm))
    assert type(again) is type(layers(model)[0].input_layernorm)


WHOLE = ("olmoe", "qwen3_moe")
APART = {
    "mixtral": "heads of 8 numbers",
    "qwen2_moe": "biases of q, k and v",
    "granitemoe": "a factor at what is added",
    "gpt_oss": "sinks, biases",
    "glm4_moe": "half of each head is turned",
}
"""Families, and why the kernels do not answer their tiny models."""


@pytest.mark.parametrize("family", [*WHOLE, *APART])
def test_families(family: str, tmp_path: Path) -> None:
    """Layers of the usual kind are answered whole; all are answered as their modules would."""
    zoo.make_tiny(family, tmp_path / "source")
    moeq.quantize(
        tmp_path / "source",
        tmp_path / "packed",
        bits=4.5,
        quantizer="rtn",
        method="uniform",
        device="cpu",
        quality=False,
    )
    answers, whole = [], 0
    for joined in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not joined:
                patch.setattr("moeq.runtime.whole_layers.join_layers", lambda _: None)
            found = moeq.load(tmp_path / "packed", device="cpu", dtype=torch.float32, exact_activations=True)
        tokens = torch.arange(12)[None] % found.config.get_text_config().vocab_size
        cache, steps = growing_cache(found), []
        with torch.inference_mode():
            for start, stop in [(0, 6), *((start, start + 1) for start in range(6, 12))]:
                steps.append(found(tokens[:, start:stop], past_key_values=cache, use_cache=True).logits)
        answers.append(torch.cat(steps, dim=1))
        whole += sum(isinstance(module, WholeLayer) and module.moeq_trials == 0 for module in found.modules())
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)
    assert (whole > 0) == (family in WHOLE)


def test_a_model_without_such_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    join_layers(model)
    assert type(model) is nn.Sequential

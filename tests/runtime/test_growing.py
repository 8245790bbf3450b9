"""A cache that grows in place holds what transformers' own holds."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import zoo
from moeq.runtime import growing
from moeq.runtime.growing import GrowingLayer, growing_cache


def ids(count: int) -> Tensor:
    return torch.randint(3, 4000, (1, count), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decoded(model: nn.Module, cache: DynamicCache, pieces: list[int]) -> list[Tensor]:
    """Logits of a text that is read in pieces."""
    found, tokens = [], ids(600)
    for count in pieces:
        begun = int(cache.get_seq_length())
        step = model(input_ids=tokens[:, begun : begun + count], past_key_values=cache, use_cache=True)
        found.append(step.logits)
    return found


def test_answers_are_the_same(demo_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "ROOM", 3)
    cache = growing_cache(demo_model)
    assert all(isinstance(layer, GrowingLayer) for layer in cache.layers)
    pieces = [20, *[1] * 12, 7, 1]
    for ours, theirs in zip(
        decoded(demo_model, cache, pieces),
        decoded(demo_model, DynamicCache(config=demo_model.config), pieces),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_nothing_is_moved_while_there_is_room(demo_model: nn.Module) -> None:
    cache = growing_cache(demo_model)
    decoded(demo_model, cache, [5])
    where = cache.layers[0].keys.data_ptr()
    decoded(demo_model, cache, [1] * growing.ROOM)
    assert cache.layers[0].keys.data_ptr() == where
    assert cache.get_seq_length() == 5 + growing.ROOM
    decoded(demo_model, cache, [1])
    assert cache.layers[0].keys.data_ptr() != where


def test_cut_copied_and_forgotten(demo_model: nn.Module) -> None:
    cache = growing_cache(demo_model)
    decoded(demo_model, cache, [10, 1, 1])
    kept = [layer.keys.clone() for layer in cache.layers]
    other = copy.deepcopy(cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    tail = demo_model(input_ids=ids(30)[:, 20:25], past_key_values=cache, use_cache=True).logits
    fresh = growing_cache(demo_model)
    whole = torch.cat([ids(12)[:, :8], ids(30)[:, 20:25]], 1)
    wanted = demo_model(input_ids=whole, past_key_values=fresh, use_cache=True).logits[:, 8:]
    torch.testing.assert_close(tail, wanted, rtol=2e-2, atol=2e-2)
    for layer, before in zip(other.layers, kept, strict=True):  # the copy has a memory of its own
        assert torch.equal(layer.keys, before)
    cache.reset()
    assert cache.get_seq_length() == 0
    other.batch_repeat_interleave(2)
    other.reorder_cache(torch.tensor([1, 0]))
    demo_model(input_ids=ids(1).expand(2, 1), past_key_values=other, use_cache=True)
    assert other.layers[0].keys.shape[0] == 2
    assert other.get_seq_length() == 13


def test_gradients_pass() -> None:
    layer, keys = GrowingLayer(), torch.randn(1, 2, 3, 4, requires_grad=True)
    found, _ = layer.update(keys, keys.detach())
    found.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_layers_that_forget_stay_as_they_are(tmp_path: Path) -> None:
    zoo.make_tiny("gpt_oss", tmp_path / "tiny")
    config = AutoConfig.from_pretrained(tmp_path / "tiny")
    config.layer_types = ["sliding_attention", "full_attention"] * (config.num_hidden_layers // 2) + [
        "full_attention"
    ] * (config.num_hidden_layers % 2)
    config.sliding_window = 8
    model = AutoModelForCausalLM.from_config(config)
    kinds = [type(layer).__name__ for layer in growing_cache(model).layers[:2]]
    assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer"]

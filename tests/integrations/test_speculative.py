"""Speculative decoding by transformers' own `generate`: the same tokens in fewer runs of the packed model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moeq
from moeq.runtime.load import load_any

NEW = 24


@pytest.fixture
def model(packed_demo: Path) -> PreTrainedModel:
    # Rounded activations are rounded otherwise in company: two tokens of nearly the same chance may change places.
    return moeq.load(packed_demo, device="cpu", dtype="float32", exact_activations=True)


def generated(model: PreTrainedModel, prompt: Tensor, **options: Any) -> tuple[list[int], int]:
    """New tokens, and how often the model ran."""
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = model.register_forward_pre_hook(count)
    try:
        out = model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    finally:
        handle.remove()
    return out[0, prompt.shape[1] :].tolist(), runs


def test_prompt_lookup(model: PreTrainedModel) -> None:
    prompt = torch.arange(40, 72).repeat(3)[None]
    plain, runs = generated(model, prompt)
    looked_up, fewer = generated(model, prompt, prompt_lookup_num_tokens=4)
    assert runs == NEW
    assert looked_up == plain
    assert fewer < NEW


def test_an_assistant(model: PreTrainedModel, demo_dir: Path) -> None:
    prompt = torch.arange(40, 72)[None]
    plain, _ = generated(model, prompt)
    assisted, fewer = generated(model, prompt, assistant_model=load_any(demo_dir, "cpu", torch.float32))
    assert assisted == plain
    assert fewer < NEW


def test_as_an_assistant(packed_demo: Path, demo_dir: Path) -> None:
    """The packed model guesses, the original decides: lossless, and it need not load more than the packed bytes."""
    original, prompt = load_any(demo_dir, "cpu", torch.float32), torch.arange(40, 72)[None]
    plain, _ = generated(original, prompt)
    packed = moeq.load(packed_demo, device="cpu", dtype="float32")
    assisted, fewer = generated(original, prompt, assistant_model=packed)
    assert assisted == plain
    assert fewer < NEW

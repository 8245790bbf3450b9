"""Adapters of peft on a packed model."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moeq
from moeq.errors import PackedError

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft's own, for experts that are packed
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_train_on_packed_linears(targets: Any, packed_demo: Path) -> None:
    model = moeq.load(packed_demo, device="cpu")
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in tuned.named_parameters() if p.requires_grad}
    assert {"q_proj", "v_proj"} <= names
    ids = torch.arange(3, 40)[None]
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = [value.grad for value in tuned.parameters() if value.requires_grad]
    assert trained
    assert all(grad is not None for grad in trained)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_packed_bytes_is_refused(safe: bool, packed_demo: Path) -> None:
    """It would change a decoded copy, and the adapter would be lost without a word."""
    model = moeq.load(packed_demo, device="cpu")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(PackedError, match="not merged"):
        tuned.merge_and_unload(safe_merge=safe)

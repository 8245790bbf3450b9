"""Checkpoints that were rounded before, from source to a packed model that computes what they do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeq
import rounding
import zoo
from moeq.runtime.load import load_any
from moeq.stages import plan
from often import by_day

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
Sort = tuple[str, Callable[[str, Tensor], rounding.Tensors], dict[str, Any]]
SOURCES: dict[str, Sort] = {
    "fp8, apart, ragged": ("deepseek_v3", rounding.to_fp8, FP8),
    "fp8, apart": ("qwen3_moe", lambda n, w: rounding.to_fp8(n, w, 8), FP8 | {"weight_block_size": [8, 8]}),
    "fp8, stacked, ragged": ("qwen3_vl_moe", rounding.to_fp8, FP8),
    "mxfp4, stacked": ("gpt_oss", rounding.to_mxfp4, {"quant_method": "mxfp4"}),
    "int4 of compressed-tensors": ("qwen3_moe", rounding.to_int4, {"quant_method": "compressed-tensors"}),
    "gptq": ("qwen3_moe", rounding.to_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "awq": ("qwen3_moe", rounding.to_awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
}
DAILY = {"fp8, apart, ragged", "mxfp4, stacked", "gptq", "awq"}
OPTIONS: dict[str, Any] = {"bits": 9.5, "group_size": 32, "device": "cpu"}


def wanted(name: str, value: Tensor) -> bool:
    """Matrices of experts and of attention, outside towers."""
    if "visual" in name or value.ndim < 2 or name.endswith("bias"):
        return False
    return "experts." in name or name.endswith("proj.weight")


def source(name: str, directory: Path) -> Path:
    family, form, facts = SOURCES[name]
    model = zoo.make_tiny(family, directory, dtype=torch.bfloat16)
    if family == "gpt_oss":  # blocks of 32 inputs fill its experts, as they do on hubs
        model.config.intermediate_size = 64
        type(model)(model.config).to(torch.bfloat16).save_pretrained(directory)
    only = (lambda n, v: wanted(n, v) and v.ndim == 3) if "stacked" in name else wanted
    rounding.convert(directory, form, facts, only)
    return directory


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 51).view(2, 24) % 100, use_cache=False).logits.float()


@pytest.mark.parametrize("name", by_day(SOURCES, DAILY))
def test_packed_is_what_the_source_decodes_to(name: str, tmp_path: Path, calibration_text: Path) -> None:
    if "compressed" in name:
        pytest.importorskip("compressed_tensors")
    directory = source(name, tmp_path / "source")
    reported = plan.run(directory, moeq.Recipe(**OPTIONS))
    assert any("decoded" in warning for warning in reported.warnings)
    want = logits(load_any(directory, "cpu", torch.float32))
    assert want.isfinite().all()
    for quantizer in ("hqq", "gptq"):
        out, options = tmp_path / quantizer, OPTIONS | {"quantizer": quantizer}
        if quantizer == "gptq":
            zoo.write_tokenizer(directory)
            options |= {"calibration": str(calibration_text), "nsamples": 4, "seqlen": 48}
        moeq.quantize(directory, out, **options)
        found = logits(moeq.load(out, device="cpu", dtype=torch.float32, exact_activations=True))
        distance = (found - want).norm(dim=-1) / want.norm(dim=-1)
        assert distance.median() < 0.03, quantizer
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "moeq"
        assert moeq.verify(out).logits_finite

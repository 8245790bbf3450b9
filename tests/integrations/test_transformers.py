"""Packed checkpoints through the real from_pretrained: after `import moeq`, and with remote code alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

import moeq
from moeq.checkpoint.header import read_header
from moeq.errors import VersionError
from moeq.integrations import transformers as integration

NO_IMPORT = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
assert "moeq" in sys.modules and type(model).__module__.startswith("transformers.models.qwen3_moe"), type(model)
with torch.inference_mode():
    torch.save(model(input_ids=torch.arange(1, 33).view(2, 16)).logits, sys.argv[2])
model.config.save_pretrained(sys.argv[3])
"""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(1, 33).view(2, 16)).logits


def test_all_ways_of_loading_agree(packed_demo: Path, tmp_path: Path) -> None:
    ours = logits(moeq.load(packed_demo, device="cpu", dtype=torch.float32))
    theirs = logits(AutoModelForCausalLM.from_pretrained(packed_demo, dtype=torch.float32))
    assert torch.equal(ours, theirs)
    words = [sys.executable, "-c", NO_IMPORT, str(packed_demo), str(tmp_path / "logits"), str(tmp_path / "config")]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits"), ours)


def test_no_weight_is_reported_missing_or_unexpected(packed_demo: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(packed_demo, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_packed_model_equals_a_dense_one_with_its_weights(packed_demo: Path, demo_dir: Path) -> None:
    packed = moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True)
    dense = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    with torch.no_grad():
        for layer, twin in zip(packed.model.layers, dense.model.layers, strict=True):
            experts = layer.mlp.experts.moeq.layer
            for expert in range(experts.num_experts):
                gate, up, down = (
                    moeq_decode(experts.matrix(expert, projection)) for projection in ("gate", "up", "down")
                )
                twin.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
                twin.mlp.experts.down_proj[expert] = down
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(twin.self_attn, name).weight.copy_(getattr(layer.self_attn, name).weight)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-4)


def moeq_decode(matrix) -> torch.Tensor:
    from moeq.format.records import decode_matrix

    return decode_matrix(matrix.record, matrix.spec, matrix.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generate_with_and_without_cache(packed_demo: Path, dtype: torch.dtype) -> None:
    model = moeq.load(packed_demo, device="cpu", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(packed_demo)
    ids = tokenizer("The history of the world", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert with_cache.shape[1] == ids.shape[1] + 12
    if dtype == torch.float32:
        assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


def test_gradients_reach_inputs_and_routers(packed_demo: Path) -> None:
    model = moeq.load(packed_demo, device="cpu", dtype=torch.float32)
    embedded = model.get_input_embeddings()(torch.arange(1, 9).view(1, 8)).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad.abs().sum() > 0
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_the_bare_base_model_loads_too(packed_demo: Path) -> None:
    base = AutoModel.from_pretrained(packed_demo, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(packed_demo, dtype=torch.float32)
    ids = torch.arange(1, 17).view(1, 16)
    with torch.inference_mode():
        torch.testing.assert_close(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_saving_a_packed_model_is_refused(packed_demo: Path, tmp_path: Path) -> None:
    model = moeq.load(packed_demo, device="cpu")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


def test_a_future_format_is_refused_by_name(packed_demo: Path) -> None:
    facts = json.loads((packed_demo / "config.json").read_text())["quantization_config"]
    with pytest.raises(VersionError, match="upgrade moeq"):
        integration.MoeqConfig(**{**facts, "format_version": 99})


def test_registering_twice_is_harmless() -> None:
    integration.register()
    integration.register()


@pytest.fixture(scope="module", params=["grouped and linears", "tiled"])
def packed_alike(request: pytest.FixtureRequest, demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {
        "grouped and linears": {"method": "uniform", "dense_bits": "8"},
        "tiled": {"method": "tileq", "rank": "4"},
    }
    out = tmp_path_factory.mktemp("alike") / "out"
    moeq.quantize(demo_dir, out, device="cpu", bits=3.3, nsamples=16, seqlen=128, **options[request.param])
    return out


def test_the_state_dict_has_the_packed_bytes(packed_alike: Path) -> None:
    """Whoever hashes, compares or ships a state dict sees the experts too."""
    model, other = (moeq.load(packed_alike, device="cpu") for _ in range(2))
    state = model.state_dict()
    files = [read_header(path) for path in packed_alike.glob("*.safetensors")]
    stored = sum(i.stop - i.start for file in files for n, i in file.items() if "moeq_data" in n)
    assert sum(value.numel() for name, value in state.items() if name.rpartition(".")[2] == "data") == stored
    want = logits(model)
    for value in other.state_dict().values():
        value.zero_()
    assert not torch.equal(logits(other), want)
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert torch.equal(logits(other), want)
    assert torch.equal(logits(moeq.load(packed_alike, device="cpu")), want)  # the file is as it was


def test_packed_bytes_are_counted_when_a_model_is_shared_out(packed_alike: Path) -> None:
    """`device_map="auto"` and `max_memory` look at the model before its bytes are there."""
    seen: dict[str, Any] = {}

    def look(model: Any, device_map: Any, max_memory: Any, hf_quantizer: Any) -> Any:
        total = compute_module_sizes(model, hf_quantizer)[0][""]
        half = total * 6 // 10
        memory = {"cpu": half, "disk": total}
        shared = infer_auto_device_map(model, memory, model._no_split_modules, hf_quantizer=hf_quantizer)
        seen.update(total=total, shared=shared, blocks=compute_module_sizes(model, hf_quantizer)[0], half=half)
        return {"": torch.device("cpu")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils._get_device_map", look)
        model = AutoModelForCausalLM.from_pretrained(packed_alike, device_map="auto")
    files = [read_header(path) for path in packed_alike.glob("*.safetensors")]
    stored = sum(info.stop - info.start for file in files for info in file.values())
    assert abs(seen["total"] - stored) < 0.01 * stored + 4096  # buffers of positions are not in the files
    assert len(set(seen["shared"].values())) == 2
    on_cpu = sum(seen["blocks"][name] for name, device in seen["shared"].items() if device == "cpu")
    assert 0.3 * seen["half"] < on_cpu <= seen["half"]
    assert not any("bytes_to_come" in name for name, _ in model.named_buffers())
    assert torch.equal(logits(model), logits(moeq.load(packed_alike, device="cpu")))

"""GGUF files as sources: what they unfold to, from file to packed model, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_files
import moeq
from moeq import cli
from moeq.arch.gguf_source import open_source
from moeq.errors import CheckpointError, MissingTensorError, TensorError
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import plan
from often import by_day

WIDE = 768
"""Of experts: what transformers' reader takes all experts of qwen3moe for, whatever the file says."""


HARD = "The  experts of a layer\n\nshare nothing: 12345, IT'S é 日本\n\t x"
"""Ways to split text differ in numbers, blanks and capitals."""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 51).view(2, 24) % 100, use_cache=False).logits.float()


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_a_model_written_as_gguf_is_the_same_model(family: str, tmp_path: Path, demo_dir: Path) -> None:
    """Also where transformers' own reader is wrong: widths of experts, gpt-oss."""
    model = gguf_files.tiny(family)
    file = gguf_files.write(model, demo_dir, tmp_path / "m.gguf")
    unfolded = open_source(file)
    found = load_any(unfolded, "cpu", torch.float32)
    assert set(found.state_dict()) == set(model.state_dict())
    assert (logits(found) - logits(model)).abs().max() < 1e-5
    assert open_source(file) == unfolded
    tokenizer = load_tokenizer(demo_dir)
    assert load_tokenizer(unfolded)(HARD)["input_ids"] == tokenizer(HARD)["input_ids"]
    assert found.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "gpt-4o"])
def test_text_is_split_as_the_file_says(pre: str, tmp_path: Path, demo_dir: Path) -> None:
    """Saved as the family's class, a tokenizer would split as the family does."""
    file = gguf_files.write(gguf_files.tiny("qwen3_moe"), demo_dir, tmp_path / "m.gguf", pre=pre)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert load_tokenizer(open_source(file))(HARD)["input_ids"] == theirs(HARD)["input_ids"]


KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", by_day(KINDS, {"BF16", "Q8_0", "Q2_K", "Q4_K", "Q6_K"}))
def test_weights_are_what_transformers_decodes(kind: str, tmp_path: Path, demo_dir: Path) -> None:
    model = gguf_files.tiny("qwen3_moe", inner=WIDE)
    file = gguf_files.write(model, demo_dir, tmp_path / "m.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    directory = open_source(file)
    ours = load_any(directory, "cpu", torch.float32).state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        wanted = theirs[name] if kind in ("F16", "BF16") else theirs[name].to(torch.bfloat16).float()
        if value.ndim < 2 or name.endswith("mlp.gate.weight"):
            wanted = theirs[name]
        assert torch.equal(value, wanted), name


PACKED = (("qwen3_moe", "Q4_K"), ("gpt_oss", "MXFP4"), ("qwen2_moe", "Q8_0"))


@pytest.mark.parametrize(("family", "kind"), by_day(PACKED, {("gpt_oss", "MXFP4")}))
def test_packed_is_what_the_file_decodes_to(
    family: str, kind: str, tmp_path: Path, demo_dir: Path, calibration_text: Path
) -> None:
    file = gguf_files.write(gguf_files.tiny(family), demo_dir, tmp_path / "m.gguf", kind)
    options: dict[str, Any] = {"bits": 9, "device": "cpu"}
    assert any("GGUF" in warning for warning in plan.run(file, moeq.Recipe(**options)).warnings)
    want = logits(load_any(open_source(file), "cpu", torch.float32))
    for quantizer in ("hqq", "gptq"):
        out = tmp_path / quantizer
        if quantizer == "gptq":
            options |= {"calibration": str(calibration_text), "nsamples": 4, "seqlen": 48}
        moeq.quantize(file, out, quantizer=quantizer, **options)
        found = logits(moeq.load(out, device="cpu", dtype=torch.float32, exact_activations=True))
        distance = (found - want).norm(dim=-1) / want.norm(dim=-1)
        assert distance.median() < 0.03, quantizer
        names = {path.name for path in out.iterdir()}
        assert {"config.json", "tokenizer.json"} <= names
        assert not any("gguf" in name for name in names)
        assert moeq.verify(out).logits_finite


def test_parts_and_directories(tmp_path: Path, demo_dir: Path) -> None:
    model = gguf_files.tiny("qwen3_moe")
    first = gguf_files.write(model, demo_dir, tmp_path / "m.gguf", parts=3)
    whole = logits(model)
    for given in (first, first.with_name("m-00002-of-00003.gguf"), tmp_path):
        assert torch.equal(logits(load_any(open_source(given), "cpu", torch.float32)), whole)
    gguf_files.write(model, demo_dir, tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="which GGUF file is meant") as caught:
        open_source(tmp_path)
    assert "one of them" in caught.value.fix
    first.with_name("m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="part of this model is absent"):
        open_source(first)


def test_positions_are_scaled_as_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own reader fails on such a file."""
    facts = gguf_files._facts

    def more(writer: gguf.GGUFWriter, config: Any) -> None:
        facts(writer, config)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    monkeypatch.setattr(gguf_files, "_facts", more)
    directory = open_source(gguf_files.write(gguf_files.tiny("gpt_oss"), None, tmp_path / "m.gguf"))
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 8.0, 64)


def test_experts_of_unlike_types_and_a_tensor_nobody_knows(tmp_path: Path, demo_dir: Path) -> None:
    """Mixes of llama.cpp give gate, up and down types of their own; what the model has no use for is kept."""
    model = gguf_files.tiny("qwen3_moe")
    path = tmp_path / "m.gguf"
    kinds = {"gate": "Q8_0", "up": "Q4_0", "down": "F16"}

    def add(writer: gguf.GGUFWriter, name: str, value: Any, kind: Any, seed: int) -> None:
        named = next((each for key, each in kinds.items() if f"ffn_{key}_exps" in name), "F32")
        original(writer, name, value, gguf.GGMLQuantizationType[named], seed)
        if name == "output_norm.weight":
            writer.add_tensor("rope_freqs.weight", value[:8])

    original = gguf_files._add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_files, "_add", add)
        gguf_files.write(model, demo_dir, path)
    out = tmp_path / "out"
    moeq.quantize(path, out, bits=9, device="cpu", method="uniform", calibration="none")
    want = logits(load_any(open_source(path), "cpu", torch.float32))
    found = logits(moeq.load(out, device="cpu", dtype=torch.float32, exact_activations=True))
    assert ((found - want).norm() / want.norm()) < 0.03
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert "rope_freqs.weight" in index["weight_map"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4096])


def garbled(file: Path) -> None:
    file.write_bytes(b"GGUF" + b"\xff" * 4096)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def poisoned(file: Path) -> None:
    """A scale of an expert is NaN."""
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(each for each in reader.tensors if "ffn_up_exps" in each.name)
    tensor.data.reshape(-1)[:2] = [0xFF, 0x7F]
    reader.data.flush()


@pytest.mark.parametrize("hurt", [cut, garbled, empty, poisoned])
def test_broken_files(hurt: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = gguf_files.write(gguf_files.tiny("qwen3_moe"), None, tmp_path / "m.gguf", "Q8_0")
    hurt(file)
    out = tmp_path / "out"
    assert cli.main(["quantize", str(file), str(out), "--bits", "4", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)
    assert error["error"] in ("CheckpointError", "TensorError", "HeaderError")
    assert "Fix: " in error["message"]
    assert "m.gguf" in json.dumps(error)
    assert not out.exists()


def test_files_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_files.tiny("qwen3_moe")
    monkeypatch.setitem(gguf_files.ARCHITECTURES, "qwen3_moe", "qwen3moe")
    without = gguf_files.write(model, None, tmp_path / "a.gguf", drop="blk.1.ffn_up_exps.weight")
    with pytest.raises(MissingTensorError, match="no tensor for it") as caught:
        open_source(without)
    assert caught.value.tensor == "model.layers.1.mlp.experts.gate_up_proj"
    facts = gguf_files._facts

    def fewer(writer: gguf.GGUFWriter, config: Any) -> None:
        config.num_experts = 8
        facts(writer, config)

    monkeypatch.setattr(gguf_files, "_facts", fewer)
    with pytest.raises(TensorError, match="wanted"):
        open_source(gguf_files.write(model, None, tmp_path / "b.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
    writer.add_expert_count(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'llama' is not read"):
        open_source(tmp_path / "c.gguf")


def test_one_tensor_is_decoded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for an expert's matrix decodes no other expert."""
    from moeq.checkpoint.rounded import gguf as form

    file = gguf_files.write(gguf_files.tiny("qwen3_moe"), None, tmp_path / "m.gguf", "Q8_0")
    sizes: list[int] = []
    original = form._values
    monkeypatch.setattr(form, "_values", lambda stored, kind: sizes.append(stored.numel()) or original(stored, kind))
    moeq.quantize(file, tmp_path / "out", bits=5, device="cpu")
    assert max(sizes[1:-1]) <= 4096 * 256 * 34 // 32  # embeddings, which are copied
    experts = [size for size in sizes if size == 256 * 256 * 34 // 32]
    assert len(experts) >= 2 * 4 * 3

"""GGUF exports: the same weights, and all that a program needs beside them."""

import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gguf_files
import moeq
import zoo
from moeq import cli
from moeq.arch.gguf_source import open_source
from moeq.artifacts import Plan
from moeq.errors import BudgetError, CheckpointError, OptionError, OutputError
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import export
from moeq.writing import gguf_file

FEW: dict[str, Any] = {"nsamples": 4, "seqlen": 64, "device": "cpu", "quality": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path) -> Path:
    """A model whose sides are whole blocks of 256, with the demo's tokenizer."""
    out = tmp_path_factory.mktemp("gguf") / "source"
    gguf_files.tiny("qwen3_moe").to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_dir / name, out / name)
    return out


@pytest.fixture(scope="module")
def packed(source: Path, calibration_text: Path) -> Path:
    """The model in types of ggml, mixed, other linears too."""
    out = source.parent / "packed"
    moeq.quantize(
        source, out, method="gemq", serve="gguf", bits=3.9, dense_bits="attention=8,lm_head=6",
        calibration=calibration_text, **FEW,
    )  # fmt: skip
    return out


def tiny(model_type: str, out: Path) -> None:
    """A random model of a family whose sides are blocks of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "vocab_size": 4096, "num_experts": 4, "num_local_experts": 4}
    config = AutoConfig.for_model(model_type, **sizes, **more, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)


def widths(directory: Path) -> list[list[set[int]]]:
    """Layer -> projection -> widths of its experts."""
    plan = Plan.load(directory / "moeq_plan.json")
    return [[{plan.specs[row[at]].bits for row in layer} for at in range(3)] for layer in plan.experts]


def tensors(file: Path) -> dict[str, Any]:
    """Name -> tensor."""
    return {str(tensor.name): tensor for tensor in gguf.GGUFReader(file).tensors}


def test_a_kind_of_matrix_has_one_width_in_a_layer(packed: Path) -> None:
    found = widths(packed)
    assert all(len(kind) == 1 for layer in found for kind in layer)
    assert len({frozenset(kind) for layer in found for kind in layer}) > 1


def test_the_file_is_the_packed_model(packed: Path, tmp_path: Path) -> None:
    """Read by way of transformers' names; blocks come back in bfloat16, in which the others are stored."""
    report = export.run(packed, tmp_path / "m.gguf", form="gguf", embeddings=16)
    assert report.checked >= 2 * 3 * 2
    assert report.stored_bytes == (tmp_path / "m.gguf").stat().st_size
    found = load_any(open_source(tmp_path / "m.gguf"), "cpu", torch.float32).state_dict()
    ours = moeq.load(packed, device="cpu", dtype="float32", exact_activations=True)
    for layer in range(2):
        experts = ours.get_submodule(f"model.layers.{layer}.mlp.experts")._modules["moeq"]
        for at in range(4):
            parts = [experts.weights(at, name) for name in ("gate", "up", "down")]
            assert torch.equal(
                found[f"model.layers.{layer}.mlp.experts.gate_up_proj"][at], torch.cat(parts[:2]).bfloat16().float()
            )
            assert torch.equal(found[f"model.layers.{layer}.mlp.experts.down_proj"][at], parts[2].bfloat16().float())
    ids_NT = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        wanted = ours(input_ids=ids_NT).logits
        logits = load_any(open_source(tmp_path / "m.gguf"), "cpu", torch.float32)(input_ids=ids_NT).logits
    assert (logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    text = "Two  hundred\nand 12345 IT'S é"
    assert (
        load_tokenizer(open_source(tmp_path / "m.gguf"))(text)["input_ids"] == load_tokenizer(packed)(text)["input_ids"]
    )


def test_embeddings_are_rounded(packed: Path, tmp_path: Path) -> None:
    report = export.run(packed, tmp_path / "m.gguf", form="gguf", embeddings=4)
    found = tensors(tmp_path / "m.gguf")
    assert found["token_embd.weight"].tensor_type.name == "Q4_K"
    assert found["output.weight"].tensor_type.name == "Q6_K"  # packed before
    assert found["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert report.types["token_embd.weight"] == "q4_k"
    assert set(report.types.values()) <= {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"}
    original = load_any(packed, "cpu", torch.float32).get_input_embeddings().weight
    embedded = torch.from_numpy(
        gguf.quants.dequantize(found["token_embd.weight"].data, found["token_embd.weight"].tensor_type).copy()
    )
    assert 0 < (embedded - original).square().mean() / original.square().mean() < 0.01


def test_everything_else_from_a_file_of_llama_cpp(source: Path, packed: Path, demo_dir: Path, tmp_path: Path) -> None:
    model = load_any(source, "cpu", torch.float32)
    like = gguf_files.write(model, demo_dir, tmp_path / "like.gguf", "F16")
    export.run(packed, tmp_path / "m.gguf", form="gguf", like=like, embeddings=16)
    export.run(packed, tmp_path / "own.gguf", form="gguf", embeddings=16)
    one, other, theirs = (tensors(tmp_path / name) for name in ("m.gguf", "own.gguf", "like.gguf"))
    assert list(one) == list(theirs)
    assert set(one) == set(other)
    assert all(one[name].data.tobytes() == other[name].data.tobytes() for name in one if "exps" in name)
    assert one["token_embd.weight"].data.tobytes() == theirs["token_embd.weight"].data.tobytes()
    facts = gguf.GGUFReader(like).fields, gguf.GGUFReader(tmp_path / "m.gguf").fields
    for name, field in facts[0].items():
        if not name.startswith("GGUF."):
            assert facts[1][name].contents() == field.contents(), name
    assert "quantized_by" in " ".join(facts[1])


def test_another_model_s_file_is_refused(packed: Path, demo_dir: Path, tmp_path: Path) -> None:
    same_shape = gguf_files.write(gguf_files.tiny("qwen3_moe", seed=5), demo_dir, tmp_path / "like.gguf", "F16")
    with pytest.raises(OptionError, match="another matrix than was packed"):
        export.run(packed, tmp_path / "m.gguf", form="gguf", like=same_shape)
    other = gguf_files.write(gguf_files.tiny("qwen3_moe", inner=512), demo_dir, tmp_path / "other.gguf", "F16")
    with pytest.raises(OptionError, match=r"\[4, 256, 256\] here"):
        export.run(packed, tmp_path / "m.gguf", form="gguf", like=other)
    (tmp_path / "no.gguf").write_bytes(b"GGUF is a name")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        export.run(packed, tmp_path / "m.gguf", form="gguf", like=tmp_path / "no.gguf")
    assert not (tmp_path / "m.gguf").exists()
    assert not (tmp_path / "m.gguf.partial").exists()


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_families(family: str, demo_dir: Path, tmp_path: Path) -> None:
    """With shared experts; and one that transformers does not read from GGUF."""
    if family == "olmoe":
        tiny(family, tmp_path / "source")
    else:
        gguf_files.tiny(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    shutil.copy(demo_dir / "tokenizer.json", tmp_path / "source")
    moeq.quantize(
        tmp_path / "source", tmp_path / "packed", method="uniform", serve="gguf", bits=6, calibration="none", **FEW
    )
    export.run(tmp_path / "packed", tmp_path / "m.gguf", form="gguf", embeddings=16)
    found = tensors(tmp_path / "m.gguf")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kinds[family.replace("_", "")]]}
    assert {re.sub(r"\.\d+\.", ".{bid}.", name).rpartition(".")[0] for name in found} <= known
    assert found["blk.1.ffn_down_exps.weight"].tensor_type.name.startswith("Q")
    if family == "qwen2_moe":
        ids_NT = torch.arange(3, 67).view(2, 32)
        with torch.no_grad():
            wanted = moeq.load(tmp_path / "packed", device="cpu", dtype="float32", exact_activations=True)(
                input_ids=ids_NT
            ).logits
            logits = load_any(open_source(tmp_path / "m.gguf"), "cpu", torch.float32)(input_ids=ids_NT).logits
        assert (logits - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_what_it_cannot_hold(packed_demo: Path, packed: Path, demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="quantize with --serve gguf"):
        export.run(packed_demo, tmp_path / "m.gguf", form="gguf")
    with pytest.raises(OptionError, match="like"):
        export.run(packed, tmp_path / "out", like=tmp_path / "x.gguf")
    with pytest.raises(OptionError, match="embeddings"):
        export.run(packed, tmp_path / "m.gguf", form="gguf", embeddings=7)
    with pytest.raises(OutputError, match="exists"):
        export.run(packed, demo_dir, form="gguf")
    with pytest.raises(OutputError, match="lies in the input"):
        export.run(packed, packed / "m.gguf", form="gguf")
    with pytest.raises(OptionError, match="quantize with --serve vllm-native"):
        export.run(packed, tmp_path / "out")
    with pytest.raises(BudgetError, match=r"give at least 2\.6"):
        moeq.plan(packed.parent / "source", method="uniform", serve="gguf", bits=2.2, calibration="none")
    tiny("mixtral", tmp_path / "source")
    moeq.quantize(
        tmp_path / "source", tmp_path / "mixtral", method="uniform", serve="gguf", bits=6, calibration="none", **FEW
    )
    with pytest.raises(OptionError, match=r"not mixtral.*--like"):
        export.run(tmp_path / "mixtral", tmp_path / "m.gguf", form="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_inputs_that_are_no_whole_blocks(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path / "source", dtype=torch.float32)
    with pytest.raises(OptionError, match=r"40 inputs are no whole blocks of 32"):
        moeq.plan(tmp_path / "source", method="uniform", serve="gguf", bits=6, calibration="none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gemq", "quantizer": "trellis"}, "nothing of trellis"),
        ({"method": "bitsmoe"}, "nothing of bitsmoe"),
        ({"method": "gemq", "levels": "sym"}, "nothing of sym"),
        ({"method": "gemq", "candidates": "1,2"}, "nothing of 1,2"),
    ],
)
def test_wrong_options(options: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        moeq.Recipe(**{"serve": "gguf", "bits": 3, **options})


def test_nothing_stays_of_what_failed(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_file, "check", full)
    with pytest.raises(KeyboardInterrupt):
        export.run(packed, tmp_path / "m.gguf", form="gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_command(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "gguf", str(packed), str(tmp_path / "m.gguf")]) == 0
    assert f"llama-cli -m {tmp_path / 'm.gguf'}" in capsys.readouterr().out


def test_a_plan_says_what_one_width_for_a_kind_costs(source: Path, tmp_path: Path) -> None:
    """Where other linears share the budget too."""
    options = {"method": "gemq", "cost": "weight-error", "serve": "gguf", "dense_bits": "attention=auto"}
    costs = tmp_path / "costs"
    moeq.measure(source, **options, calibration="none", size="5.6MB").save(costs)
    said = " ".join(moeq.plan(source, **options, calibration="none", costs=costs, size="5.6MB").warnings)
    found = re.search(r"one width for gate, for up and for down of a layer costs ([\d.]+) % of predicted loss", said)
    assert found, said

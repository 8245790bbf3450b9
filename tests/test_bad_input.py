"""Broken source checkpoints: each is refused by the right error, and nothing is left that looks complete."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moeq
from hostile import OPTIONS, WEIGHTS, copy_of, edit_header, edit_json, edit_tensors, no_partial, refused, split
from moeq import cli, errors

EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

Break = Callable[[Path], object]


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    return lambda source: edit_header(source / WEIGHTS, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    return lambda source: edit_tensors(source, change)


def config(**changes: Any) -> Break:
    return lambda source: edit_json(source / "config.json", lambda data: data.update(changes))


def cut(size: int) -> Break:
    return lambda source: (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:size])


def prefix(length: int) -> Break:
    """Let the file claim a header of `length` bytes."""
    return lambda source: (source / WEIGHTS).write_bytes(
        length.to_bytes(8, "little") + (source / WEIGHTS).read_bytes()[8:]
    )


def append(data: bytes) -> Break:
    return lambda source: (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes() + data)


def overlap(entries: dict[str, Any]) -> None:
    first = entries["model.layers.1.mlp.experts.0.down_proj.weight"]["data_offsets"]
    entries[EXPERT]["data_offsets"] = list(first)


def out_of_range(entries: dict[str, Any]) -> None:
    last = max(entries, key=lambda name: entries[name].get("data_offsets", [0])[-1])
    start, stop = entries[last]["data_offsets"]
    entries[last]["data_offsets"] = [start + 10**9, stop + 10**9]


def index(change: Callable[[dict[str, str]], object]) -> Break:
    return lambda source: edit_json(split(source), lambda data: change(data["weight_map"]))


def fill(name: str, value: float) -> Break:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[name].view(-1)[-1] = value

    return tensors(change)


def cast(name: str, dtype: torch.dtype) -> Break:
    return tensors(lambda found: found.update({name: found[name].to(dtype)}))


def reshape(name: str, *shape: int) -> Break:
    return tensors(lambda found: found.update({name: torch.ones(shape, dtype=torch.bfloat16)}))


def write(name: str, text: str | bytes) -> Break:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda source: (source / name).write_bytes(data)


def remove(name: str) -> Break:
    return lambda source: (source / name).unlink()


def pickles(source: Path) -> None:
    (source / WEIGHTS).rename(source / "pytorch_model.bin")


def dense_model(source: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama.save_pretrained(source)


def deepest(count: int) -> str:
    return '{"a":' * count + "1" + "}" * count


BROKEN: dict[str, tuple[Break, type[errors.MoeqError], tuple[str, ...]]] = {
    "truncated data": (cut(-100), errors.HeaderError, (WEIGHTS,)),
    "truncated header": (cut(60), errors.HeaderError, (WEIGHTS,)),
    "empty shard": (cut(0), errors.HeaderError, (WEIGHTS, "0 bytes")),
    "huge header length": (prefix(2**62), errors.HeaderError, (WEIGHTS,)),
    "overlapping offsets": (header(overlap), errors.HeaderError, (WEIGHTS, "overlaps")),
    "out-of-range offsets": (header(out_of_range), errors.HeaderError, (WEIGHTS, "the data ends at byte 1000")),
    "swapped offsets": (
        header(lambda entries: entries[EXPERT]["data_offsets"].reverse()), errors.HeaderError, (WEIGHTS, EXPERT),
    ),
    "trailing bytes": (append(b"\0" * 16), errors.HeaderError, (WEIGHTS, "16 bytes")),
    "unknown dtype": (header(lambda entries: entries[EXPERT].update(dtype="F12")), errors.HeaderError, (EXPERT, "F12")),
    "index names a missing file": (
        index(lambda names: names.update({EXPERT: "c.safetensors"})), errors.MissingTensorError, ("c.safetensors",),
    ),
    "index leads out of the directory": (
        index(lambda names: names.update({EXPERT: "../a.safetensors"})), errors.HeaderError, ("index.json", "../a"),
    ),
    "index without map": (lambda source: split(source).write_text("{}"), errors.HeaderError, ("index.json",)),
    "missing expert": (tensors(lambda found: found.pop(EXPERT)), errors.MissingTensorError, (EXPERT,)),
    "missing router": (tensors(lambda found: found.pop(ROUTER)), errors.MissingTensorError, (ROUTER,)),
    "missing linear": (tensors(lambda found: found.pop(QUERY)), errors.MissingTensorError, (QUERY,)),
    "missing norm": (tensors(lambda found: found.pop(NORM)), errors.MissingTensorError, (NORM,)),
    "wrong shape of an expert": (reshape(EXPERT, 64, 41), errors.TensorError, (EXPERT, "[64, 41]")),
    "wrong shape of a router": (reshape(ROUTER, 5, 64), errors.TensorError, (ROUTER, "[5, 64]")),
    "wrong shape of a linear": (reshape(QUERY, 64, 65), errors.TensorError, (QUERY, "[64, 65]")),
    "integer expert": (cast(EXPERT, torch.int8), errors.AlreadyQuantizedError, (EXPERT, "I8")),
    "8-bit float expert": (cast(EXPERT, torch.float8_e4m3fn), errors.AlreadyQuantizedError, (EXPERT, "F8_E4M3")),
    "double expert": (cast(EXPERT, torch.float64), errors.TensorError, (EXPERT, "F64")),
    "boolean expert": (cast(EXPERT, torch.bool), errors.TensorError, (EXPERT, "BOOL")),
    "boolean linear": (cast(QUERY, torch.bool), errors.TensorError, (QUERY, "BOOL")),
    "NaN expert": (fill(EXPERT, float("nan")), errors.TensorError, (EXPERT, WEIGHTS, "NaN")),
    "infinite expert": (fill(EXPERT, float("inf")), errors.TensorError, (EXPERT, WEIGHTS, "infinity")),
    "NaN router": (fill(ROUTER, float("nan")), errors.TensorError, (ROUTER, WEIGHTS, "NaN")),
    "infinite linear": (fill(QUERY, float("-inf")), errors.TensorError, (QUERY, WEIGHTS)),
    "NaN embedding": (fill("model.embed_tokens.weight", float("nan")), errors.TensorError, ("embed_tokens", "NaN")),
    "not an MoE": (dense_model, errors.NotMoeError, ("LlamaForCausalLM", "config.json")),
    "quantized": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}), errors.AlreadyQuantizedError, ("config.json",),
    ),
    "unknown quant method": (
        config(quantization_config={"quant_method": "frobnicate"}), errors.AlreadyQuantizedError, ("config.json",),
    ),
    "fewer experts than the config": (config(num_local_experts=5), errors.MissingTensorError, (".experts.4.",)),
    "more experts than the config": (config(num_local_experts=3), errors.TensorError, ("experts", "config.json")),
    "more experts per token than experts": (config(num_experts_per_tok=9), errors.CheckpointError, ("config.json",)),
    "more layers in the config": (config(num_hidden_layers=4), errors.MissingTensorError, ("layers.3.",)),
    "another width in the config": (config(hidden_size=128), errors.TensorError, ("experts",)),
    "impossible config": (config(num_attention_heads=-3), errors.CheckpointError, ("config.json",)),
    "unknown family": (config(model_type="frobnicate"), errors.CheckpointError, ("config.json", "frobnicate")),
    "no config": (remove("config.json"), errors.CheckpointError, ("config.json",)),
    "config is not JSON": (write("config.json", "{"), errors.CheckpointError, ("config.json",)),
    "config is not UTF-8": (write("config.json", b'{"a": "\xff"}'), errors.CheckpointError, ("config.json",)),
    "config is nested deeply": (write("config.json", deepest(100_000)), errors.CheckpointError, ("config.json",)),
    "config is a list": (write("config.json", "[]"), errors.CheckpointError, ("config.json",)),
    "no weights": (remove(WEIGHTS), errors.CheckpointError, (WEIGHTS,)),
    "pickled weights": (pickles, errors.CheckpointError, ("pickle", "safetensors")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_source(case: str, tiny_dir: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    breaking, kind, words = BROKEN[case]
    source, out = copy_of(tiny_dir, tmp_path / "source"), tmp_path / "out"
    breaking(source)
    refused(kind, lambda: moeq.quantize(source, out, dense_bits="8", **OPTIONS), *words)
    no_partial(out)


@pytest.mark.parametrize("case", ["truncated data", "missing expert", "not an MoE", "quantized", "no config"])
@pytest.mark.parametrize("verb", ["plan", "inspect", "quantize"])
def test_broken_source_on_the_command_line(
    case: str, verb: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking, kind, words = BROKEN[case]
    source, out = copy_of(tiny_dir, tmp_path / "source"), tmp_path / "out"
    breaking(source)
    rest = {"plan": ["--bits", "5"], "inspect": [], "quantize": [str(out), "--bits", "5"]}[verb]
    assert cli.main([verb, str(source), *rest, "--json"]) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["error"] == kind.__name__
    assert all(word in document["message"] for word in words)
    assert printed.err.strip() == f"moeq {verb}: {document['message']}"
    no_partial(out)


@pytest.mark.parametrize("verb", ["plan", "inspect"])
@pytest.mark.parametrize(
    "case", [name for name in BROKEN if "NaN" not in name and "infinite" not in name and name != "boolean linear"]
)
def test_everything_but_bad_values_is_found_before_weights_are_read(
    case: str, verb: str, tiny_dir: Path, tmp_path: Path
) -> None:
    breaking, kind, words = BROKEN[case]
    source = copy_of(tiny_dir, tmp_path / "source")
    breaking(source)
    call = {"plan": lambda: moeq.plan(source, **OPTIONS), "inspect": lambda: moeq.inspect(source)}[verb]
    refused(kind, call, *words)


def test_the_model_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    missing = tmp_path / "nothing"
    refused(errors.CheckpointError, lambda: moeq.quantize(missing, out, **OPTIONS), str(missing), out=out)
    refused(errors.CheckpointError, lambda: moeq.evaluate(missing, "x.txt"), str(missing))
    refused(errors.CheckpointError, lambda: moeq.plan(str(missing), **OPTIONS), str(missing))


def test_the_model_is_a_file(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = lambda: moeq.quantize(tiny_dir / WEIGHTS, out, **OPTIONS)  # noqa: E731
    refused(errors.CheckpointError, call, WEIGHTS, str(tiny_dir), out=out)
    no_partial(out)


def test_a_packed_checkpoint_is_not_packed_again(packed_tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = lambda: moeq.quantize(packed_tiny, out, **OPTIONS)  # noqa: E731
    refused(errors.AlreadyQuantizedError, call, "config.json", "original", out=out)
    no_partial(out)


def test_a_link_leads_out_of_the_model(tiny_dir: Path, tmp_path: Path) -> None:
    source, out = copy_of(tiny_dir, tmp_path / "source"), tmp_path / "out"
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (source / "notes.json").symlink_to(tmp_path / "secret")
    call = lambda: moeq.quantize(source, out, **OPTIONS)  # noqa: E731
    refused(errors.CheckpointError, call, "notes.json", "link", out=out)
    no_partial(out)


def test_an_evaluated_model_is_broken(tiny_dir: Path, text_dir: Path, demo_dir: Path, tmp_path: Path) -> None:
    source = copy_of(demo_dir, tmp_path / "demo")
    edit_json(source / "config.json", lambda data: data.update(hidden_size=64))
    text = text_dir / "eval.txt"
    refused(errors.CheckpointError, lambda: moeq.evaluate(source, text, max_tokens=64, seqlen=64), str(source))
    mute = copy_of(tiny_dir, tmp_path / "mute")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    refused(errors.CheckpointError, lambda: moeq.evaluate(mute, text), "tokenizer", str(mute))

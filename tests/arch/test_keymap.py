from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import zoo
from moeq.arch.discover import discover
from moeq.arch.keymap import build_keymap, load_prefix, unload_prefix
from moeq.arch.meta import build_meta_model
from moeq.checkpoint.read import read_headers
from moeq.errors import MissingTensorError, TensorError

FAMILIES = list(zoo.FAMILIES)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def everything(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    ours, theirs = everything(model), everything(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def from_pretrained(model_type: str, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    return getattr(transformers, zoo.FAMILIES[model_type].architecture).from_pretrained(directory, dtype=dtype)


Tiny = Callable[[str], Path]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_one_by_one_and_then_the_rest_equal_from_pretrained(model_type: str, tiny: Tiny) -> None:
    directory = tiny(model_type)
    tensors = tensors_of(directory)
    model = build_meta_model(directory)
    keymap = build_keymap(model, tensors)
    blocks = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    assert blocks
    for block in blocks:
        load_prefix(model, block, keymap, tensors.__getitem__, torch.bfloat16)
    load_prefix(model, "", keymap, tensors.__getitem__, torch.bfloat16, skip=blocks)
    assert_same(model, from_pretrained(model_type, directory, torch.bfloat16))


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "qwen3_next", "deepseek_v3", "gemma4", "jamba", "inkling_mm_model", "gpt_oss"]
)
def test_a_bfloat16_checkpoint_can_be_loaded_as_float32(model_type: str, tiny: Tiny) -> None:
    directory = tiny(model_type)
    tensors = tensors_of(directory)
    model = build_meta_model(directory)
    load_prefix(model, "", build_keymap(model, tensors), tensors.__getitem__, torch.float32)
    expected = from_pretrained(model_type, directory, torch.float32)
    assert_same(model, expected)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_experts_can_be_left_out_and_blocks_unloaded(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    headers = read_headers(tmp_path)
    tensors = tensors_of(tmp_path)
    model = build_meta_model(tmp_path)
    keymap = build_keymap(model, headers)
    layer = discover(tmp_path, headers).layers[1]
    read: list[str] = []

    def reading(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    stacks = {f"{layer.path}.gate_up_proj", f"{layer.path}.down_proj"}
    load_prefix(model, layer.block, keymap, reading, torch.float32, skip=stacks)
    assert not any(".experts." in name for name in read)
    assert all(name.startswith(layer.block) for name in read)
    on_cpu = {name for name, value in everything(model).items() if not value.is_meta}
    assert on_cpu == {name for name in everything(model) if name.startswith(layer.block + ".")} - stacks
    unload_prefix(model, layer.block)
    assert all(value.is_meta for value in everything(model).values())
    load_prefix(model, layer.block, keymap, tensors.__getitem__, torch.float32)
    path = f"{layer.block}.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(path), tensors[path])


def test_reloading_recomputes_buffers(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    tensors = tensors_of(tmp_path)
    model = build_meta_model(tmp_path)
    keymap = build_keymap(model, tensors)
    for _ in range(2):
        load_prefix(model, "model.rotary_emb", keymap, tensors.__getitem__, torch.float32)
        expected = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
        torch.testing.assert_close(model.get_buffer("model.rotary_emb.inv_freq"), expected)
        unload_prefix(model, "model.rotary_emb")


def test_tied_head_comes_from_the_embedding(tmp_path: Path) -> None:
    zoo.make_tiny("gemma4_text", tmp_path)
    tensors = tensors_of(tmp_path)
    model = build_meta_model(tmp_path)
    assert "lm_head.weight" not in tensors
    load_prefix(model, "lm_head", build_keymap(model, tensors), tensors.__getitem__, torch.float32)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.get_parameter("model.embed_tokens.weight")


def test_unknown_tensors_are_unused(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    names = [*read_headers(tmp_path), "mtp.layers.0.norm.weight", "model.layers.9.mlp.experts.0.up_proj.weight"]
    model = build_meta_model(tmp_path)
    keymap = build_keymap(model, names)
    assert set(keymap.unused) == set(names[-2:])
    assert keymap.routes.keys() == model.state_dict().keys()


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    model = build_meta_model(tmp_path)
    with pytest.raises(MissingTensorError) as caught:
        load_prefix(model, "model.layers.0", build_keymap(model, tensors), tensors.__getitem__, torch.float32)
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.weight"


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    tensors = tensors_of(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-1]
    model = build_meta_model(tmp_path)
    with pytest.raises(TensorError, match=r"\[63, 64\] is not the \[64, 64\]") as caught:
        load_prefix(model, "model.layers.0", build_keymap(model, tensors), tensors.__getitem__, torch.float32)
    assert caught.value.tensor == name


def test_inconsistent_experts_are_an_error(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    tensors = tensors_of(tmp_path)
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    tensors[name] = tensors[name][:-1]
    model = build_meta_model(tmp_path)
    with pytest.raises(TensorError, match="cannot convert"):
        load_prefix(model, "model.layers.0", build_keymap(model, tensors), tensors.__getitem__, torch.float32)

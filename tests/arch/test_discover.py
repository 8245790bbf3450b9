import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose

import zoo
from moeq.arch.discover import Discovery, decoder_blocks, discover, discover_model, is_experts
from moeq.arch.keymap import KeyMap, Route, build_keymap
from moeq.arch.meta import build_meta_model
from moeq.arch.sorted_rows import adopt, top_k_index
from moeq.checkpoint.read import read_headers
from moeq.errors import (
    AlreadyQuantizedError,
    CheckpointError,
    MissingTensorError,
    NotMoeError,
    TensorError,
)
from moeq.model_parts import MatrixSource, MoeLayer
from moeq.spec import TensorInfo

Tiny = Callable[[str], Path]

UNSUPPORTED = {"diffusion_gemma": "shares its experts between two modules"}
SUPPORTED = [name for name in zoo.FAMILIES if name not in UNSUPPORTED]


def load(model_type: str, directory: Path) -> PreTrainedModel:
    architecture = getattr(transformers, zoo.FAMILIES[model_type].architecture)
    model: PreTrainedModel = architecture.from_pretrained(directory)
    adopt(model)
    return model


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def from_disk(tensors: dict[str, Tensor], source: MatrixSource, expert: int, rows: int) -> Tensor:
    w = tensors[source.tensor(expert)]
    if source.stacked:
        w = w[expert + source.expert_offset]
    if source.transposed:
        w = w.T
    return w[source.start :: source.step][:rows]


def from_model(experts: nn.Module, layer: MoeLayer, projection: str, expert: int) -> Tensor:
    if projection == "down":
        w = experts.down_proj[expert]
        return w.T if experts.is_transposed else w
    w = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[expert]
    w = w.T if experts.is_transposed else w
    if not experts.has_gate:
        return w
    rows = w.shape[0] // 2
    if experts.is_concatenated:
        return w[:rows] if projection == "gate" else w[rows:]
    return w[0::2] if projection == "gate" else w[1::2]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_expert_matrix_is_where_the_sources_say(model_type: str, tiny: Tiny) -> None:
    tmp_path = tiny(model_type)
    found = discover(tmp_path, read_headers(tmp_path))
    model = load(model_type, tmp_path)
    tensors = tensors_of(tmp_path)
    top_k: dict[str, int] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            top_k[path] = top_k_index(module, args, kwargs).shape[-1]

        return hook

    assert found.model_type == model_type
    assert found.architecture == type(model).__name__
    assert found.layers
    for layer in found.layers:
        experts = model.get_submodule(layer.path)
        experts.register_forward_pre_hook(note(layer.path), with_kwargs=True)
        assert layer.path.startswith(layer.block + ".")
        assert layer.num_experts == zoo.EXPERTS
        assert layer.projections == (("gate", "up", "down") if experts.has_gate else ("up", "down"))
        assert layer.shapes["up"] == layer.shapes["down"][::-1]
        for projection, source in layer.sources.items():
            for expert in range(layer.num_experts):
                expected = from_model(experts, layer, projection, expert)
                actual = from_disk(tensors, source, expert, layer.shapes[projection][0])
                assert tuple(actual.shape) == layer.shapes[projection]
                assert torch.equal(actual, expected), (projection, expert)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None])
    assert top_k == {layer.path: layer.top_k for layer in found.layers if layer.path in top_k}
    assert len(top_k) >= len(found.layers) // 2  # the vision half of two-modality layers sees no text


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_dense_linears_are_renamed_tensors_of_known_kinds(model_type: str, tiny: Tiny) -> None:
    tmp_path = tiny(model_type)
    found = discover(tmp_path, read_headers(tmp_path))
    model = load(model_type, tmp_path)
    tensors = tensors_of(tmp_path)
    blocks = decoder_blocks(model, found.layers)
    names = [linear.path for linear in found.dense]
    assert len(set(names)) == len(names)
    for linear in found.dense:
        assert torch.equal(tensors[linear.source], model.get_parameter(f"{linear.path}.weight")), linear
        assert tuple(tensors[linear.source].shape) == linear.shape
        assert min(linear.shape) >= 32
        assert linear.kind in ("attention", "shared", "dense", "lm_head")
        assert (linear.block in blocks) == (linear.kind != "lm_head")
        assert not any(word in linear.path for word in ("vision", "visual", "audio", "router"))
        assert not linear.path.endswith((".gate", "expert_gate"))
    assert any(linear.kind == "attention" for linear in found.dense)


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_unsupported_families_say_why(model_type: str, tiny: Tiny) -> None:
    assert UNSUPPORTED[model_type] in zoo.support(tiny(model_type))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "ernie4_5_vl_moe"])
def test_kinds_of_dense_linears(model_type: str, tiny: Tiny) -> None:
    tmp_path = tiny(model_type)
    found = discover(tmp_path, read_headers(tmp_path))
    kinds = {
        kind: {linear.path.split(".")[-1] for linear in found.dense if linear.kind == kind}
        for kind in ("attention", "shared", "dense", "lm_head")
    }
    projections = {"gate_proj", "up_proj", "down_proj"}
    assert kinds["attention"] == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert kinds["shared"] == (projections if model_type == "ernie4_5_vl_moe" else set())
    assert kinds["dense"] == (projections if model_type == "ernie4_5_vl_moe" else set())
    tied = load(model_type, tmp_path).config.tie_word_embeddings
    assert kinds["lm_head"] == (set() if tied else {"lm_head"})


def test_slender_gates_are_left_alone(tmp_path: Path) -> None:
    """(64, 2048) decay gates of linear attention are above the minimum size, yet no place to save bytes."""
    zoo.make_tiny("qwen3_next", tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data |= {"linear_num_value_heads": 32, "linear_value_head_dim": 16, "hidden_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(data))
    model = build_meta_model(tmp_path)
    wide = {
        key: TensorInfo(file="x", dtype="BF16", shape=tuple(value.shape), start=0, stop=0)
        for key, value in model.state_dict().items()
    }
    assert wide["model.layers.0.linear_attn.in_proj_ba.weight"].shape == (64, 2048)
    names = {linear.path for linear in discover(tmp_path, wide).dense}
    assert "model.layers.0.linear_attn.out_proj" in names
    assert "model.layers.0.linear_attn.in_proj_ba" not in names


def test_transposed_stack_of_qwen3_vl(tmp_path: Path) -> None:
    """Hub checkpoints of this family hold (E, K, N); transformers transposes them only if the shape says so."""
    zoo.make_tiny("qwen3_vl_moe", tmp_path)
    model = load("qwen3_vl_moe", tmp_path)
    tensors = tensors_of(tmp_path)
    stacked = {name: t.transpose(1, 2).contiguous() for name, t in tensors.items() if ".experts." in name}
    save_file(tensors | stacked, tmp_path / "model.safetensors", {"format": "pt"})
    found = discover(tmp_path, read_headers(tmp_path))
    tensors = tensors_of(tmp_path)
    for layer in found.layers:
        experts = model.get_submodule(layer.path)
        for projection, source in layer.sources.items():
            assert source.transposed
            actual = from_disk(tensors, source, 3, layer.shapes[projection][0])
            assert torch.equal(actual, from_model(experts, layer, projection, 3))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "nemotron_h", "granitemoe"])
def test_the_models_own_stacked_names_are_understood(model_type: str, tmp_path: Path) -> None:
    model = zoo.make_tiny(model_type, tmp_path)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    found = discover(tmp_path, read_headers(tmp_path))
    tensors = tensors_of(tmp_path)
    for layer in found.layers:
        for projection, source in layer.sources.items():
            assert source.stacked
            actual = from_disk(tensors, source, 1, layer.shapes[projection][0])
            assert torch.equal(actual, from_model(model.get_submodule(layer.path), layer, projection, 1))


def test_vision_experts_of_ernie_come_after_the_text_experts(tmp_path: Path) -> None:
    zoo.make_tiny("ernie4_5_vl_moe", tmp_path)
    found = discover(tmp_path, read_headers(tmp_path))
    offsets = {layer.path.split(".")[-2]: layer.sources["up"].expert_offset for layer in found.layers}
    assert offsets == {"text_moe": 0, "vision_moe": zoo.EXPERTS}


# Broken checkpoints


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, TensorInfo]]:
    directory = tmp_path_factory.mktemp("qwen3_moe")
    zoo.make_tiny("qwen3_moe", directory)
    return directory, read_headers(directory)


def edited(headers: dict[str, TensorInfo], name: str, **changes: Any) -> dict[str, TensorInfo]:
    old = headers[name]
    fields = {field: getattr(old, field) for field in ("file", "dtype", "shape", "start", "stop")}
    return headers | {name: TensorInfo(**{**fields, **changes})}


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_missing_expert_is_named(sound: tuple[Path, dict[str, TensorInfo]]) -> None:
    directory, headers = sound
    with pytest.raises(MissingTensorError) as caught:
        discover(directory, {name: info for name, info in headers.items() if name != EXPERT})
    assert caught.value.tensor == EXPERT


def test_missing_layer(sound: tuple[Path, dict[str, TensorInfo]]) -> None:
    directory, headers = sound
    with pytest.raises(MissingTensorError, match=r"layers\.2"):
        discover(directory, {name: info for name, info in headers.items() if ".layers.2.mlp.experts." not in name})


def test_missing_projection(sound: tuple[Path, dict[str, TensorInfo]]) -> None:
    directory, headers = sound
    with pytest.raises(MissingTensorError, match="up matrices"):
        discover(directory, {name: info for name, info in headers.items() if ".up_proj" not in name})


def test_wrong_shape_is_named(sound: tuple[Path, dict[str, TensorInfo]]) -> None:
    directory, headers = sound
    with pytest.raises(TensorError, match=r"\[40, 63\], wanted \[40, 64\]") as caught:
        discover(directory, edited(headers, EXPERT, shape=(40, 63)))
    assert caught.value.tensor == EXPERT


@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        ("F8_E4M3", AlreadyQuantizedError),
        ("I8", AlreadyQuantizedError),
        ("U8", AlreadyQuantizedError),
        ("F64", TensorError),
        ("BOOL", TensorError),
    ],
)
def test_wrong_dtype_is_named(
    sound: tuple[Path, dict[str, TensorInfo]], dtype: str, error: type[CheckpointError]
) -> None:
    directory, headers = sound
    with pytest.raises(error, match=dtype) as caught:
        discover(directory, edited(headers, EXPERT, dtype=dtype))
    assert caught.value.tensor == EXPERT


def test_more_experts_than_configured(sound: tuple[Path, dict[str, TensorInfo]]) -> None:
    directory, headers = sound
    more = {name.replace("experts.3", "experts.4"): info for name, info in headers.items() if "experts.3" in name}
    with pytest.raises(TensorError, match="5 experts are stored, unlike the config's 4"):
        discover(directory, headers | more)


def test_other_count_in_a_stacked_tensor(tmp_path: Path) -> None:
    zoo.make_tiny("granitemoe", tmp_path)
    headers = read_headers(tmp_path)
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    shape = (8, *headers[name].shape[1:])
    with pytest.raises(TensorError, match="8 experts are stored, unlike the config's 4"):
        discover(tmp_path, edited(headers, name, shape=shape))


def rewrite(source: Path, directory: Path, **changes: Any) -> Path:
    data = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    (directory / "config.json").write_text(json.dumps(data))
    return directory


def discover_changed(sound: tuple[Path, dict[str, TensorInfo]], directory: Path, **changes: Any) -> Discovery:
    return discover(rewrite(sound[0], directory, **changes), sound[1])


def test_quantized_source(sound: tuple[Path, dict[str, TensorInfo]], tmp_path: Path) -> None:
    with pytest.raises(AlreadyQuantizedError, match="packed checkpoint"):
        discover_changed(sound, tmp_path, quantization_config={"quant_method": "moeq"})


def test_dense_model(sound: tuple[Path, dict[str, TensorInfo]], tmp_path: Path) -> None:
    with pytest.raises(NotMoeError, match="Fix:"):
        discover_changed(sound, tmp_path, mlp_only_layers=[0, 1, 2])


def test_top_k_above_the_experts(sound: tuple[Path, dict[str, TensorInfo]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 9"):
        discover_changed(sound, tmp_path, num_experts_per_tok=9)


def test_unknown_operations_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A family that stores its experts in a new way must not be guessed at."""
    zoo.make_tiny("granitemoe", tmp_path)
    headers = read_headers(tmp_path)
    model = build_meta_model(tmp_path)
    keymap = build_keymap(model, headers)
    key = "model.layers.0.block_sparse_moe.experts.down_proj"
    odd = Route(targets=(key,), sources=keymap.routes[key].sources, operations=(Transpose(0, 1),))
    with pytest.raises(CheckpointError, match=r"granitemoe stores its experts.*Transpose"):
        discover_model(
            model,
            KeyMap(routes=keymap.routes | {key: odd}, unused=(), transforms=keymap.transforms),
            headers,
            tmp_path / "config.json",
        )


def test_is_experts_needs_flags_and_stacked_weights() -> None:
    assert not is_experts(nn.Linear(2, 2))
    bare = nn.Module()
    bare.down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    assert not is_experts(bare)
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        setattr(bare, flag, False)
    assert is_experts(bare)

import json
from pathlib import Path

import pytest
import torch

import zoo
from moeq.arch.meta import build_meta_model
from moeq.errors import CheckpointError


def write(directory: Path, **data: object) -> Path:
    (directory / "config.json").write_text(json.dumps(data))
    return directory


def test_meta_model_has_the_class_of_the_config_and_no_weights(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    model = build_meta_model(tmp_path)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not model.training
    assert build_meta_model(tmp_path, torch.float32).dtype == torch.float32


def test_foreign_architecture_falls_back_to_the_causal_model(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for names in (["SomebodysOwnModel"], ["MixtralForCausalLM"], ["Path"], [3], None):
        write(tmp_path, **{**data, "architectures": names})
        assert type(build_meta_model(tmp_path)).__name__ == "Qwen3MoeForCausalLM"


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        build_meta_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 100_000])
def test_malformed_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        build_meta_model(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")


@pytest.mark.parametrize("model_type", [None, "no_such_model", 7, ["mixtral"]])
def test_unknown_model_type(model_type: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not know the model type"):
        build_meta_model(write(tmp_path, model_type=model_type, auto_map={"AutoConfig": "evil.Config"}))


def test_config_that_transformers_rejects(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rejects"):
        build_meta_model(write(tmp_path, model_type="mixtral", hidden_size="many"))


def test_config_with_impossible_sizes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot build"):
        build_meta_model(write(tmp_path, model_type="mixtral", num_attention_heads=0, num_hidden_layers=1))


def test_model_without_a_causal_class(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model class"):
        build_meta_model(write(tmp_path, model_type="clvp_decoder", architectures=["Nope"]))


def test_a_config_of_rounded_weights_is_that_of_any_model(tmp_path: Path) -> None:
    """Whether moeq reads the format is asked where tensors are listed (`moeq.checkpoint.rounded`)."""
    quantized: dict[str, object] = {"quantization_config": {"quant_method": "gptq"}}
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    assert build_meta_model(write(tmp_path, model_type="mixtral", **sizes, **quantized)).device.type == "meta"

"""Tiny random checkpoints of every MoE family in transformers, written the way the family's hub checkpoints are.

The families are listed in `families`; `python tests/zoo.py` prints which of them moeq supports.
"""

import dataclasses
import string
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from families import EXPERTS, FAMILIES, TEXT, TOP_K, TOWER, VOCABULARY, Family
from moeq.arch.discover import discover
from moeq.checkpoint.read import read_headers
from moeq.errors import MoeqError

__all__ = ["EXPERTS", "FAMILIES", "TOP_K", "VOCABULARY", "Family", "make_model", "make_tiny", "support", "tiny_config"]


def _known(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(config_class)}
    return {key: value for key, value in values.items() if key in names}


def _kinds(config: PreTrainedConfig) -> dict[str, Any]:
    """One layer of each kind that the default config has, three layers at least."""
    lists = {}
    for name in ("layer_types", "mlp_layer_types"):
        value = config.__dict__.get(name)
        if value:
            lists[name] = list(dict.fromkeys(value))
    count = max([3, *(len(kinds) for kinds in lists.values())])
    known = {name: kinds + kinds[-1:] * (count - len(kinds)) for name, kinds in lists.items()}
    return {"num_hidden_layers": count, **known}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of the tiny model of a family."""
    family = FAMILIES[model_type]
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    text = default.get_text_config()
    values = _known(type(text), {**TEXT, **_kinds(text)})
    if "kv_lora_rank" in values:  # latent attention has one key head for each query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= family.text
    if text is default:
        return config_class(**values)
    parts: dict[str, Any] = {}
    for name, value in default.__dict__.items():
        if value is text:
            parts[name] = type(text)(**values)
        elif isinstance(value, PreTrainedConfig):
            parts[name] = _tower(value, family.towers.get(name, {}))
    return config_class(**parts, **family.top)


def _tower(default: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    nested = {
        name: _tower(value, {}) for name, value in default.__dict__.items() if isinstance(value, PreTrainedConfig)
    }
    return type(default)(**{**_known(type(default), TOWER), **nested, **overrides})


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights of unit gain; biases, norms and correction buffers away from their trivial values."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("bias"):
                parameter.copy_(noise(parameter) * 0.15)
            else:
                parameter.add_(noise(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(noise(buffer) * 0.05)
            if name.endswith("tid2eid"):  # a table token -> experts, zeros until it is loaded
                chosen = torch.rand(len(buffer), EXPERTS, generator=generator).argsort(dim=-1)
                buffer.copy_(chosen[:, : buffer.shape[1]])


def make_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a family, float32, in evaluation mode."""
    architecture: type[PreTrainedModel] = getattr(transformers, FAMILIES[model_type].architecture)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = architecture(tiny_config(model_type))
    _randomise(model, seed)
    return model.eval()


def make_tiny(model_type: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write a tiny random checkpoint of a family.

    Args:
        model_type: a key of `FAMILIES`.
        directory: where to write config.json and the safetensors files.
        seed: decides the weights.
        dtype: of the weights on disk.

    Returns:
        the model that was saved.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Llama 4's tower has complex buffers, which are not saved
        model = make_model(model_type, seed).to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(directory)
    return model


def write_tokenizer(directory: Path) -> None:
    """A tokenizer whose tokens are letters."""
    letters = ["<unk>", "<pad>", "<eos>", *string.printable]
    tokenizer = Tokenizer(WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def support(directory: Path) -> str:
    """ "OK", or why moeq cannot handle the checkpoint."""
    try:
        discover(directory, read_headers(directory))
    except MoeqError as error:
        return error.message
    return "OK"


def main() -> None:
    """Print the table of supported families."""
    print("| model type | class | support |\n|---|---|---|")
    for model_type, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            make_tiny(model_type, Path(directory))
            print(f"| {model_type} | {family.architecture} | {support(Path(directory))} |")


if __name__ == "__main__":
    main()

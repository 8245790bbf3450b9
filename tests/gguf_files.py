"""Writes a model of transformers as a GGUF file, as llama.cpp's converter does: its names, its metadata, its types."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import PreTrainedModel

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
}
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where the float16 numbers of a block are; gguf's Python cannot round to these types, but it can read them."""


def blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> NDArray[np.uint8]:
    """Random codes with small scales."""
    per, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // per, size), dtype=np.uint8)
    for place in HALVES[kind.name]:
        scale = (rng.random(data.shape[:-1]) * 2e-4 + 1e-5).astype(np.float16)
        data[..., place : place + 2] = scale[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def parts_of(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """GGUF's name -> weights, experts stacked, gate and up apart."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[ARCHITECTURES[model.config.model_type]], model.config.num_hidden_layers)
    found: dict[str, NDArray[np.float32]] = {}
    for key, value in model.state_dict().items():
        weights = value.float()
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", key)
        if match:
            block, which, bias = match.groups()
            flags = vars(model.get_submodule(key.rpartition(".")[0]))
            if flags["is_transposed"] and not bias:
                weights = weights.transpose(1, 2)
            ending = "bias" if bias else "weight"
            if which == "down":
                found[f"blk.{block}.ffn_down_exps.{ending}"] = weights.numpy()
                continue
            half = weights.shape[1] // 2
            apart = (weights[:, :half], weights[:, half:])
            if not flags["is_concatenated"]:
                apart = weights[:, 0::2], weights[:, 1::2]
            for name, each in zip(("gate", "up"), apart, strict=True):
                found[f"blk.{block}.ffn_{name}_exps.{ending}"] = each.contiguous().numpy()
        elif key.endswith("e_score_correction_bias"):
            found[f"blk.{key.split('.')[2]}.exp_probs_b.bias"] = weights.numpy()
        elif key.endswith("sinks"):
            found[f"{names.get_name(key)}.weight"] = weights.numpy()
        elif key != "lm_head.weight" or not model.config.tie_word_embeddings:
            stem, _, suffix = key.rpartition(".")
            weights = weights[0] if key.endswith("shared_expert_gate.weight") else weights
            found[f"{names.get_name(stem)}.{suffix}"] = weights.numpy()
    return found


def write(
    model: PreTrainedModel,
    tokenizer: Path | None,
    out: Path,
    kind: str = "F32",
    *,
    parts: int = 1,
    drop: str = "",
    pre: str = "gpt-2",
) -> Path:
    """The file, or the first of several; matrices in `kind`, all else in float32.

    Args:
        model: any of `ARCHITECTURES`.
        tokenizer: directory with the tokenizer.json of a byte-level BPE.
        out: path of the file.
        kind: type of GGUF.
        parts: files that it is split into.
        drop: name of a tensor that is left out.
        pre: how the file says that text is split before merges; the demo model's way is GPT-2's.
    """
    config, arch = model.config, ARCHITECTURES[model.config.model_type]
    tensors = [(name, value) for name, value in parts_of(model).items() if name != drop]
    size = -(-len(tensors) // parts)
    first = out
    for part in range(parts):
        path = out if parts == 1 else out.with_name(f"{out.stem}-{part + 1:05d}-of-{parts:05d}.gguf")
        first = path if not part else first
        writer = gguf.GGUFWriter(path, arch)
        if not part:
            _facts(writer, config)
            if tokenizer is not None:
                _tokenizer(writer, tokenizer, pre)
        for at, (name, value) in enumerate(tensors[part * size : (part + 1) * size]):
            _add(writer, name, value, Kind[kind], at)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return first


def _add(writer: gguf.GGUFWriter, name: str, value: NDArray[np.float32], kind: Kind, seed: int) -> None:
    if value.ndim < 2 or "ffn_gate_inp" in name or "bias" in name:
        kind = Kind.F32
    if kind.name in HALVES:
        writer.add_tensor(name, blocks(value.shape, kind, seed), raw_dtype=kind)
    elif kind in (Kind.F32, Kind.F16):
        writer.add_tensor(name, value.astype(np.float32 if kind is Kind.F32 else np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def _facts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    writer.add_expert_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "minimax_m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _tokenizer(writer: gguf.GGUFWriter, directory: Path, pre: str) -> None:
    data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in data["added_tokens"]}
    vocabulary = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data["added_tokens"]}}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.CONTROL if at in special else gguf.TokenType.NORMAL for at in range(len(tokens)))
    writer.add_token_types([int(kind) for kind in kinds])
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if special:
        writer.add_eos_token_id(min(special))


def tiny(model_type: str, *, inner: int = 256, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A random model of a family, with sides that blocks of 256 fit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3_moe": {"moe_intermediate_size": inner, "num_experts": 4, "head_dim": 64, "norm_topk_prob": True},
        "qwen2_moe": {
            "moe_intermediate_size": inner,
            "num_experts": 4,
            "shared_expert_intermediate_size": 2 * inner,
            "norm_topk_prob": False,
        },
        "gpt_oss": {"intermediate_size": inner, "num_local_experts": 4, "head_dim": 64, "sliding_window": 128},
        "minimax_m2": {"intermediate_size": inner, "num_local_experts": 4, "head_dim": 64, "rotary_dim": 64},
    }
    config = AutoConfig.for_model(model_type, **sizes, **own[model_type], **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model

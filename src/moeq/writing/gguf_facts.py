"""What a GGUF file says beside its weights, for families whose tensors llama.cpp takes as they are.

Facts: llama.cpp's converter, of each family: names of hyperparameters, and the name of how text is split.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from moeq.errors import CheckpointError, OptionError

FAMILIES: Final = {"qwen2_moe": ("qwen2moe", "qwen2"), "qwen3_moe": ("qwen3moe", "qwen2"), "olmoe": ("olmoe", "olmo")}
"""Model type -> (architecture in GGUF, how its tokenizer splits text)."""
LIKE: Final = "give --like FILE.gguf, which llama.cpp's convert_hf_to_gguf.py makes of the original"
KEYS: Final = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "vocab_size": ("vocab_size",),
}
"""Whole numbers of a file -> the config's names for them, the first that it has."""
FLOATS: Final = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
TOKENIZER: Final = "tokenizer.json"


def package() -> Any:
    """The package gguf, an extra.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("writing GGUF needs the package gguf", fix="pip install gguf") from None
    return gguf


def architecture(model_type: str) -> str:
    """The name of a family in GGUF.

    Raises:
        OptionError: it is not one whose file is written without another.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise OptionError(f"only files of {known} are written from scratch, not {model_type}", option="like", fix=LIKE)
    return FAMILIES[model_type][0]


def names(architecture: str, blocks: int) -> Any:
    """transformers' names of modules -> GGUF's.

    Raises:
        OptionError: the package gguf does not know the architecture.
    """
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        message = f"the package gguf does not know the architecture {architecture}"
        raise OptionError(message, option="like", fix="pip install --upgrade gguf")
    return gguf.get_tensor_name_map(kinds[architecture], blocks)


def tensor_names(keys: Iterator[str], table: Any) -> dict[str, str]:
    """Tensor of a checkpoint -> its name in GGUF.

    Raises:
        OptionError: one of them has none.
    """
    found = {}
    for key in keys:
        stem, _, suffix = key.rpartition(".")
        name = table.get_name(stem)
        if name is None or suffix not in ("weight", "bias"):
            raise OptionError(f"GGUF has no name for {key}", option="like", fix=LIKE)
        found[key] = f"{name}.{suffix}"
    return found


def add(writer: Any, config: Mapping[str, Any], directory: Path) -> None:
    """Hyperparameters and tokenizer.

    Args:
        writer: a `gguf.GGUFWriter`.
        config: config.json.
        directory: where tokenizer.json lies.

    Raises:
        OptionError: the tokenizer is not one that GGUF has a name for.
    """
    arch, pre = FAMILIES[config["model_type"]]
    writer.add_type("model")
    writer.add_name(directory.name)
    for key, options in KEYS.items():
        value = next((config[name] for name in options if config.get(name) is not None), None)
        if value is not None:
            writer.add_uint32(f"{arch}.{key}", int(value))
    for key, name in FLOATS.items():
        writer.add_float32(f"{arch}.{key}", float(config[name]))
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise OptionError(f"positions are scaled ({rope['rope_type']})", option="like", fix=LIKE)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    _add_tokenizer(writer, config, directory, pre)


def _add_tokenizer(writer: Any, config: Mapping[str, Any], directory: Path, pre: str) -> None:
    kinds = package().TokenType
    file = directory / TOKENIZER
    if not file.is_file():
        raise OptionError(f"there is no {TOKENIZER} in {directory.name}", option="like", fix=LIKE)
    data = json.loads(file.read_text(encoding="utf-8"))
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise OptionError(f"{TOKENIZER} is no byte-level BPE", option="like", fix=LIKE)
    added = {token["id"]: token for token in data.get("added_tokens", ())}
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    count = max(int(config["vocab_size"]), max(tokens) + 1)
    text, kind = [], []
    for number in range(count):
        text.append(tokens.get(number, f"[PAD{number}]"))
        own = kinds.USER_DEFINED if number in added and not added[number].get("special") else kinds.CONTROL
        kind.append(int(kinds.UNUSED if number not in tokens else own if number in added else kinds.NORMAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if _splits_as_gpt2(data.get("pre_tokenizer")) else pre)
    writer.add_token_list(text)
    writer.add_token_types(kind)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id")
        if value is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", int(value[0] if isinstance(value, list) else value))
    writer.add_add_bos_token(False)
    settings = directory / "tokenizer_config.json"
    template = directory / "chat_template.jinja"
    chat = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    if template.is_file():
        chat = template.read_text(encoding="utf-8")
    if isinstance(chat, str):
        writer.add_chat_template(chat)


def _splits_as_gpt2(splitter: Mapping[str, Any] | None) -> bool:
    """Whether a tokenizer's way to split text is GPT-2's own: a byte-level step with its regular expression."""
    return splitter is not None and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)

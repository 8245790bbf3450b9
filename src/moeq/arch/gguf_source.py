"""A GGUF file as a checkpoint: unfolded once into a directory that has a config, a tokenizer and a listing of tensors.

Config and tokenizer are what transformers makes of the file's metadata. The weights stay where they are; the
listing says which bytes of the file each of transformers' tensors is, so that they are read and decoded one at a time.
"""

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moeq.arch.discover import experts_paths
from moeq.checkpoint.locate import INDEX_NAME, SINGLE_NAME, read_config, resolve
from moeq.checkpoint.rounded.base import decoded
from moeq.checkpoint.rounded.gguf import LISTING, PLAIN, missing
from moeq.checkpoint.write import write_file_atomic
from moeq.codec import canonical
from moeq.errors import CheckpointError, MissingTensorError, TensorError
from moeq.spec import TensorInfo
from moeq.version import __version__

ARCHITECTURES: Final = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}
"""MoE architectures of GGUF that transformers knows -> its names; only their experts are stored in another form."""
SCORES: Final = {0: "none", 1: "softmax", 2: "sigmoid"}
"""GGUF's numbers for what a router makes of its logits."""
ARCHITECTURE: Final = "general.architecture"
PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SUFFIX: Final = ".gguf"
WIDTHS: Final = {
    "moe_intermediate_size": "ffn_down_exps.weight",
    "shared_expert_intermediate_size": "ffn_down_shexp.weight",
}
"""Key of a config -> the tensor whose inputs it counts; the metadata has them under other names or not at all."""
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_BROKEN: Final = "download the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor of the file: shape as numpy has it, type as a number of ggml."""

    file: str
    kind: int
    kind_name: str
    shape: tuple[int, ...]
    start: int
    size: int


def open_source(model: str | Path, *, local_files_only: bool = False) -> Path:
    """The directory of a model: what `moeq.checkpoint.locate.resolve` gives, GGUF files unfolded.

    Args:
        model: a directory, a hub id, a .gguf file (of split ones any part), or a directory that has nothing else.
        local_files_only: take a hub id from the local cache, never from the network.

    Raises:
        CheckpointError: there is no such model, or the GGUF file is not one that moeq and transformers read.
    """
    path = Path(model)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return _unfolded(_parts(path))
    directory = resolve(model, local_files_only=local_files_only)
    if any((directory / name).exists() for name in (SINGLE_NAME, INDEX_NAME, LISTING)):
        return directory
    files = sorted(each for each in directory.iterdir() if each.suffix.lower() == SUFFIX and each.is_file())
    firsts = [each for each in files if (match := PART.fullmatch(each.name)) is None or int(match[2]) == 1]
    if not files:
        return directory
    if len(firsts) != 1:
        names = ", ".join(each.name for each in files[:3])
        raise CheckpointError(f"which GGUF file is meant? {names}", file=directory, fix="give the path of one of them")
    return _unfolded(_parts(firsts[0]))


def _parts(path: Path) -> tuple[Path, ...]:
    """All files of a split model, in order."""
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    files = tuple(path.with_name(f"{match[1]}-{at:05d}-of-{match[3]}{SUFFIX}") for at in range(1, int(match[3]) + 1))
    absent = next((each for each in files if not each.is_file()), None)
    if absent is not None:
        raise CheckpointError("a part of this model is absent", file=absent, fix="download the missing file")
    return files


def _unfolded(files: tuple[Path, ...]) -> Path:
    """The unfolded directory of some files, made if it is not there; it lies in the hub library's cache of assets."""
    import huggingface_hub

    files = tuple(file.resolve() for file in files)
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((__version__, stamps)).encode()).hexdigest()[:16]
    place = Path(huggingface_hub.cached_assets_path("moeq", namespace="gguf", subfolder=f"{files[0].stem}-{key}"))
    if not (place / LISTING).exists():
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _unfold(files, made)
            if not (place / LISTING).exists():  # or another process was faster
                shutil.rmtree(place, ignore_errors=True)
                made.rename(place)
    return place


def _unfold(files: tuple[Path, ...], out: Path) -> None:
    """Config, tokenizer, links and listing."""
    stored, facts = _read(files)
    config = _config(files[0], facts, stored)
    model = _skeleton(config, files[0])
    headers = _headers(model, facts[ARCHITECTURE], stored, files[0])
    sizes: dict[str, int] = {}
    for info in headers.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + (info.stop - info.start)
    names = {"F16": torch.float16, "F32": torch.float32}
    config.dtype = names.get(max(sizes, key=lambda name: sizes[name]), torch.bfloat16)
    config.save_pretrained(out)
    with contextlib.suppress(Exception):  # not every run needs a tokenizer; who does will say that there is none
        _save_tokenizer(files[0], out)
    for file in files:
        (out / file.name).symlink_to(file)
    write_file_atomic(out / LISTING, canonical(headers))


def _save_tokenizer(file: Path, out: Path) -> None:
    """The tokenizer as the file describes it.

    It is saved under no family's class: those bring a way of their own to split text, whatever tokenizer.json says,
    and a file's need not be the family's.
    """
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    facts = read_config(out / TOKENIZER_CONFIG)
    write_file_atomic(out / TOKENIZER_CONFIG, canonical({**facts, "tokenizer_class": "PreTrainedTokenizerFast"}))


def _read(files: Sequence[Path]) -> tuple[dict[str, _Stored], dict[str, Any]]:
    """The tensors of all files, and what their metadata says."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise missing() from None
    stored: dict[str, _Stored] = {}
    facts: dict[str, Any] = {}
    for file in files:
        try:
            reader = GGUFReader(file)
            for name, field in reader.fields.items():
                if len(field.data) == 1:  # no lists: vocabularies are long
                    facts.setdefault(name, field.contents())
            for tensor in reader.tensors:
                stored[str(tensor.name)] = _Stored(
                    file=file.name,
                    kind=int(tensor.tensor_type),
                    kind_name=tensor.tensor_type.name,
                    shape=tuple(int(side) for side in reversed(tensor.shape)),
                    start=int(tensor.data_offset),
                    size=int(tensor.n_bytes),
                )
        except Exception as error:  # the reader checks little, and fails wherever it stumbles
            message = f"this is no GGUF file that can be read: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(message, file=file, fix=_BROKEN) from error
        cut = next((name for name, each in stored.items() if each.file == file.name and _beyond(each, file)), None)
        if cut is not None:
            raise CheckpointError("the file ends inside this tensor", file=file, tensor=cut, fix=_BROKEN)
    if facts.get(ARCHITECTURE) not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF of the architecture {facts.get(ARCHITECTURE)!r} is not read",
            file=files[0],
            fix=f"transformers reads MoE models of {', '.join(ARCHITECTURES)}; else give the original in safetensors",
        )
    return stored, facts


def _beyond(stored: _Stored, file: Path) -> bool:
    return stored.start + stored.size > file.stat().st_size


def _config(file: Path, facts: Mapping[str, Any], stored: Mapping[str, _Stored]) -> PreTrainedConfig:
    """What the metadata says by transformers' own table of keys, with the widths that the tensors have.

    Its reader of whole files stumbles over gpt-oss's positions, and leaves the widths of experts at a default.
    """
    architecture = facts[ARCHITECTURE]
    model_type = ARCHITECTURES[architecture]
    values = {
        name: facts[f"{architecture}.{key}"]
        for key, name in GGUF_CONFIG_MAPPING[model_type].items()
        if name is not None and f"{architecture}.{key}" in facts
    }
    values = {**GGUF_CONFIG_DEFAULTS_MAPPING.get(model_type, {}), **values}
    if "scoring_func" in values:
        values["scoring_func"] = SCORES.get(values["scoring_func"], "softmax")
    if "token_embd.weight" in stored:
        values["vocab_size"] = stored["token_embd.weight"].shape[0]
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # each family validates its config in its own way
        raise CheckpointError(
            f"transformers makes no config of it: {' '.join(str(error).split())[:200]}", file=file, fix=_BROKEN
        ) from error
    for key, suffix in WIDTHS.items():
        found = next((each for name, each in stored.items() if name.endswith(suffix)), None)
        if found is not None and hasattr(config, key):
            setattr(config, key, found.shape[-1])
    config.tie_word_embeddings = "output.weight" not in stored
    for key in ("bos_token_id", "eos_token_id"):
        setattr(config, key, facts.get(f"tokenizer.ggml.{key}"))
    _scale_positions(config, facts)
    return config


def _scale_positions(config: PreTrainedConfig, facts: Mapping[str, Any]) -> None:
    """How positions are stretched, as the metadata says it."""
    stem = f"{facts[ARCHITECTURE]}.rope.scaling."
    if facts.get(f"{stem}type") not in ("yarn", "linear"):
        return
    rope = {**config.rope_parameters, "rope_type": facts[f"{stem}type"]}
    for key, name in (("factor", "factor"), ("original_max_position_embeddings", "original_context_length")):
        if f"{stem}{name}" in facts:
            rope[key] = facts[f"{stem}{name}"]
    config.rope_parameters = rope


def _skeleton(config: PreTrainedConfig, file: Path) -> PreTrainedModel:
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [cls.__name__]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls._from_config(config, dtype=torch.float32)
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build the model: {' '.join(str(error).split())[:200]}", file=file, fix=_BROKEN
        ) from error
    return model


def _headers(
    model: PreTrainedModel, architecture: str, stored: Mapping[str, _Stored], file: Path
) -> dict[str, TensorInfo]:
    """transformers' name -> what stands behind it; tensors that the model has no use for keep their own names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    experts = {f"{path}.": vars(model.get_submodule(path)) for path in experts_paths(model)}
    tied = set(model.all_tied_weights_keys)
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for key, parameter in model.state_dict().items():
        owner = next((path for path in experts if key.startswith(path)), None)
        if key in tied:
            continue
        wanted = tuple(parameter.shape)
        if owner is not None:
            parts, options = _expert_parts(key, owner, stored, experts[owner])
        else:
            name = next((each for each in _names(key, names) if each in stored), None)
            parts, options = {} if name is None else {"weight": name}, {}
        if not parts:
            raise MissingTensorError(
                "the file has no tensor for it", file=file, tensor=key, fix="get a GGUF file of the whole model"
            )
        used |= set(parts.values())
        found[key] = _info({role: stored[name] for role, name in parts.items()}, options, wanted, key)
    for name, each in stored.items():
        if name not in used:
            found[name] = _info({"weight": each}, {}, each.shape, name)
    return found


def _names(key: str, names: Any) -> Iterator[str]:
    """What a parameter of a model may be called in GGUF."""
    if key.endswith("e_score_correction_bias"):
        yield f"blk.{_block(key)}.exp_probs_b.bias"
    stem, _, suffix = key.rpartition(".")
    if suffix in ("weight", "bias"):
        yield f"{names.get_name(stem)}.{suffix}"
    for ending in ("", ".weight", ".bias"):
        yield f"{names.get_name(key)}{ending}"


def _block(key: str) -> str:
    match = re.search(r"\.(\d+)\.", key)
    return match[1] if match else ""


def _expert_parts(
    key: str, owner: str, stored: Mapping[str, _Stored], flags: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, int]]:
    """Role -> tensor for a stacked parameter of experts, and how the parts are joined; no parts if one is absent."""
    name = key.removeprefix(owner)
    bias = name.endswith("_bias")
    stem, ending = f"blk.{_block(key)}.ffn_", "exps.bias" if bias else "exps.weight"
    options = {"bias": 1} if bias else {"transposed": 1} if flags["is_transposed"] else {}
    if name.startswith("gate_up_proj"):
        if f"{stem}gate_up_{ending}" in stored:
            return {"weight": f"{stem}gate_up_{ending}"}, options
        if not flags["is_concatenated"]:
            options["interleaved"] = 1
        parts = {role: f"{stem}{role}_{ending}" for role in ("gate", "up")}
    else:
        parts = {"weight": f"{stem}{name.partition('_')[0]}_{ending}"}
    return (parts if all(each in stored for each in parts.values()) else {}), options


def _info(parts: Mapping[str, _Stored], options: Mapping[str, int], wanted: tuple[int, ...], key: str) -> TensorInfo:
    """A plain tensor where that is what lies there, else one that is decoded."""
    first = next(iter(parts.values()))
    shape = list(first.shape)
    dim = -1 if options.get("bias") else -2
    if len(parts) > 1:
        shape[dim] = sum(each.shape[dim] for each in parts.values())
    if options.get("transposed"):
        shape[-2:] = shape[:-3:-1]
    if [side for side in shape if side != 1] != [side for side in wanted if side != 1]:
        message = f"shape {shape}, wanted {list(wanted)}"
        raise TensorError(message, file=first.file, tensor=key, fix="get a GGUF file that was converted for this model")
    if len(parts) == 1 and first.kind_name in PLAIN and "transposed" not in options:
        stop = first.start + first.size
        return TensorInfo(file=first.file, dtype=PLAIN[first.kind_name], shape=wanted, start=first.start, stop=stop)
    placed = {role: _bytes(each) for role, each in parts.items()}
    kinds = {role: each.kind for role, each in parts.items()}
    found = decoded("gguf", wanted, placed, {**kinds, **options})
    dtypes = {PLAIN.get(each.kind_name, found.dtype) for each in parts.values()}
    if dtypes == {"F32"}:
        return replace(found, dtype="F32", stop=2 * found.stop)
    return replace(found, dtype="F16") if dtypes == {"F16"} else found


def _bytes(stored: _Stored) -> TensorInfo:
    """The blocks of a tensor: its shape, the last side in bytes."""
    rows = 1
    for side in stored.shape[:-1]:
        rows *= side
    shape = (*stored.shape[:-1], stored.size // rows)
    return TensorInfo(file=stored.file, dtype="U8", shape=shape, start=stored.start, stop=stored.start + stored.size)

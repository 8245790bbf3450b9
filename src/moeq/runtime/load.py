"""Loads a packed checkpoint as a transformers model that computes on the packed bytes."""

from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeq import codec
from moeq.arch.named_experts import brings_code, code_is_not_trusted
from moeq.checkpoint.locate import CONFIG_NAME, read_config, resolve_packed
from moeq.checkpoint.read import Reader
from moeq.checkpoint.rounded.gguf import LISTING
from moeq.checkpoint.rounded.registry import facts_of
from moeq.errors import CheckpointError, DeviceError, MoeqError, PackedError
from moeq.format.manifest import MANIFEST_NAME, Manifest
from moeq.layouts.grouped import gpu
from moeq.layouts.grouped.serving import PackedLinear
from moeq.layouts.serving import ExpertsModule
from moeq.layouts.validate import validate_packed
from moeq.runtime import ahead

NO_LIMIT: Final = 1 << 30
"""Of tokens: more than any model holds."""


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: Any = "auto",
    exact_activations: bool | None = None,
    trust_remote_code: bool = False,
    progress: ahead.Told | None = None,
) -> PreTrainedModel:
    """A packed checkpoint as a model; experts stay packed and decode one matrix at a time.

    Args:
        directory: what `moeq quantize` wrote, or a hub id of such.
        device: "auto" (CUDA when there is one), "cpu" or "cuda[:n]".
        dtype: compute dtype of everything that is not packed; "auto" takes the checkpoint's.
        exact_activations: True keeps activations in floats, which is slower; False rounds them to 8 bits; None rounds
            them where that is faster: when decoding, and without AMX in prompts too (docs/decisions/0043).
            Kernels on GPUs never round.
        trust_remote_code: the code in the directory may run, for a model that transformers does not have.
        progress: on a GPU, told of kernels as they are compiled (`moeq.runtime.ahead`), which takes time only for what
            was never compiled on this machine.

    Raises:
        PackedError: not a packed checkpoint, or one whose parts contradict each other.
        VersionError: written by a later moeq.
        DeviceError: there is no such device.
    """
    place = pick_device(device)
    path = resolve_packed(directory)
    _check_config(path, validate_packed(path))
    try:
        model = from_pretrained(path, dtype, trust_remote_code=trust_remote_code)
    except (MoeqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers and a family's class make of an altered config
        raise PackedError(
            f"transformers cannot load it: {' '.join(str(error).split())[:200]}",
            file=path / "config.json",
            fix="download the checkpoint again, or quantize the model again",
        ) from error
    set_exact(model, exact_activations)
    model = model.to(place).eval()
    if gpu.usable(place):
        ahead.compile_kernels(model, progress=progress)
    return model


def set_exact(model: nn.Module, exact_activations: bool | None) -> None:
    """How packed layers treat activations from now on; see `load`."""
    for module in model.modules():
        if isinstance(module, ExpertsModule | PackedLinear):
            module.exact = exact_activations


def context_length(model: PreTrainedModel) -> int:
    """Tokens that a model holds at most; `NO_LIMIT` where its config does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT)


def _check_config(directory: Path, manifest: Manifest) -> None:
    """transformers goes by config.json alone: without our part it would fill the experts with random numbers."""
    path = directory / "config.json"
    data = codec.read_json(path)
    facts = data.get("quantization_config") if isinstance(data, dict) else None
    if not isinstance(facts, dict) or facts.get("quant_method") != "moeq":
        raise PackedError("there is no quantization_config of moeq", file=path, fix="download the checkpoint again")
    packed = {"layers": codec.encode(manifest.layers), "dense": codec.encode(manifest.dense)}
    if facts.get("format_version") == Manifest.VERSION and any(facts.get(key) != packed[key] for key in packed):
        raise PackedError(
            "quantization_config and moeq.json name different layers", file=path, fix="download the checkpoint again"
        )


def from_pretrained(directory: Path, dtype: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a directory, of the class that its config names; raises whatever transformers does.

    Code in the directory is run only if transformers does not have the model, and only if it is trusted. A checkpoint
    that was rounded before is loaded as what moeq decodes it to: some of transformers' own ways need GPUs.
    """
    if brings_code(read_config(directory / CONFIG_NAME)):
        if not trust_remote_code:
            raise code_is_not_trusted(directory)
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=True
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if facts_of(read_config(directory / CONFIG_NAME)) is None and not (directory / LISTING).exists():
        return (cls or AutoModelForCausalLM).from_pretrained(directory, dtype=dtype, local_files_only=True)
    with Reader(directory) as reader:
        tensors = {name: reader.tensor(name) for name in reader.headers}
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return (cls or AutoModelForCausalLM).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def predicts_tokens(directory: Path) -> bool:
    """Whether the class that a config names has logits over the vocabulary: what perplexity and KL are about."""
    names = read_config(directory / CONFIG_NAME).get("architectures") or [""]
    return not str(names[0]).endswith(("ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering"))


def pick_device(device: str | torch.device) -> torch.device:
    """The torch device that an option means.

    Raises:
        DeviceError: unknown, or not on this machine.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is not a device", option="device", fix="give auto, cpu or cuda[:n]") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"there is no {place}: {torch.cuda.device_count()} CUDA devices found", option="device", fix="use cpu"
        )
    if place.type not in ("cpu", "cuda"):
        raise DeviceError(f"device type {place.type} is not supported", option="device", fix="use cpu or cuda")
    return place


def load_any(
    directory: Path,
    device: str | torch.device = "auto",
    dtype: object = "auto",
    *,
    exact_activations: bool | None = True,
    trust_remote_code: bool = False,
    compiled: ahead.Told | None = None,
) -> PreTrainedModel:
    """A model to measure: packed by moeq, or any causal model that transformers loads.

    What is measured is the weights: activations are not rounded unless asked for, however short a window is. `compiled`
    is told of kernels that are compiled for a GPU.
    """
    if (directory / MANIFEST_NAME).is_file():
        packed = load(
            directory,
            device=device,
            dtype=dtype,
            exact_activations=exact_activations,
            trust_remote_code=trust_remote_code,
            progress=compiled,
        )
        return speaker(packed)
    place = pick_device(device)
    try:
        model = from_pretrained(directory, dtype, trust_remote_code=trust_remote_code)
    except (MoeqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers and a family's class make of broken files
        raise CheckpointError(
            f"transformers cannot load it: {_one_line(error)}", file=directory, fix="check the directory"
        ) from error
    return speaker(model.to(place).eval())


def speaker(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that answers tokens with logits: itself, or the thinker of an omni model."""
    if type(model).forward is not nn.Module.forward:
        return model
    parts = (part for part in model.children() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.get_output_embeddings() is not None), model)


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint; its code is run only if that is trusted.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    fix = "copy the model's tokenizer files into the directory"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class fails in its own way
        raise CheckpointError(f"no tokenizer could be loaded: {_one_line(error)}", file=directory, fix=fix) from error
    # Without files some families make one that knows its special tokens only, and encodes any text as nothing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CheckpointError("there is no tokenizer", file=directory, fix=fix)
    return tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

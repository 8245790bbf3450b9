"""Loads a packed checkpoint as a transformers model that computes on the packed bytes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moeq import codec
from moeq.errors import DeviceError, MoeqError, PackedError
from moeq.format.manifest import Manifest
from moeq.format.validate import validate_packed
from moeq.kernels import gpu
from moeq.runtime import ahead
from moeq.runtime.modules import PackedExperts, PackedLinear, SpectralExperts, TiledExperts


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: Any = "auto",
    exact_activations: bool | None = None,
    progress: ahead.Told | None = None,
) -> PreTrainedModel:
    """A packed checkpoint as a model; experts stay packed and decode one matrix at a time.

    Args:
        directory: what `moeq quantize` wrote.
        device: "auto" (CUDA when there is one), "cpu" or "cuda[:n]".
        dtype: compute dtype of everything that is not packed; "auto" takes the checkpoint's.
        exact_activations: True keeps activations in floats, which is slower; False rounds them to 8 bits wherever few
            tokens meet a matrix, also in large batches; None rounds them only in calls of few tokens, so that prompts
            and evaluations are computed with floats and decoding is fast. Kernels on GPUs never round.
        progress: on a GPU, told of kernels as they are compiled (`moeq.runtime.ahead`), which takes time only for what
            was never compiled on this machine.

    Raises:
        PackedError: not a packed checkpoint, or one whose parts contradict each other.
        VersionError: written by a later moeq.
        DeviceError: there is no such device.
    """
    path = Path(directory)
    place = pick_device(device)
    _check_config(path, validate_packed(path))
    try:
        model = from_pretrained(path, dtype)
    except (MoeqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers and a family's class make of an altered config
        raise PackedError(
            f"transformers cannot load it: {' '.join(str(error).split())[:200]}",
            file=path / "config.json",
            fix="download the checkpoint again, or quantize the model again",
        ) from error
    for module in model.modules():
        if isinstance(module, (PackedExperts, PackedLinear, SpectralExperts, TiledExperts)):
            module.exact = exact_activations
    model = model.to(place).eval()
    if gpu.usable(place):
        ahead.compile_kernels(model, progress=progress)
    return model


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


def from_pretrained(directory: Path, dtype: Any) -> PreTrainedModel:
    """The model of a directory, of the class that its config names; raises whatever transformers does."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    return (cls or AutoModelForCausalLM).from_pretrained(directory, dtype=dtype, local_files_only=True)


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

"""Loads a packed checkpoint as a transformers model that computes on the packed bytes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moeq.errors import DeviceError
from moeq.format.validate import validate_packed


def load(directory: str | Path, *, device: str | torch.device = "auto", dtype: Any = "auto") -> PreTrainedModel:
    """A packed checkpoint as a model; experts stay packed and decode one matrix at a time.

    Args:
        directory: what `moeq quantize` wrote.
        device: "auto" (CUDA when there is one), "cpu" or "cuda[:n]".
        dtype: compute dtype of everything that is not packed; "auto" takes the checkpoint's.

    Raises:
        PackedError: not a packed checkpoint, or one whose parts contradict each other.
        VersionError: written by a later moeq.
        DeviceError: there is no such device.
    """
    path = Path(directory)
    place = pick_device(device)
    validate_packed(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    model = (cls or AutoModelForCausalLM).from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(place).eval()


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

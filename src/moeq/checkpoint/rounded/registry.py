"""All formats by the `quant_method` of config.json, and a checkpoint as if it had never been rounded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from moeq.checkpoint.rounded.auto_round import AutoRound
from moeq.checkpoint.rounded.awq import Awq
from moeq.checkpoint.rounded.base import Format, Headers, Read
from moeq.checkpoint.rounded.compressed import CompressedTensors
from moeq.checkpoint.rounded.fp8 import BlockFp8
from moeq.checkpoint.rounded.gguf import Gguf
from moeq.checkpoint.rounded.gptq import Gptq
from moeq.checkpoint.rounded.modelopt import ModelOpt
from moeq.checkpoint.rounded.mxfp4 import Mxfp4
from moeq.errors import AlreadyQuantizedError, TensorError
from moeq.spec import Rounded, TensorInfo

FORMATS: Final[dict[str, Format]] = {
    "fp8": BlockFp8(),
    "fbgemm_fp8": BlockFp8(),
    "mxfp4": Mxfp4(),
    "compressed-tensors": CompressedTensors(),
    "modelopt": ModelOpt(),
    "gptq": Gptq(),
    "awq": Awq(),
    "gguf": Gguf(),
    "auto-round": AutoRound(),
}
REFUSED: Final = {
    "bitsandbytes": "its codes are tied to its own kernels, and the checkpoint that it was made from has more to give",
}
OURS: Final = "moeq"


def facts_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a model, at the top or in one of its parts; None if there is none, or it is ours."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("quantization_config", "compression_config"):
            facts = section.get(name)
            if isinstance(facts, dict) and facts:
                return None if facts.get("quant_method") == OURS else facts
    return None


def unrounded(config: Mapping[str, Any], headers: Headers, read: Read, file: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, each weight that was rounded as one decoded tensor in the place of its parts.

    Args:
        config: config.json.
        headers: all tensors as they are stored.
        read: gives a stored tensor.
        file: config.json's path, for messages.

    Raises:
        AlreadyQuantizedError: the format is not one that moeq reads, or no tensor is in it.
        MissingTensorError, TensorError: its parts do not fit each other.
    """
    facts = facts_of(config)
    if facts is None:
        return dict(headers)
    name = str(facts.get("quant_method", "modelopt" if "producer" in facts or "quant_algo" in facts else None))
    form = FORMATS.get(name)
    if form is None:
        reason = REFUSED.get(name, "moeq does not read that format")
        raise AlreadyQuantizedError(
            f"the checkpoint was rounded by {name}: {reason}",
            file=file,
            fix=f"give a 16-bit checkpoint, or one in {', '.join(FORMATS)}; transformers can write a dequantized one",
        )
    weights = form.weights(facts, headers, read)
    if not weights:
        raise AlreadyQuantizedError(
            f"config.json says that the weights are in {form.title}, but none is",
            file=file,
            fix="download the checkpoint again, or take quantization_config out if they have 16 bits",
        )
    taken = {id(part) for info in weights.values() if info.rounded for _, part in info.rounded.parts}
    dropped = form.leftovers(headers) | {f"{weight}_shape" for weight in weights}
    found: dict[str, TensorInfo] = {}
    places = {id(info.rounded.parts[0][1]): key for key, info in weights.items() if info.rounded}
    for key, info in headers.items():  # in the order of the files
        if id(info) in places:
            found[places[id(info)]] = weights[places[id(info)]]
        elif id(info) not in taken and key not in dropped:
            found[key] = info
    return found


def decode(rounded: Rounded, parts: Mapping[str, Tensor], shape: tuple[int, ...], name: str) -> Tensor:
    """A weight, float32.

    Raises:
        TensorError: a scale is NaN or infinite.
    """
    for role, part in parts.items():
        if role in ("scale", "global") and not bool(part.float().isfinite().all()):
            where = dict(rounded.parts)[role]
            fix = "download the checkpoint again, or get one that was rounded without overflow"
            raise TensorError("a scale is NaN or infinite", file=where.file, tensor=name, fix=fix)
    return FORMATS[rounded.form].decode(parts, shape, dict(rounded.options)).reshape(shape)

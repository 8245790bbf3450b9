"""Proves that a checkpoint feeds the whole model: what it lacks, transformers would fill with random numbers."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moeq.arch.keymap import KeyMap, is_required, tied_partners
from moeq.arch.sources import QUANTIZED_PREFIXES
from moeq.errors import AlreadyQuantizedError, MissingTensorError, TensorError
from moeq.spec import TensorInfo

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def check_complete(model: PreTrainedModel, keymap: KeyMap, tensors: Mapping[str, TensorInfo], file: Path) -> None:
    """Check that every parameter has a tensor, and that tensors which are only renamed fit.

    Args:
        model: the meta model.
        keymap: the routes of the checkpoint.
        tensors: its headers.
        file: its config.json, for messages.

    Raises:
        MissingTensorError: no tensor feeds a parameter.
        TensorError: a tensor has another shape than the config asks for, or is not of a float dtype.
        AlreadyQuantizedError: a weight is in an integer or 8-bit float format.
    """
    partners = tied_partners(model)
    for key, value in model.state_dict().items():
        route = keymap.routes.get(key)
        if route is not None and not route.operations:
            _check_fit(route.names[0], tensors[route.names[0]], value)
        elif route is None and is_required(model, key) and not keymap.routes.keys() & set(partners.get(key, ())):
            raise MissingTensorError(
                "the model needs this parameter, no tensor of the checkpoint feeds it",
                file=file,
                tensor=key,
                fix="download the checkpoint again, or check that config.json belongs to it",
            )


def _check_fit(name: str, info: TensorInfo, value: Tensor) -> None:
    if value.is_floating_point() and info.dtype not in FLOAT_DTYPES:
        if info.dtype.startswith(QUANTIZED_PREFIXES):
            raise AlreadyQuantizedError(
                f"a weight has dtype {info.dtype}: it was rounded before",
                file=info.file,
                tensor=name,
                fix="download config.json again: its quantization_config says how the weights are to be decoded",
            )
        raise TensorError(
            f"a weight has dtype {info.dtype}, not one of {', '.join(FLOAT_DTYPES)}",
            file=info.file,
            tensor=name,
            fix="convert the checkpoint to bfloat16",
        )
    if info.shape != tuple(value.shape):
        raise TensorError(
            f"shape {list(info.shape)} is not the {list(value.shape)} that the config asks for",
            file=info.file,
            tensor=name,
            fix="check that config.json belongs to these weights",
        )

"""Brings trained parameters back to the files they came from; every other byte stays."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose

from moeq.arch.keymap import Route, build_keymap
from moeq.checkpoint.dtypes import TORCH_DTYPES, WEIGHT_DTYPES
from moeq.checkpoint.read import Reader, read_headers
from moeq.checkpoint.write import FileDigest, ShardWriter
from moeq.errors import OptionError
from moeq.spec import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a parameter lies on disk.

    Attributes:
        tensor: name on disk.
        dtype: of the tensor.
        swapped: dimensions of the parameter to swap to get the tensor, None when it is a plain copy.
    """

    tensor: str
    dtype: torch.dtype
    swapped: tuple[int, int] | None = None

    def stored(self, value: Tensor) -> Tensor:
        """The tensor that holds `value`, rounded to the dtype on disk."""
        turned = value if self.swapped is None else value.transpose(*self.swapped)
        return turned.to(self.dtype).contiguous()


def places(
    model: PreTrainedModel, names: Iterable[str], headers: Mapping[str, TensorInfo], *, strict: bool = True
) -> dict[str, Place]:
    """Where parameters of a loaded model lie in the checkpoint with these headers.

    Args:
        model: as `moeq.runtime.load` gives it.
        names: of its parameters.
        headers: of the checkpoint.
        strict: without it, what has no such place is left out.

    Raises:
        OptionError: a parameter is not one tensor of the checkpoint, copied or transposed.
    """
    routes = build_keymap(model, headers).routes
    state = model.state_dict()
    found = {name: _place(routes.get(name), headers, tuple(state[name].shape)) for name in names}
    missing = [name for name, place in found.items() if place is None]
    if strict and missing:
        raise _unknown(model, missing[0])
    return {name: place for name, place in found.items() if place is not None}


def _place(route: Route | None, headers: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> Place | None:
    """Where a parameter of a shape lies, None if that is not one tensor, copied or transposed."""
    info = headers[route.names[0]] if route is not None and len(route.names) == 1 else None
    if route is None or info is None or len(route.targets) != 1 or info.dtype not in WEIGHT_DTYPES:
        return None
    match route.operations:
        case ():
            swapped = None
        case (Transpose() as operation,):
            kept = operation.check_dims and info.shape == shape
            swapped = None if kept else (operation.dim0, operation.dim1)
        case _:
            return None
    place = Place(tensor=route.names[0], dtype=TORCH_DTYPES[info.dtype], swapped=swapped)
    stored = place.stored(torch.empty(shape, device="meta"))
    return place if tuple(stored.shape) == info.shape else None


def changed(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose bytes differ from what the checkpoint holds under their names."""
    with Reader(directory) as reader:
        return {name: value for name, value in tensors.items() if not torch.equal(value, reader.tensor(name))}


def rewrite(directory: Path, out: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileDigest]:
    """Write the files of a checkpoint that hold any of `tensors` again, with these values.

    Each file appears whole or not at all; nothing larger than a chunk of a tensor is read at a time.

    Args:
        directory: the checkpoint.
        out: where the new files go; may be `directory`.
        tensors: name on disk -> new value, of the dtype and shape that is there.

    Returns:
        file name -> digest of the new file.

    Raises:
        MissingTensorError: the checkpoint has no tensor of that name.
        HeaderError: a value has another dtype or shape than the tensor that it replaces.
        StorageError: the disk is full or refuses.
    """
    headers = read_headers(directory)
    digests: dict[str, FileDigest] = {}
    with Reader(directory, headers) as reader:
        for file in sorted({reader.info(name).file for name in tensors}):
            inside = {name: info for name, info in headers.items() if info.file == file}
            order = sorted(inside, key=lambda name, at=inside: at[name].start)  # type: ignore[misc]
            writer = ShardWriter(out / file, [(name, inside[name].dtype, inside[name].shape) for name in order])
            try:
                for name in order:
                    writer.write(name, tensors[name] if name in tensors else reader.chunks(name))
                digests[file] = writer.close()
            finally:
                writer.abort()
    return digests


def _unknown(model: PreTrainedModel, name: str) -> OptionError:
    return OptionError(
        f"{model.config.model_type} does not store {name} as one tensor, so a tuned one cannot be written",
        option="router",
        fix="leave the routers of this model as they are (router none)",
    )

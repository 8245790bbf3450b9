"""GGUF: blocks of weights as llama.cpp stores them, listed under transformers' names beside a link to the file.

A GGUF file has its own names, its own config and its own tokenizer. `moeq.arch.gguf_source` unfolds them once into a
directory that has what a checkpoint has; the listing there says of every tensor which bytes of the file it is.

Legend: E experts, N output rows, K input columns.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moeq import codec
from moeq.checkpoint.rounded.base import Format, Headers, Read
from moeq.errors import CheckpointError
from moeq.spec import TensorInfo

LISTING: Final = "moeq_gguf.json"
"""File of an unfolded directory: tensor -> where its bytes are."""
PLAIN: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}
"""Types of GGUF that are no blocks -> safetensors' names."""


def listed(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of an unfolded directory.

    Raises:
        ArtifactError: the listing is broken.
    """
    return codec.decode(dict[str, TensorInfo], codec.read_json(directory / LISTING))


class Gguf(Format):
    """One block tensor of the file, or gate and up together; the types are numbers of ggml."""

    title = "GGUF"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Those that the listing has; there are no other names for them."""
        return {name: info for name, info in headers.items() if info.rounded is not None}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """Each part by the package gguf, blocks along the inputs: (..., N, bytes) -> (..., N, K); then joined.

        Args:
            parts: one, or gate and up: (..., N, bytes), of biases (..., bytes).
            shape: of the weight.
            options: the type of each part; "bias"; "interleaved": gate and up by turns; "transposed": (..., K, N).
        """
        values = [_values(stored, options[role]) for role, stored in parts.items()]
        dim = -1 if options.get("bias") else -2
        if len(values) == 1:
            joined = values[0]
        elif options.get("interleaved"):
            joined = torch.stack(values, dim=dim).flatten(dim - 1, dim)
        else:
            joined = torch.cat(values, dim=dim)
        return joined.transpose(-1, -2) if options.get("transposed") else joined


def _values(stored: Tensor, kind: int) -> Tensor:
    """Blocks (..., bytes) of uint8 as float32."""
    try:
        from gguf import GGMLQuantizationType, quants  # an extra: only who reads GGUF needs it
    except ImportError:
        raise missing() from None
    return torch.from_numpy(quants.dequantize(stored.numpy(), GGMLQuantizationType(kind)).copy())


def missing() -> CheckpointError:
    """The package gguf is not there."""
    return CheckpointError("reading GGUF needs the package gguf", fix="pip install gguf")

"""Checkpoints that were rounded before (FP8, MXFP4, INT4, ...), read as if they had 16 bits: the seam of all formats.

A format finds the tensors that belong together, a weight's codes with its scales, and puts one tensor of the weight's
own name and shape in their place (`Rounded`). Whoever reads that tensor gets it decoded, a matrix at a time; nothing
else in moeq knows that it was ever rounded. Codes are decoded in float32, by the formulas of transformers' own
dequantizers.

Legend: E experts, N output rows, K input columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from moeq.errors import MissingTensorError, TensorError
from moeq.spec import Rounded, TensorInfo

DECODED: Final = "BF16"
"""What a decoded tensor counts as where it is copied."""
FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1, four-bit floats; the fourth bit is the sign."""
_BROKEN: Final = "download the checkpoint again"


Headers = Mapping[str, TensorInfo]
Read = Callable[[str], Tensor]


class Format(ABC):
    """One way of rounding; every format has a file of its own and a line in `moeq.checkpoint.rounded.registry`.

    Attributes:
        title: what people call it.
    """

    title: str

    @abstractmethod
    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """The weights of a checkpoint that are in this format: decoded tensors that know their parts.

        Args:
            facts: the `quantization_config`.
            headers: all tensors.
            read: gives a tensor, for the few that say how others are to be read.

        Raises:
            MissingTensorError: codes lack their scales.
            TensorError: a part has a shape or dtype that does not fit.
        """
        ...

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """The weight, float32.

        Args:
            parts: role -> what is stored.
            shape: of the weight.
            options: what `weights` noted.
        """
        ...

    def leftovers(self, headers: Headers) -> set[str]:
        """Tensors that say how activations or caches were to be rounded: nothing of a weight is in them."""
        return {name for name in headers if name.rpartition(".")[2] in LEFTOVERS}


LEFTOVERS: Final = frozenset(
    ("input_scale", "activation_scale", "input_global_scale", "k_scale", "v_scale", "q_scale", "output_scale")
)


def decoded(form: str, shape: Sequence[int], parts: Headers, options: Mapping[str, int] | None = None) -> TensorInfo:
    """The tensor that stands for some parts; it says of the first one's file that it lies there."""
    size = 2
    for side in shape:
        size *= side
    first = next(iter(parts.values()))
    rounded = Rounded(form=form, parts=tuple(parts.items()), options=tuple((options or {}).items()))
    return TensorInfo(file=first.file, dtype=DECODED, shape=tuple(shape), start=0, stop=size, rounded=rounded)


def part(headers: Headers, name: str, weight: str) -> TensorInfo:
    """A part that a weight cannot do without.

    Raises:
        MissingTensorError: it is absent.
    """
    if name not in headers:
        raise MissingTensorError(
            f"the codes of {weight} have no scales: this tensor is absent", tensor=name, fix=_BROKEN
        )
    return headers[name]


def expect(info: TensorInfo, name: str, *, dtypes: Sequence[str] = (), shape: Sequence[int] | None = None) -> None:
    """Check a part.

    Raises:
        TensorError: it has another dtype or shape.
    """
    if dtypes and info.dtype not in dtypes:
        message = f"dtype {info.dtype}, not {' or '.join(dtypes)}"
        raise TensorError(message, file=info.file, tensor=name, fix=_BROKEN)
    if shape is not None and info.shape != tuple(shape):
        message = f"shape {list(info.shape)} does not fit its codes, which need {list(shape)}"
        raise TensorError(message, file=info.file, tensor=name, fix=_BROKEN)


def nibbles(packed: Tensor) -> Tensor:
    """Two codes of four bits from each byte, the low one first: (..., n) uint8 -> (..., 2 n) uint8."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def fp4(codes: Tensor) -> Tensor:
    """Codes of E2M1 as float32."""
    table = torch.tensor([*FP4, *(-value for value in FP4)], dtype=torch.float32)
    return table[codes.long()]


def exponents(stored: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents, 2^(byte - 127) (UE8M0)."""
    if stored.dtype == torch.uint8:
        return torch.exp2(stored.float() - 127)
    return stored.float()


def unpack_int32(packed: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes of some bits from int32 along the last dimension, none across words: (..., n) -> (..., n * 32 / bits).

    Args:
        packed: int32.
        bits: a divisor of 32.
        order: position of each code in its word, None for rising.
    """
    count = 32 // bits
    places = torch.tensor(order if order is not None else range(count), dtype=torch.int32) * bits
    return ((packed.unsqueeze(-1) >> places) & ((1 << bits) - 1)).flatten(-2)


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first codes of a stream of bits in int32 words along the last dimension: (..., n) -> (..., count) int32."""
    start = torch.arange(count) * bits
    words = packed.long() & 0xFFFFFFFF
    following = torch.nn.functional.pad(words, (0, 1))[..., start // 32 + 1]
    pairs = words[..., start // 32] | (following << 32)
    return ((pairs >> (start % 32)) & ((1 << bits) - 1)).int()

"""The element types of safetensors: their names, widths, and what torch calls them."""

import math
from collections.abc import Sequence
from typing import Final

import torch

DTYPE_BITS: Final = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""safetensors' name of an element type -> bits of one element."""

TORCH_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Element types that become tensors; the others (below 8 bits) can only be copied as bytes."""

DTYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""Inverse of `TORCH_DTYPES`."""

WEIGHT_DTYPES: Final = ("BF16", "F16", "F32", "F64")
"""Element types that a weight to be quantized may have."""


def data_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes that a tensor takes, or None where its bits do not fill whole bytes."""
    size, rest = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
    return None if rest else size

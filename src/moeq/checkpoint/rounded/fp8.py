"""FP8 with a scale for each block, row or tensor (DeepSeek-V3, Qwen3-FP8, GLM, MiniMax), and FP4 experts beside it."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeq.checkpoint.rounded.base import Format, Headers, Read, decoded, expect, exponents, fp4, nibbles, part
from moeq.errors import TensorError
from moeq.spec import TensorInfo

FLOAT8: Final = ("F8_E4M3", "F8_E5M2")
PACKED4: Final = ("I8", "U8", "F4")
"""Two E2M1 codes in a byte: experts of DeepSeek-V4."""
SCALES: Final = ("F32", "BF16", "F16", "F8_E8M0", "U8")
SUFFIXES: Final = ("_scale_inv", "_scale")


class BlockFp8(Format):
    """`weight` in FP8 and `weight_scale_inv` (or `weight_scale`), which multiplies it."""

    title = "FP8"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every tensor of 8-bit floats, and of packed ones that have scales."""
        found = {}
        for name, info in headers.items():
            if name.endswith(SUFFIXES):
                continue
            scale = next((name + suffix for suffix in SUFFIXES if name + suffix in headers), None)
            if info.dtype in FLOAT8 or (scale is not None and info.dtype in PACKED4):
                scale = scale or name + SUFFIXES[0]
                found[name] = _weight(name, info, scale, part(headers, scale, name), facts)
        return found

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """codes * scale of their block."""
        codes, scale = parts["codes"], exponents(parts["scale"])
        values = fp4(nibbles(codes.view(torch.uint8))) if options["packed"] else codes.float()
        return scaled(values, scale, (options["rows"], options["columns"]))


def scaled(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """values (..., N, K) times the scale (..., n, k) of each block, whose last ones may be ragged."""
    rows, columns = values.shape[-2:]
    if scale.dim() < 2 or scale.shape[-2:] == (1, 1):
        return values * scale.reshape(*scale.shape[: max(scale.dim() - 2, 0)], 1, 1)
    wide = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :] if scale.shape[-2] > 1 else scale
    if scale.shape[-1] == 1:
        return values * wide
    return values * wide.repeat_interleave(block[1], dim=-1)[..., :columns]


def block_of(side: int, scales: int, wanted: int | None) -> int | None:
    """Rows, or columns, of a block: the config's where that gives so many scales, else equal parts; None if neither."""
    if wanted is not None and -(-side // wanted) == scales:
        return wanted
    return side // scales if scales and side % scales == 0 else None


def _weight(name: str, info: TensorInfo, scale_name: str, scale: TensorInfo, facts: Mapping[str, Any]) -> TensorInfo:
    expect(scale, scale_name, dtypes=SCALES)
    packed = info.dtype in PACKED4
    shape = (*info.shape[:-1], info.shape[-1] * (2 if packed else 1))
    if len(shape) < 2:
        raise TensorError(
            f"{info.dtype} codes of {len(shape)} dimensions", file=info.file, tensor=name, fix="report it"
        )
    lead, grid = shape[:-2], scale.shape
    if len(grid) <= 1:  # one scale, or one for each row
        grid = (1, 1) if grid in ((), (1,)) else (*grid, 1)
    if grid[:-2] not in ((), lead):
        grid = (0, 0)
    wanted = facts.get("weight_block_size") or (None, None)
    rows, columns = (block_of(side, n, size) for side, n, size in zip(shape[-2:], grid[-2:], wanted, strict=True))
    if rows is None or columns is None:
        raise TensorError(
            f"scales of shape {list(scale.shape)} do not fit codes of shape {list(info.shape)}"
            + (f" in blocks of {list(wanted)}" if wanted[0] else ""),
            file=scale.file,
            tensor=scale_name,
            fix="download the checkpoint again",
        )
    options = {"rows": rows, "columns": columns, "packed": int(packed)}
    return decoded("fp8", shape, {"codes": info, "scale": scale}, options)

"""MXFP4 as gpt-oss stores it: blocks of 32 E2M1 codes along the inputs, and an exponent for each."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeq.checkpoint.rounded.base import Format, Headers, Read, decoded, expect, fp4, nibbles, part
from moeq.spec import TensorInfo

BLOCKS: Final = "_blocks"
SCALES: Final = "_scales"
BYTES: Final = 16
"""Of a block."""


class Mxfp4(Format):
    """`x_blocks` (E, N, blocks, 16) and `x_scales` (E, N, blocks) stand for `x` (E, K, N)."""

    title = "MXFP4"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every pair of blocks and scales."""
        found = {}
        for name, info in headers.items():
            if not name.endswith(BLOCKS):
                continue
            weight = name.removesuffix(BLOCKS)
            scale_name = weight + SCALES
            scale = part(headers, scale_name, weight)
            expect(info, name, dtypes=("U8",), shape=(*info.shape[:-1], BYTES))
            expect(scale, scale_name, dtypes=("U8", "F8_E8M0"), shape=info.shape[:-1])
            *lead, rows, blocks, _ = info.shape
            shape = (*lead, 2 * BYTES * blocks, rows)
            found[weight] = decoded("mxfp4", shape, {"codes": info, "scale": scale})
        return found

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """code * 2^(exponent - 127), inputs before outputs."""
        codes, scale = parts["codes"], parts["scale"].view(torch.uint8)
        values = fp4(nibbles(codes))
        values = torch.ldexp(values, (scale.int() - 127).unsqueeze(-1))
        return values.flatten(-2).transpose(-1, -2)

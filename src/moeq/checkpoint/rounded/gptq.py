"""GPTQ's int32 words along the inputs, with zeros of one less than they mean (AutoGPTQ), or of what they mean (v2).

Codes of 3 bits are a stream over the words, 32 codes in 3 of them; those of other widths do not cross words.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeq.checkpoint.rounded.base import Format, Headers, Read, decoded, expect, part, unpack_int32, unpack_stream
from moeq.errors import TensorError
from moeq.spec import TensorInfo

CODES: Final = ".qweight"


class Gptq(Format):
    """`qweight` (K bits / 32, N), `qzeros` (G, N bits / 32), `scales` (G, N), `g_idx` (K)."""

    title = "GPTQ"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every linear that has codes."""
        found = {}
        bits = facts.get("bits")
        for name, info in headers.items():
            if not name.endswith(CODES):
                continue
            stem = name.removesuffix(CODES)
            weight = f"{stem}.weight"
            zeros, scales = (part(headers, f"{stem}.{role}", weight) for role in ("qzeros", "scales"))
            if bits not in (2, 3, 4, 8):
                message = f"codes of {bits!r} bits are not read"
                raise TensorError(message, file=info.file, tensor=name, fix="use a model of 2, 3, 4 or 8 bits")
            columns, rows = info.shape[0] * 32 // bits, info.shape[1]
            expect(info, name, dtypes=("I32",))
            expect(scales, f"{stem}.scales", shape=(scales.shape[0], rows))
            expect(zeros, f"{stem}.qzeros", dtypes=("I32",), shape=(scales.shape[0], rows * bits // 32))
            parts = {"codes": info, "scale": scales, "zero": zeros}
            if f"{stem}.g_idx" in headers:
                parts["order"] = headers[f"{stem}.g_idx"]
            v2 = facts.get("checkpoint_format") == "gptq_v2"
            options = {"bits": bits, "group": -(-columns // scales.shape[0]), "shift": 0 if v2 else 1}
            found[weight] = decoded("gptq", (rows, columns), parts, options)
        return found

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """(code - zero) * scale, (N, K)."""
        bits = options["bits"]
        unpack = unpack_int32 if bits != 3 else _threes
        codes_NK = unpack(parts["codes"].t(), bits)
        zero_GN = unpack(parts["zero"], bits) + options["shift"]
        group_K = parts["order"].long() if "order" in parts else torch.arange(shape[1]) // options["group"]
        scale_GN = parts["scale"].float()
        return (codes_NK.float() - zero_GN.float()[group_K].t()) * scale_GN[group_K].t()


def _threes(packed: Tensor, bits: int) -> Tensor:
    """All codes of a stream along the last dimension."""
    return unpack_stream(packed, bits, packed.shape[-1] * 32 // bits)

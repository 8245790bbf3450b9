"""AWQ's int32 words along the outputs, eight interleaved codes of four bits in each."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeq.checkpoint.rounded.base import Format, Headers, Read, decoded, expect, part, unpack_int32
from moeq.checkpoint.rounded.gptq import CODES
from moeq.errors import TensorError
from moeq.spec import TensorInfo

ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in its word of each of eight neighbouring outputs."""


class Awq(Format):
    """`qweight` (K, N / 8), `qzeros` (G, N / 8), `scales` (G, N)."""

    title = "AWQ"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every linear that has codes."""
        found = {}
        for name, info in headers.items():
            if not name.endswith(CODES):
                continue
            stem = name.removesuffix(CODES)
            weight = f"{stem}.weight"
            zeros, scales = (part(headers, f"{stem}.{role}", weight) for role in ("qzeros", "scales"))
            if facts.get("bits", 4) != 4 or str(facts.get("version", "gemm")).lower() != "gemm":
                message = f"codes of {facts.get('bits')} bits in version {facts.get('version')!r} are not read"
                raise TensorError(message, file=info.file, tensor=name, fix="use a model of 4 bits in version gemm")
            columns, rows = info.shape[0], 8 * info.shape[1]
            groups = scales.shape[0]
            expect(info, name, dtypes=("I32",))
            expect(scales, f"{stem}.scales", shape=(groups, rows))
            expect(zeros, f"{stem}.qzeros", dtypes=("I32",), shape=(groups, info.shape[1]))
            parts = {"codes": info, "scale": scales, "zero": zeros}
            found[weight] = decoded("awq", (rows, columns), parts, {"group": -(-columns // groups)})
        return found

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """(code - zero) * scale, (N, K)."""
        codes_KN, zero_GN = (unpack_int32(parts[role], 4, ORDER).float() for role in ("codes", "zero"))
        group_K = torch.arange(shape[1]) // options["group"]
        return ((codes_KN - zero_GN[group_K]) * parts["scale"].float()[group_K]).t()

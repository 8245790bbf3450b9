"""compressed-tensors (llm-compressor, Kimi-K2-Thinking): packed integers, 8-bit floats and NVFP4."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeq.checkpoint.rounded.base import Format, Headers, Read, decoded, expect, fp4, nibbles, part, unpack_stream
from moeq.checkpoint.rounded.fp8 import FLOAT8, SUFFIXES, BlockFp8, scaled
from moeq.errors import TensorError
from moeq.spec import TensorInfo

PACKED: Final = ".weight_packed"
WIDTHS: Final = (4, 8, 2, 3, 5, 6, 7, 1)
FP8: Final = BlockFp8()


class CompressedTensors(Format):
    """Weights by what lies beside them: packed int32, packed FP4 bytes, FP8 or int8."""

    title = "compressed-tensors"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every weight that is stored in codes."""
        found = {}
        for name, info in headers.items():
            if name.endswith(PACKED):
                weight = name.removesuffix("_packed")
                if info.dtype == "U8":
                    found[weight] = _float4(weight, info, headers)
                else:
                    found[weight] = _packed(weight, info, headers, facts, read)
            elif name.endswith(".weight") and info.dtype == "I8":
                found[name] = _plain(name, info, headers)
        floats = {name: info for name, info in headers.items() if info.dtype in FLOAT8 or name.endswith(SUFFIXES)}
        return found | FP8.weights(facts, floats, read)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """(code - zero) * scale of its group."""
        scale = parts["scale"].float()
        group = options["group"]
        if "global" in parts:
            values = fp4(nibbles(parts["codes"].view(torch.uint8)))
            return scaled(values, scale / parts["global"].float(), (1, group))
        bits = options["bits"]
        if options["packed"]:  # offset binary
            codes = unpack_stream(parts["codes"], bits, shape[-1]).float() - 2 ** (bits - 1)
        else:
            codes = parts["codes"].float()
        if "order" in parts:  # group of each input, where columns were rounded in another order
            places = parts["order"].long()
            scale = scale[..., places]
        zero = None
        if "zero" in parts:
            zero = parts["zero"]
            if zero.dtype == torch.int32 and options["packed"]:  # packed along the outputs
                rows = unpack_stream(zero.transpose(-1, -2), bits, shape[-2])
                zero = rows.transpose(-1, -2) - 2 ** (bits - 1)
            zero = zero.float()
            zero = zero[..., parts["order"].long()] if "order" in parts else zero
            codes = codes - _wide(zero, group, shape[-1])
        return codes * _wide(scale, group, shape[-1])


def _wide(numbers: Tensor, group: int, columns: int) -> Tensor:
    """One number for each group of inputs -> for each input."""
    if numbers.dim() < 2:
        return numbers.reshape(-1, 1) if numbers.numel() > 1 else numbers
    if numbers.shape[-1] in (1, columns):
        return numbers
    return numbers.repeat_interleave(group, dim=-1)[..., :columns]


def _grouped(name: str, columns: int, scale: TensorInfo, rows: int) -> int:
    """Inputs that share a scale."""
    groups = scale.shape[-1] if len(scale.shape) > 1 else 1
    size = -(-columns // groups) if groups else 0
    if not groups or -(-columns // size) != groups or (len(scale.shape) > 1 and scale.shape[-2] not in (1, rows)):
        raise TensorError(
            f"scales of shape {list(scale.shape)} do not fit a weight of {rows} x {columns}",
            file=scale.file,
            tensor=f"{name}_scale",
            fix="download the checkpoint again",
        )
    return size


def _packed(weight: str, info: TensorInfo, headers: Headers, facts: Mapping[str, Any], read: Read) -> TensorInfo:
    expect(info, f"{weight}_packed", dtypes=("I32",))
    scale, sides = (part(headers, f"{weight}_{name}", weight) for name in ("scale", "shape"))
    expect(sides, f"{weight}_shape", dtypes=("I64", "I32"), shape=(2,))
    rows, columns = read(f"{weight}_shape").tolist()
    words = info.shape[-1]
    named = [group.get("weights") or {} for group in (facts.get("config_groups") or {}).values()]
    widths = dict.fromkeys([*(each.get("num_bits") for each in named), *WIDTHS])
    bits = next((bits for bits in widths if bits in WIDTHS and -(-columns * bits // 32) == words), 0)
    if not bits or info.shape[-2] != rows:
        raise TensorError(
            f"codes of shape {list(info.shape)} are no packed weight of {rows} x {columns}",
            file=info.file,
            tensor=f"{weight}_packed",
            fix="download the checkpoint again",
        )
    parts = {"codes": info, "scale": scale}
    for role, name in (("zero", "zero_point"), ("order", "g_idx")):
        if f"{weight}_{name}" in headers:
            parts[role] = headers[f"{weight}_{name}"]
    options = {"bits": bits, "group": _grouped(weight, columns, scale, rows), "packed": 1}
    return decoded("compressed-tensors", (rows, columns), parts, options)


def _float4(weight: str, info: TensorInfo, headers: Headers) -> TensorInfo:
    scale, overall = (part(headers, f"{weight}_{name}", weight) for name in ("scale", "global_scale"))
    expect(info, f"{weight}_packed", dtypes=("U8",))
    shape = (*info.shape[:-1], 2 * info.shape[-1])
    expect(scale, f"{weight}_scale", dtypes=("F8_E4M3",), shape=(*shape[:-1], shape[-1] // 16))
    parts = {"codes": info, "scale": scale, "global": overall}
    return decoded("compressed-tensors", shape, parts, {"group": 16, "bits": 4, "packed": 1})


def _plain(weight: str, info: TensorInfo, headers: Headers) -> TensorInfo:
    scale = part(headers, f"{weight}_scale", weight)
    parts = {"codes": info, "scale": scale}
    zero = headers.get(f"{weight}_zero_point")
    if zero is not None:
        parts["zero"] = zero
    options = {"bits": 8, "group": _grouped(weight, info.shape[-1], scale, info.shape[-2]), "packed": 0}
    return decoded("compressed-tensors", info.shape, parts, options)

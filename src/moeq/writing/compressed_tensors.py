"""Packed layers in the format "pack-quantized" of compressed-tensors, which vLLM, SGLang and transformers read.

Facts: compressed-tensors 0.20, `compressors/pack_quantized`: a weight (N, K) of b bits lies as `weight_packed` (int32,
a stream of codes along K, lowest bits first), `weight_scale` (N, G) and `weight_shape`; symmetric codes are offset by
2^(b-1), which is the level set "sym".

Legend: N output rows, K input columns, G groups per row.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from moeq.checkpoint.write import Declared
from moeq.errors import OptionError
from moeq.format.records import unpack_codes, unpack_scales
from moeq.layouts.grouped.packed import PackedMatrix
from moeq.spec import WHOLE_ROW, QuantSpec, num_groups

USUAL: Final = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NAMES: Final[dict[str, tuple[str, str, dict[str, str]]]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"), ("", "", USUAL)
    ),
    "mixtral": (".mlp.", ".block_sparse_moe.", {"gate": "w1", "up": "w3", "down": "w2"}),
}
"""Model type -> (what is in the path of a module, what stands there in files, projection -> name in files).

Of families whose hub checkpoints have a tensor for each matrix of each expert."""


def pack_stream(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes as a stream of bits in int32 words, lowest bits first: (N, K) uint8 -> (N, ceil(K * bits / 32)) int32."""
    rows, columns = codes_NK.shape
    bits_NKb = np.unpackbits(codes_NK.numpy()[..., None], axis=-1, count=bits, bitorder="little")
    stream_NB = np.packbits(bits_NKb.reshape(rows, columns * bits), axis=1, bitorder="little")
    words = -(-columns * bits // 32)
    padded = np.zeros((rows, 4 * words), dtype=np.uint8)
    padded[:, : stream_NB.shape[1]] = stream_NB
    return torch.from_numpy(padded.view("<i4"))


def experts_path(model_type: str, path: str) -> str:
    """The module of a layer's experts as files of the family name it.

    Raises:
        OptionError: it is not known how they do.
    """
    if model_type not in NAMES:
        raise OptionError(
            f"it is not known how files of {model_type} name their experts",
            option="form",
            fix=f"known are {', '.join(sorted(NAMES))}",
        )
    inside, outside, _ = NAMES[model_type]
    return path.replace(inside, outside) if inside else path


def expert_name(model_type: str, path: str, expert: int, projection: str) -> str:
    """The module of an expert's matrix as files of the family name it; raises as `experts_path`."""
    return f"{experts_path(model_type, path)}.{expert}.{NAMES[model_type][2][projection]}"


def check_spec(name: str, spec: QuantSpec, shape: tuple[int, int]) -> None:
    """Refuse what the format cannot hold.

    Raises:
        OptionError: it names the weight, and how to quantize so that it can.
    """
    if spec.levels != "sym" or spec.bits < 2:
        message = f"compressed-tensors has no {spec.bits}-bit codes of the level set {spec.levels}"
        raise OptionError(f"{name}: {message}", option="serve", fix="quantize with --serve vllm-native")
    if spec.group_size != WHOLE_ROW and shape[1] % spec.group_size:
        sizes = [size for size in (32, 64, 128) if shape[1] % size == 0] or [WHOLE_ROW]
        message = f"{shape[1]} inputs are no whole groups of {spec.group_size}"
        raise OptionError(f"{name}: {message}", option="group-size", fix=f"quantize with --group-size {sizes[-1]}")


def declared(name: str, spec: QuantSpec, shape: tuple[int, int]) -> list[Declared]:
    """The tensors of a weight: (name, dtype, shape)."""
    rows, columns = shape
    return [
        (f"{name}.weight_packed", "I32", (rows, -(-columns * spec.bits // 32))),
        (f"{name}.weight_scale", "F16", (rows, num_groups(columns, spec.group_size))),
        (f"{name}.weight_shape", "I64", (2,)),
    ]


def tensors(matrix: PackedMatrix) -> Iterator[Tensor]:
    """Their values."""
    record = matrix.record
    yield pack_stream(unpack_codes(record, matrix.spec, matrix.shape), matrix.spec.bits)
    scale_NG, _ = unpack_scales(record, matrix.spec, matrix.shape)
    yield scale_NG.contiguous()
    yield torch.tensor(matrix.shape)


def quantization_config(modules: Mapping[str, QuantSpec], ignored: list[str], version: str) -> dict[str, Any]:
    """What config.json says.

    Args:
        modules: path of a linear, or of a layer's experts -> how their weights are stored.
        ignored: linears that are not packed.
        version: of moeq.
    """
    groups: dict[QuantSpec, list[str]] = {}
    for path, spec in modules.items():
        groups.setdefault(spec, []).append(f"re:^{re.escape(path)}(\\..*)?$")
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": _weights(spec), "format": "pack-quantized"}
            for number, (spec, targets) in enumerate(groups.items())
        },
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "made_by": f"moeq {version}",
    }


def _weights(spec: QuantSpec) -> dict[str, Any]:
    whole = spec.group_size == WHOLE_ROW
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else spec.group_size,
        "dynamic": False,
    }

"""Rounds the weights of a checkpoint as other tools do, plainly, for tests of sources that were rounded before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def to_fp8(name: str, weight: Tensor, block: int = 16) -> Tensors:
    """Blocks of E4M3, the last ones ragged; stacks too."""
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    tiles = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # (..., n, block, k, block)
    scale = tiles.abs().amax((-3, -1)).clamp(min=1e-6) / 448
    codes = (tiles / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)
    return {name: codes[..., :rows, :columns].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def to_mxfp4(name: str, weight: Tensor) -> Tensors:
    """(E, K, N) as gpt-oss stores it; K is padded to blocks of 32."""
    values = weight.float().transpose(-1, -2)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 32)).unflatten(-1, (-1, 32))
    exponent = (values.abs().amax(-1).clamp(min=1e-9).log2().floor() - 2).clamp(-126, 126)
    codes = nearest_fp4(values / torch.exp2(exponent).unsqueeze(-1))
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}


def nearest_fp4(values: Tensor) -> Tensor:
    """Codes of E2M1."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    code = (values.abs().unsqueeze(-1) - table).abs().argmin(-1)
    return torch.where(values < 0, code + 8, code).to(torch.uint8)


def to_int4(name: str, weight: Tensor, group: int = 8) -> Tensors:
    """compressed-tensors' packed integers, symmetric, in groups."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=group, symmetric=True)
    scale = weight.float().view(len(weight), -1, group).abs().amax(-1).clamp(min=1e-6) / 7.5
    state = {"weight": weight.float(), "weight_scale": scale}
    stored = BaseCompressor.get_value_from_registry("pack-quantized").compress(
        state, QuantizationScheme(targets=["Linear"], weights=args)
    )
    return {f"{name.removesuffix('.weight')}.{key}": value for key, value in stored.items()}


def words_of(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes of four bits along the last dimension into an int32."""
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64)
    for place in range(8):
        words |= codes[..., place::8].long() << 4 * order[place]
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _asymmetric(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes (N, K), zeros and scales (N, G)."""
    parts = weight.float().view(len(weight), -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / 14).clamp(min=1e-6).half().float()
    zero = (-low / scale).round().clamp(0, 14) + 1
    codes = (parts / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    return codes.flatten(1).long(), zero.long(), scale.half()


def to_gptq(name: str, weight: Tensor, group: int = 8) -> Tensors:
    """Words along the inputs."""
    codes, zero, scale = _asymmetric(weight, group)
    stem, index = name.removesuffix(".weight"), torch.arange(weight.shape[1]) // group
    found = {
        "qweight": words_of(codes).t(),
        "qzeros": words_of((zero - 1).t()),
        "scales": scale.t(),
        "g_idx": index.int(),
    }
    return {f"{stem}.{key}": value for key, value in found.items()}


def to_awq(name: str, weight: Tensor, group: int = 8) -> Tensors:
    """Words along the outputs, interleaved."""
    codes, zero, scale = _asymmetric(weight, group)
    stem, order = name.removesuffix(".weight"), (0, 4, 1, 5, 2, 6, 3, 7)
    found = {"qweight": words_of(codes.t(), order), "qzeros": words_of(zero.t(), order), "scales": scale.t()}
    return {f"{stem}.{key}": value for key, value in found.items()}


def to_nvfp4(name: str, weight: Tensor) -> Tensors:
    """ModelOpt's: scales of 16 inputs in E4M3, and one for the tensor."""
    parts = weight.float().view(len(weight), -1, 16)
    overall = (parts.abs().max() / (6 * 448)).clamp(min=1e-9)
    scale = (parts.abs().amax(-1) / 6 / overall).to(torch.float8_e4m3fn)
    codes = nearest_fp4(parts / (scale.float() * overall).clamp(min=1e-12).unsqueeze(-1)).flatten(1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return {name: packed, f"{name}_scale": scale, f"{name}_scale_2": overall}


def convert(
    directory: Path,
    form: Callable[[str, Tensor], Tensors],
    facts: dict[str, Any],
    wanted: Callable[[str, Tensor], bool],
) -> None:
    """Round the tensors of a checkpoint that are wanted, in place."""
    path = directory / "model.safetensors"
    found = load_file(path)
    for name in [name for name, value in found.items() if wanted(name, value)]:
        found |= form(name, found.pop(name))
    save_file({name: value.clone().contiguous() for name, value in found.items()}, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))

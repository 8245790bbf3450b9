"""Formats of checkpoints that were rounded before, against the libraries that write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeq.checkpoint.read import Reader, read_headers
from moeq.errors import AlreadyQuantizedError, MissingTensorError, TensorError
from moeq.model_parts import MatrixSource

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Tensors = dict[str, Tensor]


def write(directory: Path, tensors: Tensors, facts: dict[str, Any] | None) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    config: dict[str, Any] = {"model_type": "x"} | ({} if facts is None else {"quantization_config": facts})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def whole(directory: Path, name: str = "a.weight") -> Tensor:
    """A decoded weight, float32, by its matrices."""
    headers = read_headers(directory)
    shape = headers[name].shape
    with Reader(directory, headers) as reader:
        if len(shape) == 2:
            return reader.matrix(MatrixSource(name=name, stacked=False), 0, (shape[0], shape[1]))
        source = MatrixSource(name=name, stacked=True)
        return torch.stack([reader.matrix(source, index, (shape[1], shape[2])) for index in range(shape[0])])


def codes8(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 100).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 0.01 + 0.001


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("scale", ["block", "e8m0", "bytes", "bfloat16", "tensor", "scalar", "rows"])
def test_fp8_is_what_transformers_makes_of_it(scale: str, stack: tuple[int, ...], tmp_path: Path) -> None:
    weight = codes8(*stack, 256, 384)
    number: Tensor = scales(*stack, 2, 3)
    if scale == "e8m0":
        number = torch.exp2(torch.randint(-9, 3, number.shape).float()).to(torch.float8_e8m0fnu)
    elif scale == "bytes":
        number = torch.randint(110, 130, number.shape, dtype=torch.uint8)
    elif scale == "bfloat16":
        number = number.bfloat16()
    elif scale in ("tensor", "scalar"):
        number = scales(*stack, 1, 1)
    elif scale == "rows":
        number = scales(*stack, 256, 1)
    wanted = Fp8Dequantize(None)._dequantize_one(weight, number, torch.float32)
    stored = number.reshape(()) if scale == "scalar" and not stack else number
    found = whole(write(tmp_path / "x", {"a.weight": weight, "a.weight_scale_inv": stored}, FP8))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(200, 384), (256, 300), (130, 129), (100, 64)])
def test_fp8_blocks_may_be_ragged(shape: tuple[int, int], tmp_path: Path) -> None:
    """The last block of DeepSeek's 576 rows has 64: what transformers refuses, its kernels take."""
    weight, grid = codes8(*shape), tuple(-(-side // 128) for side in shape)
    number = scales(*grid)
    wanted = weight.float()
    for row in range(shape[0]):
        for column in range(shape[1]):
            wanted[row, column] *= number[row // 128, column // 128]
    found = whole(write(tmp_path / "x", {"a.weight": weight, "a.weight_scale_inv": number}, FP8))
    assert torch.equal(found, wanted)


def test_four_bit_experts_beside_fp8(tmp_path: Path) -> None:
    """DeepSeek-V4: experts of packed E2M1 with a power of two for 32 inputs, everything else FP8."""
    packed = torch.randint(-128, 128, (64, 48), dtype=torch.int8)
    number = torch.exp2(torch.randint(-9, 3, (64, 3)).float()).to(torch.float8_e8m0fnu)
    wanted = Fp8Dequantize(None)._dequantize_one(packed, number, torch.float32)
    tensors = {"a.weight": packed, "a.weight_scale_inv": number, "b.weight": torch.zeros(2)}
    directory = write(tmp_path / "x", tensors, FP8)
    assert torch.equal(whole(directory), wanted)
    assert read_headers(directory)["b.weight"].rounded is None


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    exponents = torch.randint(100, 140, (3, 40, 2), dtype=torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    tensors = {"e.up_proj_blocks": blocks, "e.up_proj_scales": exponents, "e.up_proj_bias": torch.zeros(3, 40)}
    directory = write(tmp_path / "x", tensors, {"quant_method": "mxfp4"})
    assert set(read_headers(directory)) == {"e.up_proj", "e.up_proj_bias"}
    assert torch.equal(whole(directory, "e.up_proj"), wanted)
    with Reader(directory) as reader:  # rows of one expert of a transposed stack, every second one
        source = MatrixSource(name="e.up_proj", stacked=True, transposed=True, start=1, step=2)
        assert torch.equal(reader.matrix(source, 2, (20, 64)), wanted[2].t()[1::2])
        assert torch.equal(reader.tensor("e.up_proj"), wanted.bfloat16())
        assert b"".join(reader.chunks("e.up_proj")) == wanted.bfloat16().view(torch.uint8).numpy().tobytes()


def compressed(weight: Tensor, **options: Any) -> tuple[Tensors, Tensor, dict[str, Any]]:
    """Stored tensors, what the library decodes them to, and its config."""
    library = pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    form = options.pop("form")
    args = quantization.QuantizationArgs(**options)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    columns = weight.shape[1]
    size = args.group_size or (columns if args.strategy != "tensor" else weight.numel())
    groups = nn_groups(weight, size) if args.strategy != "tensor" else weight.reshape(1, 1, -1)
    low, high = groups.amin(-1), groups.amax(-1)
    state = {"weight": weight}
    if args.type == "float" and args.num_bits == 4:
        state["weight_global_scale"] = (2688.0 / weight.abs().max()).reshape(1)
        found = groups.abs().amax(-1) / 6 * state["weight_global_scale"]
        state["weight_scale"] = found.to(torch.float8_e4m3fn).float()
    elif args.symmetric:
        state["weight_scale"] = groups.abs().amax(-1) / (
            448.0 if args.type == "float" else 2 ** (args.num_bits - 1) - 0.5
        )
    else:
        state["weight_scale"] = (high - low) / (2**args.num_bits - 1)
        zero = (-(2 ** (args.num_bits - 1)) - low / state["weight_scale"]).round()
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = library.compressors.BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    wanted = compressor.decompress(stored, scheme)["weight"]
    facts = {"quant_method": "compressed-tensors", "format": form}
    facts["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": args.num_bits}}}
    return {f"a.{name}": value for name, value in stored.items()}, wanted.float(), facts


def nn_groups(weight: Tensor, size: int) -> Tensor:
    return weight.view(weight.shape[0], -1, size)


ROWS = {"strategy": "channel", "symmetric": True}
COMPRESSED: dict[str, dict[str, Any]] = {
    "int4 in groups": {"form": "pack-quantized", "num_bits": 4, **ROWS, "strategy": "group", "group_size": 32},
    "int4 with zeros": {
        "form": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False
    },
    "int8 in groups": {"form": "pack-quantized", "num_bits": 8, **ROWS, "strategy": "group", "group_size": 64},
    "int4 by rows": {"form": "pack-quantized", "num_bits": 4, **ROWS},
    "int3 in groups": {"form": "pack-quantized", "num_bits": 3, **ROWS, "strategy": "group", "group_size": 32},
    "int8 by rows": {"form": "int-quantized", "num_bits": 8, **ROWS},
    "float8 by rows": {"form": "float-quantized", "num_bits": 8, "type": "float", **ROWS},
    "float8": {"form": "float-quantized", "num_bits": 8, "type": "float", **ROWS, "strategy": "tensor"},
    "nvfp4": {
        "form": "nvfp4-pack-quantized", "num_bits": 4, "type": "float", **ROWS, "strategy": "tensor_group",
        "group_size": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("columns", [192, 200])
def test_compressed_tensors_are_what_the_library_makes_of_them(name: str, columns: int, tmp_path: Path) -> None:
    options = dict(COMPRESSED[name])
    if columns % options.get("group_size", 1):
        pytest.skip("the library has no ragged groups")
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    tensors, wanted, facts = compressed(weight, **options)
    assert ((wanted - weight).norm() / weight.norm()) < 0.3, "the test's own scales are wrong"
    found = whole(write(tmp_path / "x", {**tensors, "a.input_scale": torch.ones(1)}, facts))
    # The library multiplies FP4 in bfloat16.
    torch.testing.assert_close(found, wanted, rtol=2**-7 if name == "nvfp4" else 1e-6, atol=0)
    assert set(read_headers(tmp_path / "x")) == {"a.weight"}


def bits_of(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes along the last dimension into int32 words, one after the other: a loop, unlike what reads them."""
    count = 32 // bits
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // count, dtype=torch.int64)
    for place in range(count):
        words |= codes[..., place::count].long() << bits * (order or tuple(range(count)))[place]
    return torch.where(words >= 2**31, words - 2**32, words).int()


def stream_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes one after the other in int32 words along the last dimension, whatever they cross."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        words = [(number >> 32 * at) & 0xFFFFFFFF for at in range(len(row) * bits // 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", "auto_round", "auto_round:auto_gptq"])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(bits: int, version: str, ordered: bool, tmp_path: Path) -> None:
    rows, columns, group = 64, 96, 32
    codes_NK = torch.randint(0, 2**bits, (rows, columns))
    zero_NG, scale_NG = torch.randint(1, 2**bits, (rows, 3)), scales(rows, 3).half()
    group_K = torch.randperm(columns) // group if ordered else torch.arange(columns) // group
    wanted = (codes_NK - zero_NG[:, group_K]).float() * scale_NG.float()[:, group_K]
    packed = stream_of if bits == 3 else bits_of
    tensors = {
        "a.qweight": packed(codes_NK, bits).t(),
        "a.qzeros": packed((zero_NG - int(version.endswith("gptq"))).t(), bits),
        "a.scales": scale_NG.t(),
        "a.bias": torch.zeros(rows),
        **({"a.g_idx": group_K.int()} if ordered else {}),
    }
    facts = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    if version.startswith("auto_round"):
        facts = {"quant_method": "auto-round", "bits": bits, "packing_format": version}
    directory = write(tmp_path / "x", tensors, facts)
    assert torch.equal(whole(directory), wanted)
    assert set(read_headers(directory)) == {"a.weight", "a.bias"}


def test_packings_of_auto_round_that_nobody_knows(tmp_path: Path) -> None:
    facts = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:fp8"}
    with pytest.raises(TensorError, match="packing 'auto_round:fp8' is not read"):
        read_headers(write(tmp_path / "x", {"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}, facts))


def test_awq(tmp_path: Path) -> None:
    rows, columns = 64, 96
    codes_NK, zero_NG = torch.randint(0, 16, (rows, columns)), torch.randint(0, 16, (rows, 3))
    scale_NG, order = scales(rows, 3).half(), (0, 4, 1, 5, 2, 6, 3, 7)
    group_K = torch.arange(columns) // 32
    wanted = (codes_NK - zero_NG[:, group_K]).float() * scale_NG.float()[:, group_K]
    tensors = {
        "a.qweight": bits_of(codes_NK.t(), 4, order),
        "a.qzeros": bits_of(zero_NG.t(), 4, order),
        "a.scales": scale_NG.t(),
    }
    assert torch.equal(whole(write(tmp_path / "x", tensors, {"quant_method": "awq", "bits": 4})), wanted)
    facts = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"}
    assert torch.equal(whole(write(tmp_path / "y", tensors, facts)), wanted)


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.randint(0, 16, (32, 64))
    number, overall = scales(32, 4).mul(1000).to(torch.float8_e4m3fn), torch.tensor(0.003)
    values = torch.where(codes < 8, table[codes % 8], -table[codes % 8])
    wanted = values * number.float().repeat_interleave(16, 1) * overall
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    tensors = {"a.weight": packed, "a.weight_scale": number, "a.weight_scale_2": overall, "a.input_scale": overall}
    directory = write(tmp_path / "x", tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    torch.testing.assert_close(whole(directory), wanted, rtol=1e-6, atol=0)
    assert set(read_headers(directory)) == {"a.weight"}


def broken(change: Callable[[Tensors], Any]) -> Tensors:
    tensors = {"a.weight": codes8(256, 384), "a.weight_scale_inv": scales(2, 3)}
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t.pop("a.weight_scale_inv"), MissingTensorError, "a.weight_scale_inv"),
        (lambda t: t.update({"a.weight_scale_inv": scales(2, 5)}), TensorError, "a.weight_scale_inv"),
        (lambda t: t.update({"a.weight_scale_inv": scales(2, 3).int()}), TensorError, "a.weight_scale_inv"),
        (
            lambda t: t.update({"a.weight": codes8(255, 384), "a.weight_scale_inv": scales(4, 3)}),
            TensorError,
            "a.weight",
        ),
        (lambda t: t["a.weight_scale_inv"].fill_(float("nan")), TensorError, "a.weight"),
        (lambda t: t["a.weight_scale_inv"].fill_(float("inf")), TensorError, "a.weight"),
        (lambda t: t.update({"a.weight": codes8(384)}), TensorError, "a.weight"),
    ],
)
def test_wrong_parts_are_named(
    change: Callable[[Tensors], Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    directory = write(tmp_path / "x", broken(change), FP8)
    with pytest.raises(error, match=said.replace(".", r"\.")):
        whole(directory)


@pytest.mark.parametrize(("method", "said"), [("bitsandbytes", "16-bit"), ("quanto", "quanto"), (None, "None")])
def test_other_formats_are_refused_with_a_reason(method: str | None, said: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "x", broken(lambda _: None), {"quant_method": method, "bits": 4})
    with pytest.raises(AlreadyQuantizedError, match=said):
        read_headers(directory)

"""The Triton kernels compile to machine code of an H100, which needs no GPU: the interpreter lets too much through."""

import os
from typing import Any

import pytest

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter does not compile")

POINTERS = {
    "data": "*u8", "table": "*i64", "order": "*i32", "starts": "*i32", "counts": "*i32", "index": "*i64",
    "sums": "*fp32", "out_sums": "*fp32", "weights": "*fp32", "firsts": "*i32", "places": "*i32", "owners": "*i64",
    "orders": "*i32",
}  # fmt: skip
CHOICES = {"E": 8, "EXPERTS": 8, "PER_ROW": 2}
GATED = CHOICES | {
    "PROJECTIONS": 3,
    "POSITION": 0,
    "GATED": True,
    "LOW": False,
    "MASKED": False,
    "SPLITS": 1,
    "BLOCK_M": 16,
    "BLOCK_N": 32,
}
PLAIN = GATED | {"GATED": False, "POSITION": 2, "SPLITS": 2, "OUT_UNIT": 0}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gated": ("multiply_rows", "bf16", GATED | {
        "K": 2048, "WIDTHS": 1 << 2 | 1 << 3, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "down": ("multiply_rows", "fp16", PLAIN | {
        "K": 768, "WIDTHS": 1 << 4 | 1 << 8, "SPAN": 128, "UNIT": 32}),
    "ragged": ("multiply_rows", "bf16", PLAIN | {
        "MASKED": True, "K": 200, "WIDTHS": 1 << 1 | 1 << 6, "SPAN": 32, "UNIT": 32, "EXPERTS": 0}),
    "many rows": ("multiply_rows", "bf16", PLAIN | {
        "K": 2048, "WIDTHS": 1 << 5, "SPAN": 64, "UNIT": 64, "BLOCK_M": 64, "BLOCK_N": 64}),
    "float32": ("multiply_rows", "fp32", PLAIN | {"K": 256, "WIDTHS": 1 << 4, "SPAN": 128, "UNIT": 128}),
    "decode": ("decode", "bf16", {
        "PROJECTIONS": 3, "POSITION": 0, "MATRICES": 2, "N": 768, "K": 2048, "BLOCK_N": 16}),
    "decoded": ("multiply_decoded", "bf16", {
        "COUNT": 8, "EXPERTS": 8, "PER_ROW": 2, "GATED": True, "N": 768, "K": 2048,
        "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}),
    "decoded float32": ("multiply_decoded", "fp32", {
        "COUNT": 8, "EXPERTS": 8, "PER_ROW": 2, "GATED": True, "N": 768, "K": 2048,
        "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}),
    "prepare": ("prepare", "bf16", {"K": 2048, "UNIT": 128, "CHUNK": 1024}),
    "low rank": ("multiply_rows", "bf16", GATED | {
        "LOW": True, "K": 2048, "WIDTHS": 1 << 3, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "combine": ("combine", "bf16", {"TOP_K": 2, "SPLITS": 2, "N": 768, "BLOCK_N": 256}),
    "components": ("combine_rows", "bf16", CHOICES | {
        "K": 768, "WIDTHS": 0b101111110, "SPAN": 128, "SPLITS": 1, "BLOCK_M": 16, "BLOCK_N": 32}),
    "split components": ("combine_rows", "fp16", CHOICES | {
        "K": 1408, "WIDTHS": 1 << 2 | 1 << 3, "SPAN": 32, "SPLITS": 4, "BLOCK_M": 64,
        "BLOCK_N": 32}),
    "output factors": ("combine_rows", "bf16", {
        "E": 1, "EXPERTS": 0, "PER_ROW": 1, "K": 72, "WIDTHS": 1 << 8, "SPAN": 128, "SPLITS": 1,
        "BLOCK_M": 16, "BLOCK_N": 32}),
    "dots": ("dot_rows", "bf16", CHOICES | {
        "PER_ROW": 1, "K": 768, "WIDTHS": 1 << 2 | 1 << 3, "SPAN": 128, "UNIT": 128, "BLOCK_M": 16,
        "BLOCK_N": 32}),
    "permute": ("permute", "bf16", {"OWNED": True, "PER_ROW": 8, "K": 2048, "BLOCK_K": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_kernel_compiles_for_an_h100(case: str) -> None:
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    from moeq.kernels import triton_kernels, triton_rows

    name, dtype, constants = CASES[case]
    kernel = getattr(triton_kernels if hasattr(triton_kernels, name) else triton_rows, name)
    split = name in ("multiply_rows", "combine_rows") and constants.get("SPLITS", 1) > 1
    of_dtype = {"x": f"*{dtype}", "low": f"*{dtype}", "out": "*fp32" if split else f"*{dtype}", "parts": "*fp32"}
    if name in ("decode", "multiply_decoded"):
        of_dtype["weights"] = f"*{dtype}"  # decoded matrices, not those of the choices
    types = POINTERS | of_dtype
    signature = {
        argument: "constexpr" if argument in constants and argument.isupper() else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    constexprs = {key: value for key, value in constants.items() if signature.get(key) == "constexpr"}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(source, target=compiler.GPUTarget("cuda", 90, 32), options={"num_stages": 3})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 227 * 1024
    multiplies = name == "multiply_rows" or (name in ("combine_rows", "dot_rows") and constants["K"] % 128 == 0)
    if multiplies and dtype != "fp32":
        ttgir = compiled.asm["ttgir"]
        assert "async_copy_global_to_local" in ttgir, "loads do not run ahead of the products"
        assert "warp_group_dot" in ttgir or "nvidia_mma" in ttgir, "no tensor cores"


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES.values()}))
def test_no_number_of_tokens_is_compiled(name: str) -> None:
    pytest.importorskip("triton")
    from moeq.kernels import triton_kernels, triton_rows

    kernel = getattr(triton_kernels if hasattr(triton_kernels, name) else triton_rows, name)
    of_calls = {"rows", "S", "E", "FIRST", "x_columns", "out_columns"}
    given = [parameter for parameter in kernel.params if parameter.name in of_calls and not parameter.is_constexpr]
    assert given
    assert all(parameter.do_not_specialize for parameter in given)

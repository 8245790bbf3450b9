"""The Triton kernels compile to machine code of an H100, which needs no GPU: the interpreter lets too much through.

What the compiler made is looked at as well: what its loops carry, and how often it stores.
"""

import ast
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import moeq.kernels
import ttir

KERNELS = Path(moeq.kernels.__path__[0])
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
DECODED = CHOICES | {
    "COUNT": 8,
    "GATED": False,
    "LOW": False,
    "TRANSPOSED": False,
    "BLOCK_M": 128,
    "BLOCK_N": 64,
    "BLOCK_K": 64,
}
PLAIN = GATED | {"GATED": False, "POSITION": 2, "SPLITS": 2, "OUT_UNIT": 0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with constants, and what must be found in what Triton makes of it.

    Attributes:
        kernel: its name.
        dtype: of activations.
        constants: of the launch.
        carried: for each loop, from the outside in, how many values it carries from one round to the next.
        stores: in the text of the kernel.
    """

    kernel: str
    dtype: str
    constants: dict[str, Any]
    carried: tuple[int, ...]
    stores: int = 1


CASES = {
    "gated": Case(kernel="multiply_rows", dtype="bf16", carried=(2, 1, 1), stores=2, constants=GATED | {
        "K": 2048, "WIDTHS": 1 << 2 | 1 << 3, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "seven widths": Case(kernel="multiply_rows", dtype="bf16", carried=(2, 1, 1, 1, 1, 1), stores=2, constants=GATED | {
        "K": 2048, "WIDTHS": 0b101111110, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "down": Case(kernel="multiply_rows", dtype="fp16", carried=(1, 1), constants=PLAIN | {
        "K": 768, "WIDTHS": 1 << 4 | 1 << 8, "SPAN": 128, "UNIT": 32}),
    "ragged": Case(kernel="multiply_rows", dtype="bf16", carried=(1, 1), constants=PLAIN | {
        "MASKED": True, "K": 200, "WIDTHS": 1 << 1 | 1 << 6, "SPAN": 32, "UNIT": 32, "EXPERTS": 0}),
    "many rows": Case(kernel="multiply_rows", dtype="bf16", carried=(1,), constants=PLAIN | {
        "K": 2048, "WIDTHS": 1 << 5, "SPAN": 64, "UNIT": 64, "BLOCK_M": 64, "BLOCK_N": 64}),
    "float32": Case(kernel="multiply_rows", dtype="fp32", carried=(1,), constants=PLAIN | {
        "K": 256, "WIDTHS": 1 << 4, "SPAN": 128, "UNIT": 128}),
    "codebooks": Case(kernel="multiply_rows", dtype="bf16", carried=(2, 1, 1, 1), stores=2, constants=GATED | {
        "K": 2048, "WIDTHS": 1 << 4 | 1 << 18 | 1 << 19, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "trellises": Case(kernel="multiply_rows", dtype="bf16", carried=(2, 1, 1, 1, 1), stores=2, constants=GATED | {
        "K": 2048, "WIDTHS": 1 << 4 | 1 << 25 | 1 << 26 | 1 << 27, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "ragged trellises": Case(kernel="multiply_rows", dtype="fp16", carried=(1, 1), constants=PLAIN | {
        "MASKED": True, "K": 200, "WIDTHS": 1 << 26 | 1 << 28, "SPAN": 32, "UNIT": 32}),
    "decode trellises": Case(kernel="decode", dtype="bf16", carried=(), stores=2 * 4, constants={
        "PROJECTIONS": 3, "POSITION": 0, "MATRICES": 2, "N": 768, "K": 200, "WIDTHS": 0b1111 << 25, "BLOCK_N": 16}),
    "decode": Case(kernel="decode", dtype="bf16", carried=(), stores=1, constants={
        "PROJECTIONS": 3, "POSITION": 0, "MATRICES": 2, "N": 768, "K": 2048, "WIDTHS": 0b101111110, "BLOCK_N": 16}),
    "decode codebooks": Case(kernel="decode", dtype="bf16", carried=(), stores=4 + 2, constants={
        "PROJECTIONS": 3, "POSITION": 0, "MATRICES": 2, "N": 768, "K": 200, "WIDTHS": 1 << 18 | 1 << 19,
        "BLOCK_N": 16}),
    "decoded": Case(kernel="multiply_decoded", dtype="bf16", carried=(2,), constants=DECODED | {
        "GATED": True, "LOW": True}),
    "decoded float32": Case(kernel="multiply_decoded", dtype="fp32", carried=(2,), constants=DECODED | {
        "GATED": True, "BLOCK_K": 32}),
    "decoded components": Case(kernel="multiply_decoded", dtype="bf16", carried=(1,), constants=DECODED | {
        "TRANSPOSED": True}),
    "prepare": Case(kernel="prepare", dtype="bf16", carried=(1, 1, 0), stores=4, constants={
        "K": 2048, "UNIT": 128, "CHUNK": 1024}),
    "low rank": Case(kernel="multiply_rows", dtype="bf16", carried=(2, 1), stores=2, constants=GATED | {
        "LOW": True, "K": 2048, "WIDTHS": 1 << 3, "SPAN": 128, "UNIT": 128, "OUT_UNIT": 32}),
    "combine": Case(kernel="combine", dtype="bf16", carried=(), constants={
        "TOP_K": 2, "SPLITS": 2, "N": 768, "BLOCK_N": 256}),
    "components": Case(kernel="combine_rows", dtype="bf16", carried=(1,) * 7, constants=CHOICES | {
        "K": 768, "WIDTHS": 0b101111110, "SPAN": 128, "SPLITS": 1, "BLOCK_M": 16, "BLOCK_N": 32}),
    "split components": Case(kernel="combine_rows", dtype="fp16", carried=(1, 1), constants=CHOICES | {
        "K": 1408, "WIDTHS": 1 << 2 | 1 << 3, "SPAN": 32, "SPLITS": 4, "BLOCK_M": 64, "BLOCK_N": 32}),
    "output factors": Case(kernel="combine_rows", dtype="bf16", carried=(1,), constants=CHOICES | {
        "K": 200, "WIDTHS": 1 << 8, "SPAN": 128, "SPLITS": 1, "BLOCK_M": 16, "BLOCK_N": 32, "EXPERTS": 0}),
    "dots": Case(kernel="dot_rows", dtype="bf16", carried=(4, 1, 1), constants=CHOICES | {
        "K": 768, "WIDTHS": 1 << 2 | 1 << 3, "SPAN": 128, "UNIT": 128, "BLOCK_M": 16, "BLOCK_N": 32}),
    "rows": Case(kernel="decode_rows", dtype="bf16", carried=(4,), stores=2, constants={
        "E": 8, "K": 200, "BLOCK_N": 32}),
    "permute": Case(kernel="permute", dtype="bf16", carried=(), constants={
        "OWNED": True, "PER_ROW": 8, "K": 2048, "BLOCK_K": 1024}),
}  # fmt: skip


def source_of(case: Case) -> Any:
    """A case as Triton compiles it."""
    triton = pytest.importorskip("triton")
    from moeq.kernels import triton_kernels, triton_rows

    name, dtype, constants = case.kernel, case.dtype, case.constants
    kernel = getattr(triton_kernels if hasattr(triton_kernels, name) else triton_rows, name)
    split = name in ("multiply_rows", "combine_rows") and constants.get("SPLITS", 1) > 1
    of_dtype = {"x": f"*{dtype}", "low": f"*{dtype}", "out": "*fp32" if split else f"*{dtype}", "parts": "*fp32"}
    if name in ("decode", "multiply_decoded", "decode_rows"):
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
        if signature[argument].startswith("*") or (argument in ("N", "K") and signature[argument] == "i32")
    }
    return triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)


def every(ops: Sequence[ttir.Op], name: str) -> Iterator[ttir.Op]:
    """The operations of a name, in the order of the text."""
    for op in ops:
        if op.name == name:
            yield op
        for region in op.regions:
            yield from every(region, name)


OFTEN = ("dots", "trellises")
"""Cases that every run compiles; the others are for the night."""


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.nightly) for name in CASES]
)
def test_kernel_compiles_for_an_h100(name: str) -> None:
    source, case = source_of(CASES[name]), CASES[name]
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 3, "enable_fp_fusion": True}
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 227 * 1024
    whole = case.constants["K"] % 128 == 0 if "K" in case.constants else True
    multiplies = case.kernel == "multiply_rows" or (case.kernel in ("combine_rows", "dot_rows") and whole)
    if multiplies and case.dtype != "fp32":
        ttgir = compiled.asm["ttgir"]
        assert "async_copy_global_to_local" in ttgir, "loads do not run ahead of the products"
        assert "warp_group_dot" in ttgir or "nvidia_mma" in ttgir, "no tensor cores"


@pytest.mark.parametrize("name", CASES)
def test_loops_carry_what_they_must(name: str) -> None:
    """A name that no loop carries keeps its first value, without a word: gates were zero on GPUs for that reason."""
    from triton.backends.compiler import GPUTarget

    case = CASES[name]
    _, _, body = ttir.parse(ttir.module_of(source_of(case), GPUTarget("cuda", 90, 32), {"enable_fp_fusion": True}))
    carried = tuple(len(op.results) for op in every(body, "scf.for"))
    assert carried == case.carried
    assert len(list(every(body, "tt.store"))) == case.stores


def twins_in_loops(function: ast.FunctionDef) -> Iterator[tuple[int, str, str]]:
    """Assignments of one plain name to another before a loop that gives both new values: line, names."""
    for block in (node.body for node in ast.walk(function) if hasattr(node, "body") and isinstance(node.body, list)):
        names: dict[str, tuple[int, str]] = {}
        for statement in block:
            if isinstance(statement, ast.For):
                given = {
                    node.id
                    for inner in statement.body
                    for node in ast.walk(inner)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                }
                yield from ((line, a, b) for a, (line, b) in names.items() if a in given and b in given)
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                names.pop(name, None)
                if isinstance(statement.value, ast.Name):
                    names[name] = statement.lineno, statement.value.id


@pytest.mark.parametrize("path", sorted(KERNELS.glob("triton_*.py")), ids=lambda path: path.stem)
def test_no_two_names_of_one_value_enter_a_loop(path: Path) -> None:
    """Triton sees what a loop changes by comparing values: a name given that of another looks unchanged."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert functions
    assert not [found for function in functions for found in twins_in_loops(function)]


def test_the_gate_of_old_is_found() -> None:
    old = """def f():
        gate = zeros()
        acc = gate
        for matrix in range(2):
            gate = acc
            acc = product()
    """
    assert list(twins_in_loops(ast.parse(old).body[0])) == [(3, "acc", "gate")]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted({case.kernel for case in CASES.values()}))
def test_no_number_of_tokens_is_compiled(name: str) -> None:
    pytest.importorskip("triton")
    from moeq.kernels import triton_kernels, triton_rows

    kernel = getattr(triton_kernels if hasattr(triton_kernels, name) else triton_rows, name)
    of_calls = {"rows", "S", "E", "FIRST", "x_columns", "out_columns"}  # N and K of what is decoded are of layers
    given = [parameter for parameter in kernel.params if parameter.name in of_calls and not parameter.is_constexpr]
    assert given
    assert all(parameter.do_not_specialize for parameter in given)

"""The compiled kernels for trellises against the torch reference: with exact activations and rounded ones."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_help import mixtral, random_record, rounded, worst

from moeq import native
from moeq.format.records import decode_in_chunks
from moeq.layouts.grouped import cpu, known, reference
from moeq.layouts.grouped.stored import table_of
from moeq.spec import GROUP_SIZES, TRELLISES, QuantSpec

pytestmark = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
SHAPES = ((1, 4), (3, 8), (300, 264), (17, 500), (129, 1024), (70, 4360), (16, 128), (64, 4096))
"""(N, K), with whole and ragged runs of rows and of columns, some wider than what is looked at at a time."""


def spec_of(bits: int, at: int = 0) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=GROUP_SIZES[at % 4], levels="trellis")


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("bits", TRELLISES)
def test_products_are_those_of_the_decoded_matrix(bits: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for at, (shape, tokens) in enumerate(product(SHAPES, (1, 2, 3, 4, 7))):
        spec = spec_of(bits, at)
        record = random_record(spec, shape, generator)
        w_NK, x_SK = decode_in_chunks(record, spec, shape), torch.randn(tokens, shape[1], generator=generator)
        exact = native.linear(record, spec, shape, x_SK, exact=True, isa=isa)
        assert worst(exact, x_SK @ w_NK.T, x_SK, w_NK) < 1e-6
        fast = native.linear(record, spec, shape, x_SK, isa=isa)
        assert worst(fast, rounded(x_SK) @ w_NK.T, x_SK, w_NK) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(tuple(TRELLISES)),
    at=st.integers(0, 3),
    rows=st.integers(1, 300),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(bits: int, at: int, rows: int, columns: int, tokens: int, seed: int) -> None:
    generator, spec, shape = torch.Generator().manual_seed(seed), spec_of(bits, at), (rows, columns)
    record = random_record(spec, shape, generator)
    w_NK, x_SK = decode_in_chunks(record, spec, shape), torch.randn(tokens, columns, generator=generator)
    found = native.linear(record, spec, shape, x_SK)
    assert worst(found, rounded(x_SK) @ w_NK.T, x_SK, w_NK) < 1e-6
    first = seed % rows
    for isa in native.isas():
        decoded = native.decode_matrix(record, spec, shape, torch.bfloat16, rows=(first, rows), isa=isa)
        assert torch.equal(decoded, w_NK[first:].bfloat16())


@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
@pytest.mark.parametrize("name", known.trellis_layers())
def test_layers_of_experts(name: str, tokens: int) -> None:
    layer = known.trellis_layers()[name]
    hidden, inner = layer.shapes["down"]
    module = mixtral(hidden, inner, layer.num_experts)
    generator = torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, hidden, generator=generator)
    index_Tk = torch.randint(0, layer.num_experts, (tokens, 2), generator=generator)
    weight_Tk = torch.rand(tokens, 2, generator=generator)
    wanted = reference.experts(module, layer, x_TH, index_Tk, weight_Tk)
    ready = replace(layer, table=table_of(layer.entries), exact=True)
    with torch.no_grad():
        found = cpu.experts(module, ready, x_TH, index_Tk, weight_Tk)
    assert found is not None
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_threads_do_not_change_the_answer() -> None:
    generator, spec, shape = torch.Generator().manual_seed(0), spec_of(2), (700, 512)
    record, x_SK = random_record(spec, shape, generator), torch.randn(3, 512, generator=generator)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(native.linear(record, spec, shape, x_SK))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answer, answers[0]) for answer in answers)

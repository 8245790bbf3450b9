"""The compiled kernels for codebooks against the torch reference: with exact activations and rounded ones."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_help import mixtral, random_record, rounded, tiled_layer_of, worst
from torch import Tensor

from moeq import native
from moeq.format.records import decode_in_chunks, decode_matrix
from moeq.layouts.grouped import cpu, reference
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.layouts.grouped.serving import LINEAR
from moeq.layouts.grouped.stored import table_of
from moeq.layouts.serving import first
from moeq.layouts.tiled import cpu as tiled_cpu
from moeq.layouts.tiled import reference as tiled
from moeq.layouts.tiled.shape import TileForm
from moeq.spec import QuantSpec, align, sections, stored_bytes

pytestmark = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
HIDDEN, INNER, EXPERTS = 264, 520, 5
FORMS = (
    TileForm(rank=5, rows=2, columns=3, orders="tile", block=8, plain=8),
    TileForm(rank=0, rows=2, columns=3),
)
SPECS = {bits: QuantSpec(bits=bits, group_size=-1, levels="vector") for bits in (2, 3)}
SCALARS = (QuantSpec(bits=1, levels="half"), QuantSpec(bits=4), QuantSpec(bits=8, levels="sym", group_size=-1))
SHAPES = ((1, 4), (3, 8), (300, 264), (17, 500), (257, 1024), (40, 4360), (16, 128))
"""(N, K), with whole and ragged blocks of rows and of columns, one wider than what is looked up at a time."""


def layer_of(seed: int = 0, *, exact: bool | None = None) -> PackedLayer:
    """Experts in codebooks of both widths and in scalar levels, mixed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    kinds = (SPECS[2], SPECS[3], SCALARS[seed % 3], SPECS[3], SPECS[2], SPECS[3], SCALARS[(seed + 1) % 3])
    records, entries, offset = [], [], 0
    for expert in range(EXPERTS):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = kinds[(3 * expert + position + seed) % len(kinds)]
            records.append(random_record(spec, shape, generator))
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
        entries.append(tuple(row))
    table = table_of(tuple(entries))
    return PackedLayer(data=torch.cat(records), entries=tuple(entries), shapes=shapes, table=table, exact=exact)


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_Tk = torch.randint(0, EXPERTS, (tokens, 2), generator=generator)
    weight_Tk = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator), index_Tk, weight_Tk


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("bits", [2, 3])
def test_products_are_those_of_the_decoded_matrix(bits: int, isa: str) -> None:
    generator, spec = torch.Generator().manual_seed(bits), SPECS[bits]
    for shape, tokens in product(SHAPES, (1, 2, 3, 4, 7)):
        record = random_record(spec, shape, generator)
        w_NK, x_SK = decode_in_chunks(record, spec, shape), torch.randn(tokens, shape[1], generator=generator)
        exact = native.linear(record, spec, shape, x_SK, exact=True, isa=isa)
        assert worst(exact, x_SK @ w_NK.T, x_SK, w_NK) < 1e-6
        fast = native.linear(record, spec, shape, x_SK, isa=isa)
        assert worst(fast, rounded(x_SK) @ w_NK.T, x_SK, w_NK) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3)),
    rows=st.integers(1, 600),
    vectors=st.integers(1, 500),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(bits: int, rows: int, vectors: int, tokens: int, seed: int) -> None:
    generator, spec = torch.Generator().manual_seed(seed), SPECS[bits]
    assert spec.codebooks is not None
    shape = rows, vectors * spec.codebooks.dim
    record = random_record(spec, shape, generator)
    w_NK, x_SK = decode_in_chunks(record, spec, shape), torch.randn(tokens, shape[1], generator=generator)
    found = native.linear(record, spec, shape, x_SK)
    assert worst(found, rounded(x_SK) @ w_NK.T, x_SK, w_NK) < 1e-6
    first, last = sorted(torch.randint(0, rows + 1, (2,), generator=generator).tolist())
    assert torch.equal(decode_matrix(record, spec, shape, rows=(first, last)), w_NK[first:last])


@pytest.mark.parametrize("bits", [2, 3])
def test_extreme_entries_do_not_overflow(bits: int) -> None:
    """Entries of 0, which stand for -128, and of 255 all over, times activations that are all the largest."""
    spec, shape = SPECS[bits], (256, 1024)
    record = random_record(spec, shape, torch.Generator().manual_seed(0))
    offset, size = sections(spec, shape).zeros
    for low, high in ((0, 0), (255, 255), (0, 255)):
        record[offset : offset + size] = torch.tensor([low, high], dtype=torch.uint8).repeat(size // 2)
        w_NK, x_SK = decode_in_chunks(record, spec, shape), torch.ones(1, 1024)
        x_SK[:, 1::2] = 1.0 if low == high else -1.0
        for isa in native.isas():
            found = native.linear(record, spec, shape, x_SK, isa=isa)
            torch.testing.assert_close(found.double(), x_SK.double() @ w_NK.double().T, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("bits", [2, 3])
def test_decoded_bits_are_those_of_torch(bits: int, dtype: torch.dtype) -> None:
    generator, spec = torch.Generator().manual_seed(bits), SPECS[bits]
    for shape in SHAPES:
        record = random_record(spec, shape, generator)
        wanted, some = decode_in_chunks(record, spec, shape, dtype), (shape[0] // 2, shape[0])
        for isa, threads in product(native.isas(), (1, 2)):
            assert torch.equal(native.decode_matrix(record, spec, shape, dtype, threads=threads, isa=isa), wanted)
            found = native.decode_matrix(record, spec, shape, dtype, rows=some, threads=threads, isa=isa)
            assert torch.equal(found, wanted[some[0] :])


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 20])
@pytest.mark.parametrize("layout", ["grouped", "tiled"])
def test_layers_are_those_of_the_reference(layout: str, tokens: int, dtype: torch.dtype) -> None:
    module = mixtral(HIDDEN, INNER, EXPERTS)
    x_TH, index_Tk, weight_Tk = inputs(tokens)
    x_TH, weight_Tk = x_TH.to(dtype), weight_Tk.to(dtype)
    for seed, form in enumerate(FORMS):
        layer = layer_of(seed)
        tiles = tiled_layer_of(layer, form, torch.Generator().manual_seed(seed))
        floats = x_TH.float(), index_Tk, weight_Tk.float()
        if layout == "tiled":
            wanted = tiled.experts(module, tiles, *floats)
        else:
            wanted = reference.experts(module, layer, *floats)
        scale = wanted.norm(dim=1, keepdim=True) / HIDDEN**0.5
        for exact in (True, None, False):
            one = replace(layer, exact=exact)
            if layout == "tiled":
                changed = replace(tiles, residual=one)
                found = tiled_cpu.experts(module, changed, x_TH, index_Tk, weight_Tk)
            else:
                found = cpu.experts(module, one, x_TH, index_Tk, weight_Tk)
            assert found is not None
            assert found.dtype == dtype
            error = (found.float() - wanted) / scale
            if dtype == torch.float32 and (exact or (exact is None and tokens > cpu.FEW)):
                assert error.abs().max() < 1e-4
            assert error.square().mean().sqrt() < 0.05, "8 bits"


def test_threads_change_nothing() -> None:
    x_TH, index_Tk, weight_Tk = inputs(3)
    layer, threads = layer_of(), torch.get_num_threads()
    matrix = layer.matrix(0, "gate")
    assert matrix.spec.codebooks is not None
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            arguments = layer.data, layer.table, INNER, x_TH, index_Tk, weight_Tk
            fused = [native.experts(*arguments, exact=exact) for exact in (False, True)]
            single = [
                native.linear(matrix.record, matrix.spec, matrix.shape, x_TH, exact=exact) for exact in (False, True)
            ]
            results.append(fused + single)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_what_is_no_number_stays_none() -> None:
    for spec in SPECS.values():
        shape, x_SK = (4, 264), torch.ones(2, 264)
        record = random_record(spec, shape, torch.Generator().manual_seed(0))
        x_SK[1, 260] = float("nan")
        for exact in (False, True):
            found = native.linear(record, spec, shape, x_SK, exact=exact)
            assert found[0].isfinite().all()
            assert not found[1].isfinite().any()


def test_linears_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows from codes, many decoded."""
    layer = layer_of()
    matrix: PackedMatrix = layer.matrix(0, "gate")
    assert matrix.spec.codebooks is not None
    for tokens in (2, cpu.FEW + 4):
        x_SK = inputs(tokens)[0]
        found = cpu.linear(x_SK, replace(matrix, exact=True))
        assert found is not None
        torch.testing.assert_close(found, reference.linear(x_SK, matrix), rtol=1e-4, atol=1e-5)
        assert torch.equal(first(LINEAR, x_SK, replace(matrix, exact=True)), found)
    monkeypatch.setattr(native, "_module", None)
    wanted = x_SK @ decode_matrix(matrix.record, matrix.spec, matrix.shape).T
    torch.testing.assert_close(first(LINEAR, x_SK, matrix), wanted)


def test_what_does_not_fit_is_refused() -> None:
    for spec in SPECS.values():
        shape, x_SK = (300, 264), torch.ones(1, 264)
        record = random_record(spec, shape, torch.Generator().manual_seed(0))
        native.linear(record, spec, shape, x_SK)
        for cut in (64, align(sections(spec, shape).zeros[1]), record.numel() - 64):
            with pytest.raises(ValueError, match="blob"):
                native.linear(record[:-cut], spec, shape, x_SK)
            with pytest.raises(ValueError, match="blob"):
                native.decode_matrix(record[:-cut], spec, shape)
        with pytest.raises(ValueError, match="no such"):
            native.linear(record, spec, shape, torch.ones(1, 265))
        with pytest.raises(ValueError, match="rows"):
            native.decode_matrix(record, spec, shape, rows=(299, 301))
    layer = layer_of()
    x_TH, index_Tk, weight_Tk = inputs(16)

    def call(**changed: Any) -> Tensor:
        given = {"data": layer.data, "table": layer.table} | changed
        return native.experts(given["data"], given["table"], INNER, x_TH, index_Tk, weight_Tk)

    call()
    assert layer.table is not None
    for column, value in ((1, 4), (2, 128), (3, 6), (0, layer.data.numel() - 64)):
        table = layer.table.clone()
        table[:, :, column] = value
        with pytest.raises(ValueError, match=r"blob|no such"):
            call(table=table)

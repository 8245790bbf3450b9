"""The compiled kernels for spectral and tiled layers against the torch references."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_help import mixtral, random_record, tiled_layer_of
from torch import Tensor, nn

from moeq import native
from moeq.arch import hooks
from moeq.layouts.grouped import cpu
from moeq.layouts.grouped.packed import PackedLayer
from moeq.layouts.grouped.stored import table_of
from moeq.layouts.serving import first
from moeq.layouts.spectral import cpu as spectral_cpu
from moeq.layouts.spectral import reference as spectral
from moeq.layouts.spectral import serving as spectral_serving
from moeq.layouts.spectral.reference import SpectralLayer, read_layer, spectral_tables
from moeq.layouts.spectral.shape import BASIS_BITS, WIDTHS, Form, basis_spec, kept_directions, map_bytes
from moeq.layouts.spectral.stored import (
    SpectralShape,
    build_spectral_table,
    pack_basis,
    pack_map,
    parse_spectral_table,
)
from moeq.layouts.tiled import cpu as tiled_cpu
from moeq.layouts.tiled import reference as tiled
from moeq.layouts.tiled import serving as tiled_serving
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.shape import TileForm
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec, stored_bytes

pytestmark = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
EXPERTS = 6
SIZES = ((200, 136), (40, 296), (256, 128))
"""(H, I)."""
FORMS = (
    TileForm(rank=5, rows=2, columns=4, orders="tile", block=8, plain=8),
    TileForm(rank=40, rows=3, columns=2, orders="expert", block=4, plain=0),
    TileForm(rank=3, rows=1, columns=6, orders="layer", block=8, plain=40),
    TileForm(rank=33, rows=6, columns=1),
    TileForm(rank=4, rows=2, columns=4, scales="expert", orders="tile", block=8, plain=0),
    TileForm(rank=0, rows=2, columns=4, orders="tile", block=8, plain=8),
    TileForm(rank=0, rows=2, columns=4),
)
Layer = SpectralLayer | TiledLayer


def spectral_layer(
    seed: int, size: tuple[int, int] = SIZES[0], *, basis_bits: int = 8, joint: bool = False, dropped: float = 0.3
) -> SpectralLayer:
    """Components of every width; each slab of another level set and group size."""
    numbers, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    hidden, inner = size
    shape = SpectralShape(projections=("gate", "up", "down"), num_experts=EXPERTS, hidden=hidden, inner=inner)
    slabs = {
        bits: QuantSpec(
            bits=bits,
            group_size=int(numbers.choice(GROUP_SIZES)),
            levels=str(numbers.choice(SCALAR_LEVELS)),
            layout="spectral",
        )
        for bits in BITS
    }
    widths = {}
    for name in shape.projections:
        widths[name] = numbers.choice(np.array(WIDTHS, dtype=np.uint8), (EXPERTS, hidden))
        widths[name][:, numbers.random(hidden) < dropped] = 0
        widths[name][EXPERTS - 1] = 0  # an expert that answers nothing
    form = Form(basis_bits=basis_bits, joint=joint, slabs=slabs)
    table, kept = build_spectral_table(form, widths, shape), kept_directions(widths, joint=joint)
    parts = []
    for at, name in enumerate(shape.projections):
        rank, spec = int(kept[name].sum()), basis_spec(basis_bits)
        if rank and not (joint and name == "up"):
            if spec is None:
                basis = pack_basis(torch.randn(rank, hidden, generator=generator) / hidden**0.5, None, 16)
            else:
                basis = random_record(spec, (rank, hidden), generator)
            parts.append(basis)
        parts.append(pack_map(widths[name][:, kept[name]]))
        assert parts[-1].numel() == map_bytes(EXPERTS, rank)
        for _, bits, _, _, rows in table[at, 1:].tolist():
            if rows:
                parts.append(random_record(slabs[bits], (rows, inner), generator))
    data = torch.cat(parts)
    layer = read_layer(data, parse_spectral_table(table, shape, data.numel()), shape, "layer")
    tables = spectral_tables(layer)
    assert tables is not None
    there = table[:, :, 4] > 0
    assert torch.equal(tables.table[there], table[there])
    return replace(layer, tables=tables)


def tiled_layer(seed: int, form: TileForm, size: tuple[int, int] = SIZES[0]) -> TiledLayer:
    """Residuals of every width, with random sides of one form."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = size
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    records, entries, offset = [], [], 0
    for expert in range(EXPERTS):
        row = []
        for at, shape in enumerate(shapes.values()):
            spec = QuantSpec(bits=BITS[(expert + at) % 7], group_size=GROUP_SIZES[(expert + seed) % 4], levels="asym")
            records.append(random_record(spec, shape, generator))
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
        entries.append(tuple(row))
    residual = PackedLayer(
        data=torch.cat(records), entries=tuple(entries), shapes=shapes, table=table_of(tuple(entries))
    )
    return tiled_layer_of(residual, form, generator)


def exactly(layer: Layer, exact: bool | None) -> Layer:
    if isinstance(layer, SpectralLayer):
        return replace(layer, exact=exact)
    return replace(layer, residual=replace(layer.residual, exact=exact))


def inputs(tokens: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Some experts are chosen twice by a token, some by nobody, and some choices are left to others."""
    generator = torch.Generator().manual_seed(seed)
    index_Tk = torch.randint(0, EXPERTS + (seed % 2), (tokens, 3), generator=generator)
    x_TH = torch.randn(tokens, hidden, generator=generator)
    return x_TH, index_Tk, torch.rand(tokens, 3, generator=generator)


def call(layer: Layer, x_TH: Tensor, index_Tk: Tensor, weight_Tk: Tensor, **options: Any) -> Tensor:
    """The fused kernel itself."""
    if isinstance(layer, SpectralLayer):
        tables = layer.tables
        assert tables is not None
        arguments = layer.data, tables.table, tables.starts, tables.order, layer.shape.inner
        return native.spectral_experts(*arguments, x_TH, index_Tk, weight_Tk, **options)
    assert layer.side_data is not None
    assert layer.tiles is not None
    residual = layer.residual
    arguments = residual.data, residual.table, layer.side_data, layer.tiles, residual.shapes["up"][0]
    return native.tiled_experts(*arguments, x_TH, index_Tk, weight_Tk, **options)


def reference_of(layer: Layer) -> Callable[..., Tensor]:
    return spectral.experts if isinstance(layer, SpectralLayer) else tiled.experts


def check(layer: Layer, size: tuple[int, int], tokens: int, seed: int, isa: str) -> None:
    module = mixtral(*size, EXPERTS)
    arguments = inputs(tokens, size[0], seed)
    wanted = reference_of(layer)(module, layer, *arguments)
    scale = wanted.norm(dim=1, keepdim=True).clamp(min=1e-3) / size[0] ** 0.5
    exact = call(layer, *arguments, exact=True, isa=isa)
    assert ((exact - wanted) / scale).abs().max() < 1e-4
    fast = call(layer, *arguments, isa=isa)
    assert ((fast - wanted) / scale).square().mean().sqrt() < 0.08, "8 bits"


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("basis_bits", BASIS_BITS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    joint=st.booleans(),
    size=st.sampled_from(SIZES),
    tokens=st.sampled_from((1, 2, 3, 5, 16)),
    dropped=st.sampled_from((0.0, 0.5, 0.97)),
)
def test_spectral_layers(
    isa: str, basis_bits: int, seed: int, joint: bool, size: tuple[int, int], tokens: int, dropped: float
) -> None:
    check(spectral_layer(seed, size, basis_bits=basis_bits, joint=joint, dropped=dropped), size, tokens, seed, isa)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tiled_layers(isa: str, form: TileForm) -> None:
    for seed, tokens in enumerate((1, 2, 7, 16)):
        size = SIZES[seed % 3]
        check(tiled_layer(seed, form, size), size, tokens, seed, isa)


@pytest.mark.parametrize("bits", BITS)
def test_one_width_alone(bits: int) -> None:
    """Every level set and group size of a width, so that an error in one cannot hide among the others."""
    generator = torch.Generator().manual_seed(bits)
    inner, hidden, components = 300, 96, 70
    shape = SpectralShape(projections=("gate", "up", "down"), num_experts=1, hidden=hidden, inner=inner)
    module = mixtral(hidden, inner, 1)
    for levels in SCALAR_LEVELS:
        for group_size in GROUP_SIZES:
            slabs = {bits: QuantSpec(bits=bits, group_size=group_size, levels=levels, layout="spectral")}
            widths = {name: np.zeros((1, hidden), np.uint8) for name in shape.projections}
            for each in widths.values():
                each[0, torch.randperm(hidden, generator=generator)[:components].numpy()] = bits
            table = build_spectral_table(Form(basis_bits=16, joint=False, slabs=slabs), widths, shape)
            parts = []
            for each in widths.values():
                basis = torch.randn(components, hidden, generator=generator) / 8
                parts += [pack_basis(basis, None, 16), pack_map(each[:, each[0] > 0])]
                parts.append(random_record(slabs[bits], (components, inner), generator))
            data = torch.cat(parts)
            layer = read_layer(data, parse_spectral_table(table, shape, data.numel()), shape, "layer")
            layer = replace(layer, tables=spectral_tables(layer))
            x_TH = torch.randn(3, hidden, generator=generator)
            index, weight = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
            wanted = spectral.experts(module, layer, x_TH, index, weight)
            scale = wanted.norm(dim=1, keepdim=True) / hidden**0.5
            for isa in native.isas():
                fast = call(layer, x_TH, index, weight, isa=isa)
                assert ((fast - wanted) / scale).square().mean().sqrt() < 0.05


LAYERS: dict[str, Callable[[], Layer]] = {
    "spectral": lambda: spectral_layer(1),
    "tiled": lambda: tiled_layer(1, FORMS[0]),
    "scales": lambda: tiled_layer(1, FORMS[4]),
}


def run(module: nn.Module, layer: Layer, *arguments: Tensor) -> Tensor:
    """As models do."""
    if isinstance(layer, SpectralLayer):
        return first(spectral_serving.EXPERTS, module, layer, *arguments)
    return first(tiled_serving.EXPERTS, module, layer, *arguments)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_and_many_tokens(name: str, dtype: torch.dtype) -> None:
    layer, module = LAYERS[name](), mixtral(*SIZES[0], EXPERTS)
    for tokens in (4, cpu.FEW + 1):
        x_TH, index_Tk, weight_Tk = inputs(tokens, SIZES[0][0])
        x_TH, weight_Tk = x_TH.to(dtype), weight_Tk.to(dtype)
        wanted = reference_of(layer)(module, layer, x_TH.float(), index_Tk, weight_Tk.float())
        scale = wanted.norm(dim=1, keepdim=True) / SIZES[0][0] ** 0.5
        for exact in (True, None, False):
            found = run(module, exactly(layer, exact), x_TH, index_Tk, weight_Tk)
            assert found.dtype == dtype
            error = ((found.float() - wanted) / scale).square().mean().sqrt()
            floats = dtype == torch.float32 and (exact or (exact is None and tokens > cpu.FEW))
            assert error < (1e-5 if floats else 0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_nothing(name: str) -> None:
    layer, threads = LAYERS[name](), torch.get_num_threads()
    arguments = inputs(5, SIZES[0][0])
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((call(layer, *arguments), call(layer, *arguments, exact=True)))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        assert torch.equal(found[1], results[0][1])


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_number_stays_none(name: str) -> None:
    layer = LAYERS[name]()
    x_TH, index_Tk, weight_Tk = inputs(3, SIZES[0][0])
    index_Tk[:] = torch.tensor([0, 1, 2])
    x_TH[1, 7] = float("nan")
    for exact in (False, True):
        found = call(layer, x_TH, index_Tk, weight_Tk, exact=exact)
        assert found[[0, 2]].isfinite().all()
        assert not found[1].isfinite().any()


def test_what_is_left_to_the_references() -> None:
    arguments = inputs(2, SIZES[0][0])
    x_TH, index_Tk, weight_Tk = arguments
    silu, gelu = mixtral(*SIZES[0], EXPERTS), mixtral(*SIZES[0], EXPERTS, "gelu")
    assert not hooks.gates_by_silu(gelu, SIZES[0][1])
    spectral_, tiled_ = spectral_layer(0), exactly(tiled_layer(0, FORMS[0]), True)
    assert isinstance(tiled_, TiledLayer)
    kernel: Any
    for kernel, layer in ((spectral_cpu.experts, spectral_), (tiled_cpu.experts, tiled_)):
        assert kernel(silu, layer, *arguments) is not None
        assert kernel(silu, layer, x_TH.double(), index_Tk, weight_Tk) is None
        assert kernel(silu, layer, x_TH.clone().requires_grad_(), index_Tk, weight_Tk) is None
        assert kernel(silu, layer, x_TH, index_Tk, weight_Tk.clone().requires_grad_()) is None
    assert spectral_cpu.experts(gelu, spectral_, *arguments) is None
    assert spectral_cpu.experts(silu, replace(spectral_, tables=None), *arguments) is None
    found = tiled_cpu.experts(gelu, tiled_, *arguments)
    torch.testing.assert_close(found, tiled.experts(gelu, tiled_, *arguments), rtol=1e-4, atol=1e-5)
    plain = tiled_layer(0, FORMS[-1])
    grouped = cpu.experts(silu, plain.residual, *arguments)
    assert torch.equal(tiled_cpu.experts(silu, plain, *arguments), grouped)


def test_parts_that_lie_elsewhere_are_refused() -> None:
    arguments = inputs(16, SIZES[0][0])
    layer = spectral_layer(2)
    tables = layer.tables
    assert tables is not None
    for name, where, value in (
        ("table", (0, 0, 0), layer.data.numel() - 64),
        ("table", (0, 0, 0), -64),
        ("table", (0, 0, 4), 10**6),
        ("table", (1, 3, 0), layer.data.numel()),
        ("table", (2, 2, 4), 10**9),
        ("table", (2, 2, 1), 7),
        ("starts", (0, 0, 1), 10**6),
        ("starts", (2, 1, 2), -1),
        ("order", (0, 0, 0), -1),
        ("order", (2, 1, 0), 3000),
    ):
        changed = getattr(tables, name).clone()
        changed[where] = value
        with pytest.raises(ValueError, match=r"blob|no such|basis|components"):
            call(replace(layer, tables=replace(tables, **{name: changed})), *arguments)
    for form in FORMS[:5]:
        tiles_layer = tiled_layer(2, form)
        assert tiles_layer.tiles is not None
        assert tiles_layer.side_data is not None
        for column, value in ((0, -64), (0, 10**7), (1, 4000), (2, 0), (3, 100), (4, 2), (5, 4)):
            changed = tiles_layer.tiles.clone()
            changed[1, column] = value
            with pytest.raises(ValueError, match=r"blob|no such"):
                call(replace(tiles_layer, tiles=changed), *arguments)
        with pytest.raises(ValueError, match=r"blob|grid"):
            call(replace(tiles_layer, side_data=tiles_layer.side_data[:-64].contiguous()), *arguments)
        with pytest.raises(ValueError, match=r"grid|permutation"):
            call(replace(tiles_layer, side_data=torch.full_like(tiles_layer.side_data, 255)), *arguments)


def test_compiled_models_see_operators() -> None:
    module = mixtral(*SIZES[0], EXPERTS)
    x_TH, index_Tk, weight_Tk = inputs(3, SIZES[0][0])
    one, two = spectral_layer(3), tiled_layer(3, FORMS[0])
    tables, inner = one.tables, SIZES[0][1]
    assert tables is not None
    parts = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.moeq.packed_spectral.default,
        (x_TH, index_Tk, weight_Tk, one.data, tables.table, tables.starts, tables.order, inner, False),
        test_utils=parts,
    )
    torch.library.opcheck(
        torch.ops.moeq.packed_tiled.default,
        (x_TH, index_Tk, weight_Tk, two.residual.data, two.residual.table, two.side_data, two.tiles, inner, False),
        test_utils=parts,
    )

    def step(x: Tensor) -> Tensor:
        return run(module, one, x, index_Tk, weight_Tk) + run(module, two, x, index_Tk, weight_Tk)

    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(x_TH), step(x_TH))

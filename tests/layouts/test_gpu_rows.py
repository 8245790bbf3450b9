"""The GPU candidates for the layouts "spectral" and "tiled" compute what their torch references compute."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from packing_help import mixtral, relative_error, spectral_layer
from test_grouped_gpu import decode_first
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moeq.kernels import gpu_rows
from moeq.layouts.grouped import gpu
from moeq.layouts.grouped.packed import kernel_facts
from moeq.layouts.spectral import gpu as gpu_spectral
from moeq.layouts.spectral import reference as spectral
from moeq.layouts.spectral.reference import SpectralLayer
from moeq.layouts.spectral.shape import Form
from moeq.layouts.tiled import gpu as gpu_tiled
from moeq.layouts.tiled import reference as tiled
from moeq.layouts.tiled.facts import side_facts
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.shape import TileForm
from moeq.spec import BITS, QuantSpec
from tiles import tiled as tiled_handler

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Against the reference in float32: inputs of down and numbers between the factors are rounded on the way."""
NAMES = ("gate", "up", "down")
HIDDEN, INNER, EXPERTS = 24, 136, 3
Routed = tuple[Tensor, Tensor, Tensor]


def routed(device: torch.device, tokens: int = 3, dtype: torch.dtype = torch.float32) -> Routed:
    """Tokens with a duplicate expert, one without a token (the last), and a sentinel of expert parallelism."""
    index_Tk = torch.randint(0, EXPERTS - 1, (tokens, 2), device=device)
    index_Tk[0] = 1
    index_Tk[-1, 1] = EXPERTS
    return torch.randn(tokens, HIDDEN, device=device).to(dtype), index_Tk, torch.rand(tokens, 2, device=device)


def compare(run: Callable[..., Tensor], reference: Callable[..., Tensor], module: nn.Module, layer: Any,
            arguments: Routed) -> None:  # fmt: skip
    x_TH, index_Tk, weights_Tk = arguments
    with torch.no_grad():
        wanted = reference(module, layer, x_TH.float(), index_Tk, weights_Tk)
        answer = run(module, layer, x_TH, index_Tk, weights_Tk)
    assert answer.dtype == x_TH.dtype
    assert relative_error(answer, wanted) < TOLERANCE[x_TH.dtype]


def gpt_oss(device: torch.device) -> nn.Module:
    """A module with biases and a gate of its own."""
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    module = GptOssExperts(config).to(device)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def components(
    device: torch.device, *, joint: bool, basis_bits: int, group_size: int, given: tuple[int, ...] = (0, *BITS)
) -> SpectralLayer:
    """A layer with components of many widths; expert 0 has no gate at all."""
    torch.manual_seed(basis_bits)
    generator = np.random.default_rng(basis_bits)
    widths = {name: generator.choice(np.array(given, dtype=np.uint8), (EXPERTS, HIDDEN)) for name in NAMES}
    widths["gate"][0] = 0
    slabs = {
        bits: QuantSpec(bits=bits, group_size=group_size, levels=("half", "sym", "asym16")[bits % 3], layout="spectral")
        for bits in BITS
    }
    return spectral_layer(widths, Form(basis_bits=basis_bits, joint=joint, slabs=slabs), HIDDEN, INNER, device)


@pytest.mark.parametrize(
    ("joint", "basis_bits", "group_size", "dtype"),
    [(True, 8, 128, torch.float32), (False, 16, 32, torch.bfloat16), (False, 8, -1, torch.float16)],
)
def test_components_of_every_width(
    joint: bool, basis_bits: int, group_size: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    layer = components(triton_device, joint=joint, basis_bits=basis_bits, group_size=group_size)
    arguments = routed(triton_device, dtype=dtype)
    compare(gpu_spectral.run_experts, spectral.experts, mixtral(HIDDEN, INNER, EXPERTS), layer, arguments)


def test_components_of_many_tokens(triton_device: torch.device) -> None:
    layer = components(triton_device, joint=True, basis_bits=16, group_size=64, given=(0, 3))
    arguments = routed(triton_device, tokens=40)  # more than a tile of an expert
    compare(gpu_spectral.run_experts, spectral.experts, mixtral(HIDDEN, INNER, EXPERTS), layer, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_components_are_decoded_once_for_many_tokens(
    dtype: torch.dtype, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = components(triton_device, joint=False, basis_bits=8, group_size=32)
    decode_first(monkeypatch)
    arguments = routed(triton_device, tokens=5, dtype=dtype)
    compare(gpu_spectral.run_experts, spectral.experts, mixtral(HIDDEN, INNER, EXPERTS), layer, arguments)


def test_layers_without_components_are_silent(triton_device: torch.device) -> None:
    layer = components(triton_device, joint=False, basis_bits=8, group_size=64, given=(0,))
    arguments = routed(triton_device)
    assert not gpu_spectral.run_experts(mixtral(HIDDEN, INNER, EXPERTS), layer, *arguments).any()


def test_components_of_a_family_with_biases(triton_device: torch.device) -> None:
    layer = components(triton_device, joint=True, basis_bits=8, group_size=64, given=(0, 2))
    compare(gpu_spectral.run_experts, spectral.experts, gpt_oss(triton_device), layer, routed(triton_device))


SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
NOTHING = TileForm(rank=0, rows=2, columns=2)
FACTORS = TileForm(rank=5, rows=2, columns=2)
EVERYTHING = TileForm(rank=3, rows=2, columns=3, scales="expert", orders="tile", block=8, plain=8)
FORMS = {
    "usual": (FACTORS, replace(FACTORS, rank=3), NOTHING),
    "down": (NOTHING, NOTHING, FACTORS),
    "everything": (EVERYTHING, EVERYTHING, EVERYTHING),
    "rotation": (
        replace(NOTHING, orders="layer", block=4, plain=0),
        replace(NOTHING, orders="expert", block=8, plain=24),
        replace(NOTHING, orders="tile", block=2, plain=134),
    ),
}


def tiles(name: str, device: torch.device, **options: bool) -> TiledLayer:
    layer = tiled_handler(dict(zip(NAMES, FORMS[name], strict=True)), SHAPES, EXPERTS, **options).layer
    data, sides = layer.residual.data.to(device), layer.sides
    sides = {each: replace(side, data=side.data.to(device)) for each, side in sides.items()}
    facts = kernel_facts(layer.residual.entries, list(SHAPES.values()), device)
    return TiledLayer(
        residual=replace(layer.residual, data=data, facts=facts),
        sides=sides,
        facts={each: side_facts(side) for each, side in sides.items()},
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("usual", torch.bfloat16), ("everything", torch.float16), ("rotation", torch.float32)]
)
def test_tiles(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    arguments = routed(triton_device, dtype=dtype)
    compare(
        gpu_tiled.run_experts, tiled.experts, mixtral(HIDDEN, INNER, EXPERTS), tiles(name, triton_device), arguments
    )


@pytest.mark.parametrize("name", ["usual", "everything"])
def test_tiles_of_trellises(name: str, triton_device: torch.device) -> None:
    layer = tiles(name, triton_device, trellises=True)
    assert "trellis" in {spec.levels for expert in layer.residual.entries for _, spec in expert}
    module, arguments = mixtral(HIDDEN, INNER, EXPERTS), routed(triton_device, dtype=torch.bfloat16)
    compare(gpu_tiled.run_experts, tiled.experts, module, layer, arguments)


@pytest.mark.parametrize("name", ["usual", "everything", "rotation"])
def test_tiles_are_decoded_once_for_many_tokens(
    name: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_first(monkeypatch)
    arguments = routed(triton_device, tokens=5)
    compare(
        gpu_tiled.run_experts, tiled.experts, mixtral(HIDDEN, INNER, EXPERTS), tiles(name, triton_device), arguments
    )


def test_tiles_of_a_family_with_biases(triton_device: torch.device) -> None:
    module, layer = gpt_oss(triton_device), tiles("down", triton_device)
    compare(gpu_tiled.run_experts, tiled.experts, module, layer, routed(triton_device))


def test_no_token_at_all_is_answered(triton_device: torch.device) -> None:
    module, (x_TH, index_Tk, weights_Tk) = mixtral(HIDDEN, INNER, EXPERTS), routed(triton_device)
    nothing = x_TH[:0], index_Tk[:0], weights_Tk[:0]
    layer = components(triton_device, joint=True, basis_bits=8, group_size=64, given=(0, 2))
    assert gpu_spectral.run_experts(module, layer, *nothing).shape == (0, HIDDEN)
    for name in FORMS:
        assert gpu_tiled.run_experts(module, tiles(name, triton_device), *nothing).shape == (0, HIDDEN)


@pytest.mark.parametrize("block", [2, 128, 256, 512])
def test_rotation(block: int, triton_device: torch.device) -> None:
    form = TileForm(rank=0, rows=1, columns=1, orders="layer", block=block, plain=3)
    handler = tiled_handler({"up": form}, {"up": (8, 3 + 2 * block)}, 1)
    side = handler.layer.sides["up"]
    side = replace(side, data=side.data.to(triton_device))
    x_RI = torch.randn(2, 3 + 2 * block, device=triton_device)
    order_I = side.order(0)
    assert order_I is not None
    index = torch.zeros(2, dtype=torch.int64, device=triton_device)
    facts = side_facts(side)
    answer = gpu_rows.rotate_op(x_RI, index, facts.orders, facts.owner_E, facts.mixing, form.block, form.plain)
    torch.testing.assert_close(answer, tiled.rotate(x_RI, order_I, block, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["spectral", "tiled"])
def test_one_graph_serves_any_number_of_tokens(layout: str, triton_device: torch.device) -> None:
    module = mixtral(HIDDEN, INNER, EXPERTS)
    if layout == "spectral":
        layer: Any = components(triton_device, joint=True, basis_bits=8, group_size=64, given=(0, 2))
    else:
        layer = tiles("everything", triton_device)
    run = gpu_spectral.run_experts if layout == "spectral" else gpu_tiled.run_experts
    trace = make_fx(
        lambda *arguments: run(module, layer, *arguments), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    answer = trace(*routed(triton_device)).graph.output_node().args[0]
    assert not isinstance(answer.meta["val"].shape[0], int)


@pytest.mark.parametrize("layout", ["spectral", "tiled"])
def test_nothing_waits_for_the_host(layout: str, triton_device: torch.device) -> None:
    """Tensors without numbers go through as far as nobody asks for a number; on a GPU the call is captured as well."""
    module, arguments = mixtral(HIDDEN, INNER, EXPERTS), routed(triton_device)
    if layout == "spectral":
        layer: Any = components(triton_device, joint=True, basis_bits=8, group_size=64, given=(0, 2))
        run, reference = gpu_spectral.run_experts, spectral.experts
    else:
        layer, run, reference = tiles("everything", triton_device), gpu_tiled.run_experts, tiled.experts
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(argument) for argument in arguments]
        assert run(module, layer, *fakes).shape == fakes[0].shape
        with pytest.raises(DynamicOutputShapeException):
            reference(module, layer, *fakes)
    if triton_device.type == "cuda":
        wanted = run(module, layer, *arguments)  # and the kernels are compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(module, layer, *arguments)
        captured.zero_()
        graph.replay()
        torch.testing.assert_close(captured, wanted, rtol=1e-4, atol=1e-5)


def test_operators_obey_their_schemas(triton_device: torch.device) -> None:
    layer = tiles("everything", triton_device)
    assert layer.facts is not None
    side, facts = layer.sides["down"], layer.facts["down"]
    rows = facts.outputs
    assert rows is not None
    index = torch.tensor([2, 0], device=triton_device)
    given = (
        side.data,
        rows.table,
        rows.firsts,
        rows.places,
        [rows.widths, rows.span, rows.rows, rows.blocks, rows.columns],
    )
    checks = "test_schema", "test_faketensor"

    def check(operator: Any, *arguments: Any) -> None:
        torch.library.opcheck(operator, arguments, test_utils=checks)

    check(gpu_rows.combine_op, torch.randn(1, 3, device=triton_device), index, *given, 2)
    check(gpu_rows.combine_op, torch.randn(2, 9, device=triton_device), None, *given, 2)
    check(gpu_rows.dots_op, torch.randn(2, HIDDEN, device=triton_device), index, *given, 3)
    x_RI = torch.randn(1, INNER, device=triton_device)
    check(gpu_rows.rotate_op, x_RI, index, facts.orders, facts.owner_E, facts.mixing, 8, 8)
    check(gpu_rows.rotate_op, x_RI, index, facts.orders, None, None, 8, 8)
    residual = layer.residual
    assert residual.facts is not None
    tables = residual.facts.table, list(residual.facts.widths), list(residual.facts.spans)
    x_TH, weights_Tk = torch.randn(1, HIDDEN, device=triton_device), torch.rand(1, 2, device=triton_device)
    low_S2I = torch.randn(2, 2, INNER, device=triton_device)
    check(gpu.experts_op, x_TH, index.view(1, 2), weights_Tk, residual.data, *tables, INNER, low_S2I)

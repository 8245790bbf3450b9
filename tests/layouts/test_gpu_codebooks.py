"""The Triton kernels compute codebooks as the torch reference does."""

import pytest
import torch
from packing_help import mixtral, random_record, relative_error
from test_grouped_gpu import TOLERANCE

from moeq.layouts.grouped import gpu, reference
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix, kernel_facts
from moeq.spec import QuantSpec, stored_bytes
from often import by_day

pytestmark = pytest.mark.gpu

BOOKS = {bits: QuantSpec(bits=bits, group_size=-1, levels="vector") for bits in (2, 3)}
SCALAR = QuantSpec(bits=3, group_size=32)


def matrix_of(spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> PackedMatrix:
    record = random_record(spec, shape, torch.Generator().manual_seed(shape[1])).to(device)
    return PackedMatrix(record=record, spec=spec, shape=shape, facts=kernel_facts([[(0, spec)]], [shape], device))


def layer_of(kinds: tuple[QuantSpec, ...], hidden: int, inner: int, device: torch.device) -> PackedLayer:
    """Three experts whose matrices take the kinds in turn."""
    generator = torch.Generator().manual_seed(inner)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    records, entries, offset = [], [], 0
    for expert in range(3):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = kinds[(expert + position) % len(kinds)]
            records.append(random_record(spec, shape, generator))
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
        entries.append(tuple(row))
    facts = kernel_facts(entries, list(shapes.values()), device)
    return PackedLayer(data=torch.cat(records).to(device), entries=tuple(entries), shapes=shapes, facts=facts)


def check_experts(
    kinds: tuple[QuantSpec, ...], dtype: torch.dtype, many: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six tokens by three experts whose matrices take the kinds in turn, as the reference has them."""
    torch.manual_seed(1)
    layer, module = layer_of(kinds, 136, 264, device), mixtral(136, 264, 3)
    x_TH = torch.randn(6, 136, device=device).to(dtype)
    index_Tk = torch.randint(0, 4, (6, 2), device=device)
    weights_Tk = torch.rand(6, 2, device=device)
    wanted = reference.experts(module, layer, x_TH.float(), index_Tk, weights_Tk)
    if many:
        monkeypatch.setattr("moeq.kernels.triton_launch.DECODE_FROM", 1)
    answer = gpu.run_experts(module, layer, x_TH, index_Tk, weights_Tk)
    assert answer.dtype == dtype
    assert relative_error(answer, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 4), (40, 136), (300, 264), (17, 500), (257, 1024)])
@pytest.mark.parametrize("bits", BOOKS)
def test_linear(bits: int, shape: tuple[int, int], triton_device: torch.device) -> None:
    """Whole and ragged blocks of rows and of columns."""
    torch.manual_seed(shape[0])
    matrix = matrix_of(BOOKS[bits], shape, triton_device)
    x_RK = torch.randn(3, shape[1], device=triton_device)
    assert relative_error(gpu.run_linear(x_RK, matrix), reference.linear(x_RK, matrix)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", by_day(TOLERANCE, {torch.bfloat16}))
@pytest.mark.parametrize("kinds", [(BOOKS[2], BOOKS[3]), (BOOKS[2], SCALAR, BOOKS[3], BOOKS[3])])
@pytest.mark.parametrize("many", [False, True])
def test_experts(
    kinds: tuple[QuantSpec, ...],
    dtype: torch.dtype,
    many: bool,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codebooks of both widths beside scalar levels; multiplied as they are, and decoded first."""
    check_experts(kinds, dtype, many, triton_device, monkeypatch)

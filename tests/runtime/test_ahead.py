"""Kernels are compiled ahead, and few of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeq
import ttir
from moeq.arch import hooks
from moeq.artifacts import expert_bytes
from moeq.layouts.grouped import gpu, reference
from moeq.layouts.grouped.packed import PackedLayer, kernel_facts
from moeq.layouts.grouped.serving import PackedExperts
from moeq.runtime import ahead
from moeq.spec import BITS, QuantSpec


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were compiled; launches run on the CPU."""
    pytest.importorskip("triton")
    names: list[str] = []
    made = ttir.module_of

    def module_of(source: Any, target: Any, options: Any) -> str:
        names.append(source.name)
        return made(source, target, options)

    monkeypatch.setattr(ttir, "module_of", module_of)
    with ttir.running():
        yield names


def give_facts(model: nn.Module) -> list[tuple[nn.Module, PackedLayer]]:
    """The experts of a model on a CPU with what kernels on a device ask for, as they would have it there."""
    found = []
    for module in model.modules():
        handler = module._modules.get(hooks.HANDLER)
        if isinstance(handler, PackedExperts):
            layer = handler.layer
            facts = kernel_facts(layer.entries, list(layer.shapes.values()), layer.data.device, handler._kinds)
            handler._layer = replace(layer, facts=facts)
            found.append((module, handler._layer))
    return found


@pytest.fixture(scope="module")
def seven_widths(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model whose layers have different widths, seven in all."""
    place = tmp_path_factory.mktemp("seven")
    plan_file, out = place / "plan.json", place / "packed"
    plan = moeq.allocate(tiny_dir, quantizer="minmax", bits=5, group_size=32)
    specs = tuple(QuantSpec(bits=bits, group_size=32) for bits in BITS)
    experts = tuple(
        tuple(
            tuple((3 * number + position) % min(7, 3 + 4 * layer) for position in range(len(expert)))
            for number, expert in enumerate(rows)
        )
        for layer, rows in enumerate(plan.experts)
    )
    mixed = replace(plan, specs=specs, experts=experts)
    replace(mixed, expert_bytes=expert_bytes(mixed, moeq.inspect(tiny_dir))).save(plan_file)
    moeq.quantize(tiny_dir, out, plan=plan_file, quantizer="minmax", device="cpu")
    return out


def test_layers_share_kernels_and_nothing_is_compiled_later(seven_widths: Path, compiled: list[str]) -> None:
    model = moeq.load(seven_widths, device="cpu", dtype="float32")
    layers = give_facts(model)
    assert len({layer.facts.widths for _, layer in layers if layer.facts}) == 1
    own = [{spec.bits for row in layer.entries for _, spec in row} for _, layer in layers]
    assert set.union(*own) == {1, 2, 3, 4, 5, 6, 8}
    assert len(own[0]) < 7
    told: list[tuple[int, int]] = []
    ahead.compile_kernels(model, tokens=(1,), progress=lambda *counts: told.append(counts))
    # For one token: sort; gate and up; down; add up, with weights of either dtype. Whatever the number of layers.
    assert sorted(compiled) == ["combine", "multiply_rows", "multiply_rows", "prepare"]
    assert told[-1] == (4, 4)
    for module, layer in layers:
        hidden = layer.shapes["up"][1]
        x_TH, index_Tk, weights_Tk = torch.randn(1, hidden), torch.tensor([[0, 1]]), torch.rand(1, 2)
        answer = gpu.run_experts(module, layer, x_TH, index_Tk, weights_Tk)
        torch.testing.assert_close(answer, reference.experts(module, layer, x_TH, index_Tk, weights_Tk))
    assert len(compiled) == 4


def test_a_cpu_compiles_nothing(seven_widths: Path, compiled: list[str]) -> None:
    ahead.compile_kernels(moeq.load(seven_widths, device="cpu"))
    assert not compiled

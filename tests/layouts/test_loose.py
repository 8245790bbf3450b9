"""Scales that are trained: products and gradients are those of the weights that will be stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_help import packed
from torch import Tensor, nn

import moeq
import zoo
from moeq.format.manifest import Manifest, read_manifest
from moeq.format.records import decode_matrix, unpack_scales
from moeq.layouts.grouped.loose import LooseRecords
from moeq.layouts.grouped.packed import PackedMatrix
from moeq.layouts.serving import Loose
from moeq.runtime import attach
from moeq.runtime.load import load
from moeq.spec import QuantSpec
from often import by_day

FORMS: dict[str, dict[str, Any]] = {
    **{levels: {"levels": levels, "quantizer": "rtn"} for levels in ("half", "asym", "asym16", "sym")},
    "trellis": {"quantizer": "trellis", "nsamples": 2, "seqlen": 16},
    "vector": {"quantizer": "vector", "group_size": -1},
    "tiled": {"method": "tileq", "quantizer": "rtn", "rank": 4},
    "spectral": {"method": "bitsmoe", "quantizer": "rtn", "bits": 4.0, "accounting": "bytes"},
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny model packed in one of `FORMS`."""
    done: dict[str, Path] = {}

    def packed(form: str) -> Path:
        if form not in done:
            place = tmp_path_factory.mktemp("loose")
            zoo.make_tiny("qwen3_moe", place / "source")
            zoo.write_tokenizer(place / "source")
            (place / "text.txt").write_text("a plain text of letters, for nobody to read\n" * 20, encoding="utf-8")
            options = {"method": "uniform", "bits": 2, "accounting": "codes", "group_size": 32, "dense_bits": "8"}
            options |= {"calibration": str(place / "text.txt")} if "nsamples" in FORMS[form] else {}
            moeq.quantize(place / "source", place / "packed", device="cpu", **(options | FORMS[form]))
            done[form] = place / "packed"
        return done[form]

    return packed


def loosened(packed: Path) -> tuple[nn.Module, dict[str, tuple[Loose, ...]], Manifest]:
    """A model whose scales can be trained."""
    manifest = read_manifest(packed)
    model = load(packed, device="cpu", dtype=torch.float32, exact_activations=True)
    return model, attach.loosen(model, manifest.layers, manifest.dense), manifest


def shaken(blobs: dict[str, tuple[Loose, ...]]) -> None:
    """Other gains and shifts, far from the first ones."""
    generator = torch.Generator().manual_seed(1)
    for parts in blobs.values():
        for name, parameter in (pair for part in parts for pair in part.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * (0.1 if name == "gain" else 0.2)
            parameter.data.add_(noise)


def answer(model: nn.Module) -> Tensor:
    ids = torch.randint(3, zoo.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("form", by_day(FORMS, set(FORMS) - {"spectral", "vector"}))
def test_nothing_changes_before_something_is_trained(form: str, made: Made) -> None:
    packed = made(form)
    model, blobs, manifest = loosened(packed)
    assert len(blobs) == len(manifest.layers) + len(manifest.dense) > 3
    with torch.no_grad():
        wanted = answer(load(packed, device="cpu", dtype=torch.float32, exact_activations=True))
        torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)
    tensors = attach.map_packed(sorted(packed.glob("*.safetensors")))
    for name, parts in blobs.items():
        assert torch.equal(torch.cat([part.blob() for part in parts]), tensors[name])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_multiplied_is_what_will_be_stored(form: str, made: Made) -> None:
    model, blobs, manifest = loosened(made(form))
    shaken(blobs)
    stored = load(made(form), device="cpu", dtype=torch.float32, exact_activations=True)
    with torch.no_grad():
        before = answer(stored)
        for path, module in attach.packed_modules(stored, manifest.layers, manifest.dense):
            blob = torch.cat([part.blob() for part in blobs[f"{path}.moeq_data"]])
            assert not torch.equal(blob, module.data)
            module.data = blob
        torch.testing.assert_close(answer(model), answer(stored), rtol=1e-4, atol=1e-4)
        assert (answer(model) - before).abs().max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_gradients_point_where_the_answer_changes(form: str, made: Made) -> None:
    """A layer's, along themselves, against differences. Zeros of 8 bits are too coarse for those."""
    model, _, manifest = loosened(made(form))
    layer = manifest.layers[0]
    experts = attach.find(model, layer.path)
    generator = torch.Generator().manual_seed(2)
    x_TH, probe = (torch.randn(9, layer.shapes["up"][1], generator=generator) for _ in range(2))
    chosen = torch.randint(0, layer.num_experts, (9, 2), generator=generator)

    def value() -> Tensor:
        answer: Tensor = experts.moeq(experts, x_TH, chosen, torch.rand(9, 2, generator=generator.manual_seed(3)))
        return (answer.double() * probe).sum()

    value().backward()
    named = experts.moeq.loose.named_parameters()
    moved = [p for name, p in named if p.numel() and not (form == "asym" and name == "shift")]
    norm = torch.cat([p.grad.flatten() for p in moved]).norm()

    @torch.no_grad()
    def at(step: float) -> float:
        for parameter in moved:
            parameter.add_(parameter.grad, alpha=step / float(norm))
        return float(value())

    upper, lower = at(0.05), at(-0.1)
    assert float(norm) == pytest.approx((upper - lower) / 0.1, rel=0.02)


def test_gradients_of_zeros_are_those_of_the_weights() -> None:
    """The weights as autograd sees them, group by group, the last one short."""
    generator = torch.Generator().manual_seed(3)
    spec, shape = QuantSpec(bits=3, group_size=32, levels="asym"), (6, 72)
    record = packed(torch.randn(shape, generator=generator), spec)
    loose = LooseRecords(record, (((0, spec),),), [shape])
    x_SK = torch.randn(5, 72, generator=generator, requires_grad=True)
    probe = torch.randn(5, 6, generator=generator)
    (loose.linear(x_SK, PackedMatrix(record=record, spec=spec, shape=shape)) * probe).sum().backward()
    w_NK = decode_matrix(record, spec, shape)
    scale_NG = unpack_scales(record, spec, shape)[0].float()
    grad_NK = probe.T @ x_SK.detach()
    parts = zip(grad_NK.split(32, 1), w_NK.split(32, 1), scale_NG.T, strict=True)
    gain, shift = zip(*((((g * w).sum(1)), -s * g.sum(1)) for g, w, s in parts), strict=True)
    torch.testing.assert_close(loose.gain.grad, torch.stack(gain, 1).flatten())
    torch.testing.assert_close(loose.shift.grad, torch.stack(shift, 1).flatten())
    torch.testing.assert_close(x_SK.grad, probe @ w_NK)

"""Original and packed checkpoints as streams: the same interface, the gradients of the loaded model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import moeq
import zoo
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Inventory
from moeq.calibration.opening import block_paths, open_stream, packed_matrices
from moeq.calibration.tap import Asked
from moeq.checkpoint.read import Reader
from moeq.errors import CheckpointError, PackedError
from moeq.format.records import decode_matrix

CPU = torch.device("cpu")


def make_ids(count: int = 5, seqlen: int = 24, vocabulary: int = 4000) -> Tensor:
    return torch.randint(3, vocabulary, (count, seqlen), generator=torch.Generator().manual_seed(0))


def streamed(
    directory: Path, inventory: Inventory, ids_NT: Tensor, scratch: Path, **options: object
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of the experts and dL/dz, by layer."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(layer: int, experts: nn.Module, asked: Asked) -> None:
        assert layer not in seen
        assert asked.grad_TH is not None
        seen[layer] = asked.x_TH.clone(), asked.grad_TH.clone()

    with open_stream(directory, inventory, device=CPU, scratch=scratch, **options) as stream:
        stream.run(ids_NT, visit, gradients=True)
    assert sorted(seen) == list(range(len(inventory.layers)))
    return [seen[layer][0] for layer in sorted(seen)], [seen[layer][1] for layer in sorted(seen)]


def whole(model: PreTrainedModel, inventory: Inventory, ids_NT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The same by autograd through a loaded model."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for index, layer in enumerate(inventory.layers):

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, index: int = index) -> Tensor:
            value = output if output.requires_grad else output.detach().requires_grad_().clone()
            value.retain_grad()
            inputs[index], outputs[index] = args[0].detach(), value
            return value

        model.get_submodule(layer.path).register_forward_hook(keep)
    model.requires_grad_(False)
    logits = model(input_ids=ids_NT, use_cache=False).logits.float()[:, :-1]
    loss = functional.cross_entropy(logits.transpose(1, 2), ids_NT[:, 1:], reduction="none").mean(dim=1).sum()
    loss.backward()
    return [inputs[i] for i in sorted(inputs)], [outputs[i].grad for i in sorted(outputs)]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative error of any layer."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def test_demo_model(demo_dir: Path, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    inventory, _ = read_inventory(demo_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    wanted_x, wanted_g = whole(model, inventory, make_ids())
    done: list[tuple[str, int, int]] = []
    options = {"dtype": torch.float32, "micro_batch_tokens": 48, "progress": lambda *args: done.append(args)}
    found_x, found_g = streamed(demo_dir, inventory, make_ids(), tmp_path, **options)
    assert worst(found_x, wanted_x) < 1e-5
    assert worst(found_g, wanted_g) < 1e-5
    assert done == [("blocks", count, 8) for count in range(1, 9)]
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_is_the_checkpoints_unless_told(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # others compute in float32
    inventory, _ = read_inventory(demo_dir)
    exact_x, exact_g = streamed(demo_dir, inventory, make_ids(), tmp_path, dtype=torch.float32)
    rough_x, rough_g = streamed(demo_dir, inventory, make_ids(), tmp_path)
    assert {value.dtype for value in exact_x + exact_g} == {torch.float32}
    assert {value.dtype for value in rough_x + rough_g} == {torch.bfloat16}
    assert worst([value.float() for value in rough_g], exact_g) < 0.3


def test_packed_checkpoint(demo_dir: Path, packed_demo: Path, tmp_path: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    model = moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True)
    wanted_x, wanted_g = whole(model, inventory, make_ids())
    options = {"dtype": torch.float32, "micro_batch_tokens": 48}
    found_x, found_g = streamed(packed_demo, inventory, make_ids(), tmp_path, **options)
    assert worst(found_x, wanted_x) < 1e-5
    assert worst(found_g, wanted_g) < 1e-5
    _, original = streamed(demo_dir, inventory, make_ids(), tmp_path, **options)
    assert worst(found_g, original) > 1e-3


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "ernie4_5_moe", "qwen3_vl_moe"])
def test_families_from_disk_and_packed(model_type: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    source, packed = tmp_path / "source", tmp_path / "packed"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    original = zoo.make_tiny(model_type, source)
    inventory, _ = read_inventory(source)
    ids_NT = make_ids(5, 12, 120)
    _, wanted = whole(original, inventory, ids_NT)
    _, found = streamed(source, inventory, ids_NT, scratch, micro_batch_tokens=24)
    assert worst(found, wanted) < 1e-5
    moeq.quantize(source, packed, quantizer="minmax", bits=5, group_size=32, device="cpu")
    _, wanted = whole(moeq.load(packed, device="cpu", exact_activations=True), inventory, ids_NT)
    _, found = streamed(packed, inventory, ids_NT, scratch, micro_batch_tokens=24)
    assert worst(found, wanted) < 1e-5


def test_balance_losses_do_not_enter(tmp_path: Path) -> None:
    """A config that asks for router logits changes nothing."""
    model = zoo.make_tiny("mixtral", tmp_path)
    inventory, _ = read_inventory(tmp_path)
    _, wanted = whole(model, inventory, make_ids(5, 12, 120))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    _, found = streamed(tmp_path, inventory, make_ids(5, 12, 120), tmp_path)
    assert worst(found, wanted) < 1e-5


def test_logits_of_the_original(demo_dir: Path, packed_demo: Path, tmp_path: Path) -> None:
    ids_NT = make_ids()
    inventory, _ = read_inventory(demo_dir)
    for directory, model in (
        (demo_dir, AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)),
        (packed_demo, moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True)),
    ):
        with torch.no_grad():
            wanted = model(input_ids=ids_NT, use_cache=False).logits
        with open_stream(directory, inventory, device=CPU, scratch=tmp_path, dtype=torch.float32) as stream:
            found = stream.logits(ids_NT[1:3], stream.last_hidden(ids_NT)[1:3])
        torch.testing.assert_close(found, wanted[1:3], rtol=1e-3, atol=1e-4)


def test_decoded_matrices(demo_dir: Path, packed_demo: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    model = moeq.load(packed_demo, device="cpu", exact_activations=True)
    read = packed_matrices(packed_demo)
    with Reader(demo_dir) as reader:
        for index, layer in enumerate(inventory.layers):
            packed = model.get_submodule(layer.path).get_submodule("moeq").layer
            for projection in layer.projections:
                found = read(index)(3, projection)
                matrix = packed.matrix(3, projection)
                assert torch.equal(found, decode_matrix(matrix.record, matrix.spec, matrix.shape))
                source = reader.matrix(layer.sources[projection], 3, layer.shapes[projection]).float()
                assert (found - source).norm() < 0.3 * source.norm()


def test_files_are_closed_when_a_visit_fails(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.calibration.spill.IN_MEMORY_BYTES", 0)
    inventory, _ = read_inventory(demo_dir)

    def visit(layer: int, experts: nn.Module, asked: Asked) -> None:
        raise KeyError("enough")

    with (
        pytest.raises(KeyError, match="enough"),
        open_stream(demo_dir, inventory, device=CPU, scratch=tmp_path) as stream,
    ):
        stream.run(make_ids(), visit, gradients=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="the reader is closed"):
        stream.run(make_ids(), visit, gradients=False)


def test_packed_from_another_model(packed_demo: Path, tiny_dir: Path, tmp_path: Path) -> None:
    inventory, _ = read_inventory(tiny_dir)
    with (
        pytest.raises(PackedError, match="packed from another model"),
        open_stream(packed_demo, inventory, device=CPU, scratch=tmp_path),
    ):
        pass


def test_experts_in_two_lists_of_blocks(demo_dir: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    first, *others = inventory.layers
    odd = replace(inventory, layers=(replace(first, block="tower.layers.0"), *others))
    with pytest.raises(CheckpointError, match=r"model\.layers, tower\.layers"):
        block_paths(odd, nn.Module())

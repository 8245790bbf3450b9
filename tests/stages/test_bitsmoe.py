"""BitsMoE from weights to a packed checkpoint that runs (BitsMoE notes, section 10)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import moeq
from moeq.allocation.decide import draft
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Plan, expert_bytes
from moeq.checkpoint.read import Reader
from moeq.costs.component_table import ComponentTable
from moeq.errors import ArtifactError, BudgetError, OptionError, PackedError
from moeq.layouts.spectral.reference import SpectralLayer
from moeq.layouts.spectral.serving import SpectralExperts
from moeq.runtime.load import load_any
from moeq.spec import Unit
from often import nightly

OPTIONS = {"method": "bitsmoe", "nsamples": 8, "seqlen": 64}


@pytest.fixture(scope="module")
def costs(demo_dir: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("costs") / "costs.safetensors"
    moeq.measure(demo_dir, calibration=str(calibration_text), **OPTIONS).save(path)
    return path


@pytest.fixture(scope="module")
def packed(demo_dir: Path, costs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    moeq.quantize(demo_dir, out, method="bitsmoe", bits=3.0, costs=str(costs))
    return out


def layer_of(model: torch.nn.Module, index: int) -> SpectralLayer:
    handlers = [module for module in model.modules() if isinstance(module, SpectralExperts)]
    return handlers[index].layer


def test_the_budget_is_obeyed_to_the_byte(packed: Path, demo_dir: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    plan = Plan.load(packed / "moeq_plan.json")
    assert plan.components is not None
    assert plan.expert_bytes == expert_bytes(plan, inventory)
    assert 2.97 < 8 * plan.expert_bytes / inventory.expert_parameters <= 3.0
    stored = 0
    for shard in packed.glob("*.safetensors"):
        with Reader(packed) as reader:
            stored += sum(
                info.stop - info.start
                for name, info in reader.headers.items()
                if info.file == shard.name and "experts.moeq" in name
            )
    assert stored == plan.expert_bytes


def test_it_runs_and_equals_the_model_of_its_decoded_weights(packed: Path, demo_dir: Path) -> None:
    model = moeq.load(packed, device="cpu", dtype=torch.float32)
    twin = decoded_twin(model, demo_dir)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)


def decoded_twin(model: torch.nn.Module, demo_dir: Path) -> torch.nn.Module:
    """The original's modules with the weights that the packed components stand for."""
    twin = load_any(demo_dir, "cpu", torch.float32)
    inventory, _ = read_inventory(demo_dir)
    with torch.no_grad():
        for index, layer in enumerate(inventory.layers):
            spectral, experts = layer_of(model, index), twin.get_submodule(layer.path)
            for expert in range(layer.num_experts):
                gate_up = [spectral.dense(expert, name) for name in ("gate", "up")]
                experts.gate_up_proj[expert] = torch.cat(gate_up)
                experts.down_proj[expert] = spectral.dense(expert, "down")
    return twin


@pytest.mark.nightly
def test_wide_components_give_back_the_weights(demo_dir: Path, costs: Path, tmp_path: Path) -> None:
    """All at 8 bits: what is left is the rounding of 8 bits, not of the basis (which has 8 bits too)."""
    out = tmp_path / "out"
    moeq.quantize(demo_dir, out, method="bitsmoe", bits=10.0, costs=str(costs), gain=False)
    spectral = layer_of(moeq.load(out, device="cpu", dtype=torch.float32), 1)
    inventory, headers = read_inventory(demo_dir)
    layer = inventory.layers[1]
    with Reader(demo_dir, headers) as reader:
        for name in layer.projections:
            weight = reader.matrix(layer.sources[name], 3, layer.shapes[name]).float()
            error = (spectral.dense(3, name) - weight).square().sum() / weight.square().sum()
            assert error < 2e-4


def test_gradients_reach_the_inputs(packed: Path, demo_dir: Path) -> None:
    model = moeq.load(packed, device="cpu", dtype=torch.float32)
    grads = []
    for each in (model, decoded_twin(model, demo_dir)):
        inputs = each.get_input_embeddings()(torch.arange(12).view(1, 12)).detach().requires_grad_()
        each(inputs_embeds=inputs).logits.square().mean().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_a_smaller_budget_drops_directions_and_returns_their_bytes(demo_dir: Path, costs: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    small = moeq.allocate(demo_dir, method="bitsmoe", bits=1.2, costs=str(costs))
    widths = [small.widths(index, layer) for index, layer in enumerate(inventory.layers)]
    assert any(not (each > 0).any(0).all() for layer in widths for each in layer.values())
    assert 8 * small.expert_bytes / inventory.expert_parameters <= 1.2
    large = moeq.allocate(demo_dir, method="bitsmoe", bits=2.4, costs=str(costs))
    assert small.objective is not None
    assert large.objective is not None
    assert large.objective < small.objective
    assert large.bound is not None
    assert large.bound <= large.objective <= large.bound * 1.01


def test_what_dropping_costs_decides_how_much_is_dropped(
    demo_dir: Path, calibration_text: Path, tmp_path: Path
) -> None:
    dropped = []
    for drop in (1, 6):
        options = {**OPTIONS, "cost_options": f"importance=routing,drop={drop}"}
        table = tmp_path / f"costs-{drop}"
        moeq.measure(demo_dir, calibration=str(calibration_text), **options).save(table)
        plan = moeq.allocate(demo_dir, bits=2.2, costs=str(table), **options)
        layers = read_inventory(demo_dir)[0].layers
        dropped.append(
            sum(int((w == 0).sum()) for i, layer in enumerate(layers) for w in plan.widths(i, layer).values())
        )
    assert dropped[1] < 0.9 * dropped[0]


@pytest.mark.parametrize("joint", [nightly("false"), "true"])
def test_exact_errors_obey_the_budget(joint: str, demo_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "cost_options": f"errors=exact,joint={joint}"}
    table = tmp_path / "costs"
    moeq.measure(demo_dir, calibration=str(calibration_text), **options).save(table)
    inventory, _ = read_inventory(demo_dir)
    for bits in (0.9, 1.4, 3.0):
        plan = moeq.allocate(demo_dir, bits=bits, costs=str(table), **options)
        assert plan.expert_bytes == expert_bytes(plan, inventory)
        assert 8 * plan.expert_bytes / inventory.expert_parameters <= bits


@pytest.mark.nightly
@pytest.mark.parametrize("joint", [False, True])
def test_one_basis_or_two_of_16_bits(joint: bool, demo_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {**OPTIONS, "cost_options": f"joint={str(joint).lower()},basis_bits=16,importance=routing", "bits": 3.5}
    moeq.quantize(demo_dir, out, calibration=str(calibration_text), quality=False, **options)
    spectral = layer_of(moeq.load(out, device="cpu"), 0)
    assert (spectral.entries["up"].basis == spectral.entries["gate"].basis) == joint
    assert spectral.entries["gate"].basis_bits == 16


@pytest.mark.nightly
def test_feedback_lowers_the_error_of_the_answers(
    demo_dir: Path, calibration_text: Path, costs: Path, tmp_path: Path
) -> None:
    text = {"calibration": str(calibration_text), "quality": False, **OPTIONS, "nsamples": 32, "bits": 2.2}
    kls = []
    for quantizer in ("rtn", "gptq"):
        out = tmp_path / quantizer
        moeq.quantize(demo_dir, out, quantizer=quantizer, costs=str(costs), **text)
        result = moeq.evaluate(
            out, calibration_text, reference=demo_dir, seqlen=64, max_tokens=2048, batch_size=8, device="cpu"
        )
        kls.append(result.metrics["kl"])
    assert kls[1] < 1.1 * kls[0]


@pytest.mark.nightly
def test_plans_need_their_costs(demo_dir: Path, costs: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    moeq.allocate(demo_dir, method="bitsmoe", bits=2.5, costs=str(costs)).save(plan)
    with pytest.raises(OptionError, match="bases"):
        draft(demo_dir, moeq.Recipe(plan=str(plan)))
    moeq.quantize(demo_dir, tmp_path / "out", plan=str(plan), costs=str(costs))
    assert json.loads((tmp_path / "out" / "moeq.json").read_text())["layers"][0]["layout"] == "spectral"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "bitsmoe", "unit": "expert"}, OptionError, "components"),
        ({"method": "bitsmoe", "shares": "c2c3"}, OptionError, "threshold"),
        ({"method": "gemq", "candidates": "0,1,2"}, OptionError, "0"),
        ({"method": "bitsmoe", "candidates": "0"}, OptionError, "dropped"),
        ({"method": "bitsmoe", "bits": 0.001}, BudgetError, "cannot be reached"),
        ({"method": "bitsmoe", "cost_options": "basis_bits=16"}, ArtifactError, "another basis"),
        ({"method": "bitsmoe", "group_size": 64}, ArtifactError, "would not use"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, object], error: type[Exception], message: str, demo_dir: Path, costs: Path
) -> None:
    with pytest.raises(error, match=message):
        draft(demo_dir, moeq.Recipe(**{"bits": 2.5, "costs": str(costs), **options}))


def test_damaged_costs_are_refused(costs: Path, tmp_path: Path) -> None:
    raw = costs.read_bytes()
    for name, damaged in (("cut", raw[: len(raw) // 2]), ("facts", raw.replace(b'"exact":false', b'"exact":wrong'))):
        path = tmp_path / name
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            ComponentTable(path)


def test_a_map_that_does_not_fit_its_slabs_is_refused(packed: Path, tmp_path: Path) -> None:
    model = moeq.load(packed, device="cpu")
    spectral = layer_of(model, 0)
    from moeq.layouts.spectral.stored import check_map

    wrong = spectral.widths["gate"].copy()
    wrong[0, np.argmax(wrong[0])] = 1 if wrong[0].max() != 1 else 2
    with pytest.raises(PackedError, match="count other components"):
        check_map(wrong, spectral.entries["gate"], "layer")


@pytest.mark.nightly
def test_resume_gives_the_same_bytes(demo_dir: Path, costs: Path, packed: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    moeq.quantize(demo_dir, again, method="bitsmoe", bits=3.0, costs=str(costs))
    for shard in packed.glob("*.safetensors"):
        assert (again / shard.name).read_bytes() == shard.read_bytes()


def test_verify_decodes_every_factor(packed: Path, demo_dir: Path) -> None:
    report = moeq.verify(packed)
    inventory, _ = read_inventory(demo_dir)
    assert report.decoded == sum(3 * layer.num_experts for layer in inventory.layers)
    assert report.logits_finite
    assert str(Unit(layer=0, expert=0, projection="gate")) == "0.0.gate"

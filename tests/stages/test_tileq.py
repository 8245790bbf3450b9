"""TileQ from weights to a packed checkpoint that runs (TileQ notes, section 11)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moeq
import zoo
from moeq import cli
from moeq.allocation import tile_forms as tiles
from moeq.allocation.decide import draft
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Plan, expert_bytes
from moeq.checkpoint.read import Reader
from moeq.errors import BudgetError, OptionError, PackedError
from moeq.format.manifest import read_manifest
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.serving import TiledExperts
from moeq.runtime.load import load_any
from moeq.stages import bench, inspect
from moeq.writing.shard_writer import write_layer

DATALESS = {
    "method": "tileq",
    "bits": 4.0,
    "rank": "4",
    "quantizer": "rtn",
    "tile_options": "down=true,rotation=tile",
}


@pytest.fixture(scope="module")
def packed(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    moeq.quantize(demo_dir, out, **DATALESS)
    return out


@pytest.fixture(scope="module")
def calibrated(tiny_dir: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    moeq.quantize(tiny_dir, out, calibration=str(calibration_text), **CALIBRATED)
    return out


CALIBRATED = {
    "method": "tileq",
    "bits": 8.0,
    "rank": "2",
    "nsamples": 8,
    "seqlen": 32,
    "quality": False,
    "tile_options": "down=true,rotation=tile",
}


def layers_of(model: torch.nn.Module) -> list[TiledLayer]:
    return [module.layer for module in model.modules() if isinstance(module, TiledExperts)]


def side_and_matrix_bytes(packed: Path) -> int:
    with Reader(packed) as reader:
        return sum(i.stop - i.start for name, i in reader.headers.items() if ".moeq_" in name and "experts" in name)


def test_the_budget_is_obeyed_to_the_byte(packed: Path, demo_dir: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    plan = Plan.load(packed / "moeq_plan.json")
    assert plan.layout == "tiled"
    assert plan.expert_bytes == expert_bytes(plan, inventory) == side_and_matrix_bytes(packed)
    assert 3.9 < 8 * plan.expert_bytes / inventory.expert_parameters <= 4.0
    report = inspect.run(packed)
    assert report.expert_bytes == plan.expert_bytes


def twin_of(model: torch.nn.Module, source: Path) -> torch.nn.Module:
    """The original's modules with the weights that residuals and factors stand for."""
    twin = load_any(source, "cpu", torch.float32)
    inventory, _ = read_inventory(source)
    with torch.no_grad():
        for tiled, layer in zip(layers_of(model), inventory.layers, strict=True):
            experts = twin.get_submodule(layer.path)
            for expert in range(layer.num_experts):
                experts.gate_up_proj[expert] = torch.cat([tiled.dense(expert, name) for name in ("gate", "up")])
                experts.down_proj[expert] = tiled.dense(expert, "down")
    return twin


def test_it_runs_and_equals_the_model_of_its_decoded_weights(packed: Path, demo_dir: Path) -> None:
    model = moeq.load(packed, device="cpu", dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = twin_of(model, demo_dir)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_residuals_make_up_for_what_the_factors_lack(packed: Path, demo_dir: Path) -> None:
    inventory, headers = read_inventory(demo_dir)
    layer, tiled = inventory.layers[1], layers_of(moeq.load(packed, device="cpu"))[1]
    with Reader(demo_dir, headers) as reader:
        for name in layer.projections:
            w_OI = reader.matrix(layer.sources[name], 3, layer.shapes[name]).float()
            error = (tiled.dense(3, name) - w_OI).square().sum() / w_OI.square().sum()
            assert error < 0.03


def test_calibrated_residuals_come_close(calibrated: Path, tiny_dir: Path) -> None:
    model = moeq.load(calibrated, device="cpu", dtype=torch.float32)
    original = load_any(tiny_dir, "cpu", torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = original(ids).logits
        assert float((model(ids).logits - logits).norm() / logits.norm()) < 0.1
    assert moeq.verify(calibrated).logits_finite


def test_killed_runs_go_on_with_the_same_bytes(
    calibrated: Path, tiny_dir: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def killed(*arguments: object) -> object:
        nonlocal written
        written += 1
        if written == 2:
            raise KeyboardInterrupt
        return write_layer(*arguments)  # type: ignore[arg-type]

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("moeq.writing.calibrated_packing.write_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            moeq.quantize(tiny_dir, out, calibration=str(calibration_text), **CALIBRATED)
    assert not out.exists()
    moeq.quantize(tiny_dir, out, calibration=str(calibration_text), resume=True, **CALIBRATED)
    shards = sorted(path.name for path in calibrated.glob("*.safetensors"))
    for name in shards:
        assert (out / name).read_bytes() == (calibrated / name).read_bytes()


@pytest.mark.parametrize(
    "tile_options",
    [
        "rotation=none,down=false",
        "grid=private,rotation=expert",
        "grid=hidden,placement=order",
        "scales=expert,refits=0,alpha=2.4,factors=deflation,placement=literal,grid=paper,frequency=false",
        "placement=random,swaps=3,alpha=0,rotation=layer,block=8",
    ],
)
def test_every_choice_runs(tile_options: str, tiny_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    options = {**CALIBRATED, "tile_options": tile_options}
    moeq.quantize(tiny_dir, tmp_path / "out", calibration=str(calibration_text), **options)
    plan = Plan.load(tmp_path / "out" / "moeq_plan.json")
    assert plan.expert_bytes == side_and_matrix_bytes(tmp_path / "out")


def test_codebooks_round_residuals_and_plain_matrices(tiny_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    text = {"calibration": str(calibration_text), "quantizer": "vector"}
    for method, more in (("uniform", {}), ("tileq", {"rank": "1", "tile_options": "rotation=none"})):
        options = {**CALIBRATED, "tile_options": None, "rank": None, "bits": 20.0, "accounting": "codes", **more}
        options |= {"bits": 2.4, "method": method}
        moeq.quantize(tiny_dir, tmp_path / method, **text, **options)
        plan = Plan.load(tmp_path / method / "moeq_plan.json")
        used = {plan.specs[i].levels for layer in plan.experts for expert in layer for i in expert}
        assert used == {"vector"}
        assert moeq.verify(tmp_path / method).logits_finite


def test_trellises_round_residuals(tiny_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    """At the same bytes their errors are smaller; kernels compute what the decoded weights say."""
    errors = {}
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted = load_any(tiny_dir, "cpu", torch.float32)(ids).logits
        for name in ("trellis", "gptq"):
            out = tmp_path / name
            moeq.quantize(
                tiny_dir, out, calibration=str(calibration_text), **CALIBRATED | {"bits": 5.0}, quantizer=name
            )
            model = moeq.load(out, device="cpu", dtype=torch.float32, exact_activations=True)
            found = model(ids).logits
            torch.testing.assert_close(found, twin_of(model, tiny_dir)(ids).logits, rtol=1e-4, atol=1e-4)
            errors[name] = float((found - wanted).norm() / wanted.norm())
            assert moeq.verify(out).logits_finite
    plans = [Plan.load(tmp_path / name / "moeq_plan.json") for name in errors]
    assert "trellis" in {spec.levels for spec in plans[0].specs}
    assert plans[0].expert_bytes <= plans[1].expert_bytes
    assert errors["trellis"] < errors["gptq"], errors


def test_widths_by_another_methods_costs(demo_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    costs = tmp_path / "costs"
    few = {"nsamples": 4, "seqlen": 32}
    moeq.measure(demo_dir, method="gemq", calibration=str(calibration_text), **few).save(costs)
    with pytest.raises(OptionError, match="gptq does not choose codes of the level set trellis"):
        moeq.plan(demo_dir, method="tileq", allocation="gemq", quantizer="gptq", bits=3.0, costs=str(costs))
    gptq = {"quantizer": "gptq", **few}
    moeq.measure(demo_dir, method="gemq", calibration=str(calibration_text), **gptq).save(costs)
    plan = moeq.allocate(demo_dir, method="tileq", allocation="gemq", rank="2", bits=3.0, costs=str(costs))
    assert (plan.unit, plan.cost, plan.layout, plan.method) == ("matrix", "fisher", "tiled", "tileq")
    inventory, _ = read_inventory(demo_dir)
    assert plan.expert_bytes == expert_bytes(plan, inventory)
    assert 8 * plan.expert_bytes / inventory.expert_parameters <= 3.0
    assert len({i for layer in plan.experts for expert in layer for i in expert}) > 1


def test_rank_auto_takes_what_the_budget_leaves(demo_dir: Path) -> None:
    inventory, _ = read_inventory(demo_dir)
    ranks = []
    for bits in (3.3, 3.6, 4.0):
        plan = draft(demo_dir, moeq.Recipe(**{**DATALESS, "bits": bits, "rank": "auto"})).plan
        ranks.append(plan.tiles[0]["up"].rank)
        assert 8 * plan.expert_bytes / inventory.expert_parameters <= bits
    assert 0 < ranks[0] < ranks[1] < ranks[2]
    by_size = draft(demo_dir, moeq.Recipe(**{**DATALESS, "bits": None, "size": "5MB", "rank": "auto"}))
    assert by_size.plan.tiles[0]["up"].rank > 0
    assert by_size.disk_bytes <= 5_000_000


def test_unasked_factors_only_where_they_are_cheap(demo_dir: Path) -> None:
    recipe = moeq.Recipe(**{**DATALESS, "bits": 3.0, "rank": None, "tile_options": None})
    assert not any(form.rank for layer in draft(demo_dir, recipe).plan.tiles for form in layer.values())
    inventory, _ = read_inventory(demo_dir)
    shapes = {"gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}  # Qwen3-30B-A3B
    layers = tuple(replace(layer, num_experts=128, shapes=shapes) for layer in inventory.layers)
    large = tiles.forms(replace(inventory, layers=layers), recipe)
    assert {name: form.rank for name, form in large[0].items()} == {"gate": 64, "up": 64, "down": 0}


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_families(model_type: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    zoo.make_tiny(model_type, source)
    moeq.quantize(source, out, **{**DATALESS, "bits": 14.0, "rank": "1", "device": "cpu"})
    assert moeq.verify(out).logits_finite


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": "-1"}, OptionError, "rank"),
        ({"rank": "many"}, OptionError, "rank"),
        ({"rank": "5000"}, OptionError, "rank"),
        ({"allocation": "bitsmoe"}, OptionError, "allocation"),
        ({"allocation": "magic"}, OptionError, "unknown method"),
        ({"tile_options": "grid"}, OptionError, "NAME=VALUE"),
        ({"tile_options": "colour=red"}, OptionError, "its names are"),
        ({"tile_options": "grid=2x2"}, OptionError, "do not fit"),
        ({"method": "uniform"}, OptionError, "has no effect with method uniform"),
        ({"solver": "milp"}, OptionError, "no choice per unit"),
        ({"allocation": "gemq", "quantizer": "vector"}, OptionError, "codebooks"),
        ({"bits": 0.5}, BudgetError, "cannot be reached"),
        ({"rank": "100", "bits": 3.0}, BudgetError, "a smaller --rank"),
        ({"plan": "plan.json", "bits": None}, OptionError, "no effect with --plan"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, object], error: type[Exception], message: str, demo_dir: Path
) -> None:
    with pytest.raises(error, match=message):
        draft(demo_dir, moeq.Recipe(**{**DATALESS, **options}))


def test_checkpoints_without_their_sides_are_refused(packed: Path, tmp_path: Path) -> None:
    raw = {path.name: path.read_bytes() for path in packed.iterdir()}
    out = tmp_path / "out"
    out.mkdir()
    for name, content in raw.items():
        (out / name).write_bytes(content.replace(b".moeq_sides", b".moeq_sider"))
    with pytest.raises(PackedError):
        moeq.load(out, device="cpu")


def test_a_plan_is_carried_out_again(packed: Path, demo_dir: Path, tmp_path: Path) -> None:
    moeq.quantize(demo_dir, tmp_path / "out", plan=str(packed / "moeq_plan.json"), quantizer="rtn")
    for shard in packed.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_the_command_line_knows_it(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(demo_dir), "--method", "tileq", "--bits", "3.5", "--rank", "8", "--json"]
    assert cli.main([*words, "--tile-options", "grid=2x8,rotation=none"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "tileq"
    assert cli.main([*words, "--tile-options", "grid=1x2"]) == 1
    assert "do not fit" in capsys.readouterr().err


def test_costs_can_be_measured_on_it_and_its_routers_tuned(
    calibrated: Path, tiny_dir: Path, calibration_text: Path, tmp_path: Path
) -> None:
    text = {"calibration": str(calibration_text), "nsamples": 2, "seqlen": 16}
    table = moeq.measure(tiny_dir, method="gemq", context=str(calibrated), **text)
    plain = moeq.measure(tiny_dir, method="gemq", **text)
    assert table.costs != plain.costs
    out = tmp_path / "out"
    moeq.quantize(tiny_dir, out, **{**CALIBRATED, **text, "router": "kl"})
    assert moeq.verify(out).logits_finite
    assert {layer.layout for layer in read_manifest(out).layers} == {"tiled"}


def test_bench_counts_residuals_and_sides(packed: Path) -> None:
    report = bench.run(packed, prompt_tokens=4, new_tokens=1, threads=1)
    with Reader(packed) as reader:
        sides = sum(i.stop - i.start for name, i in reader.headers.items() if name.endswith(".moeq_sides"))
    assert 0 < sides < report.expert_bytes_per_token < side_and_matrix_bytes(packed) / 4
    assert report.shares["experts"] > 0

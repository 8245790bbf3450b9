"""From a model to a packed checkpoint by methods that rank units: costs, plans, resume, progressive, command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moeq
from moeq import cli
from moeq.allocation import measuring
from moeq.allocation import plans as allocate
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, Plan
from moeq.checkpoint.journal import Journal
from moeq.errors import ArtifactError, BudgetError, OptionError, VersionError
from moeq.format.manifest import read_manifest
from moeq.recipe import Recipe
from moeq.stages import measure, quantize
from moeq.writing import packing
from moeq.writing import routers as tuning

SMALL = {"nsamples": 6, "seqlen": 64, "device": "cpu", "quality": False}


@pytest.fixture(scope="module")
def costs(demo_dir: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fisher costs of the bundled model's experts."""
    recipe = Recipe(method="gemq", unit="expert", calibration=str(calibration_text), candidates="1,2,3,4", **SMALL)
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    measure.run(demo_dir, recipe).save(path)
    return path


def plan_of(directory: Path) -> Plan:
    return Plan.load(directory / "moeq_plan.json")


def widths(plan: Plan) -> list[list[set[int]]]:
    return [[{plan.specs[index].bits for index in expert} for expert in layer] for layer in plan.experts]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pmq", "alphaq", "gemq"])
def test_methods_obey_the_budget_and_give_experts_of_one_layer_different_bits(
    method: str, demo_dir: Path, calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = moeq.quantize(
        demo_dir, out, method=method, bits=2.5, calibration=str(calibration_text), quantizer="rtn", **SMALL
    )
    unit = "expert" if method == "pmq" else "matrix"
    assert 2.4 < report.expert_bits_per_weight <= 2.5
    plan = plan_of(out)
    assert (plan.method, plan.unit) == (method, unit)
    assert plan.objective is not None
    assert plan.bound is not None
    assert plan.bound <= plan.objective * (1 + 1e-9)
    assert any(len(set().union(*layer)) > 1 for layer in widths(plan))
    if method != "alphaq":
        assert all({2, 3} <= set().union(*layer) for layer in widths(plan)), "c2c3 holds in every layer"
    assert (out / "allocation.svg").is_file()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "allocation.svg" in card
    assert not list(out.glob(".moeq*"))
    assert moeq.verify(out).logits_finite


def test_one_table_serves_many_budgets(demo_dir: Path, costs: Path) -> None:
    inventory, headers = read_inventory(demo_dir)
    table = CostTable.load(costs)
    objectives = []
    for bits in (1.5, 2.0, 2.5, 3.0, 3.5):
        recipe = Recipe(method="gemq", unit="expert", quantizer="trellis", bits=bits)
        plan = allocate.run(inventory, headers, recipe, table=table)
        assert plan.expert_bytes <= bits * inventory.expert_parameters / 8
        objectives.append(plan.objective)
    assert objectives == sorted(objectives, reverse=True)
    codes = allocate.run(inventory, headers, recipe.replace(bits=2.0, accounting="codes"), table=table)
    assert sum(min(bits) for layer in widths(codes) for bits in layer) == 2 * len(table.units)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 2.5, "group_size": 64}, ArtifactError, "group size 128"),
        ({"bits": 2.5, "unit": "matrix"}, ArtifactError, "each expert"),
        ({"bits": 2.5, "cost": "output-error"}, ArtifactError, "fisher costs"),
        ({"bits": 2.5, "candidates": "2,3,8"}, ArtifactError, "not 8"),
        ({"bits": 1.0}, BudgetError, "at least"),
        ({"bits": 2.5, "shares": "3:100"}, OptionError, "shares"),
        ({"bits": 2.5, "shares": "5:1"}, OptionError, "shares"),
        ({"bits": 2.5, "solver": "oracle"}, OptionError, "solver"),
    ],
)
def test_wrong_ways_to_spend_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, demo_dir: Path, costs: Path
) -> None:
    with pytest.raises(error, match=message):
        moeq.plan(demo_dir, **({"method": "gemq", "unit": "expert", "costs": str(costs)} | options))


def test_the_smallest_budget_named_is_feasible(demo_dir: Path, costs: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        moeq.plan(demo_dir, method="gemq", unit="expert", costs=str(costs), router="none", bits=1.0)
    least = float(caught.value.fix.split("at least ")[1].split(",")[0])
    assert moeq.plan(demo_dir, method="gemq", unit="expert", costs=str(costs), router="none", bits=least).decided


def edit(path: Path, change: dict[str, Any], tmp_path: Path) -> Path:
    data = json.loads(path.read_bytes())
    data.update(change)
    out = tmp_path / "edited.json"
    out.write_text(json.dumps(data), encoding="utf-8")
    return out


def test_tables_that_do_not_fit_are_refused(demo_dir: Path, costs: Path, tmp_path: Path) -> None:
    data = json.loads(costs.read_bytes())
    units, rows, sizes = data["units"], data["costs"], data["sizes"]
    negative = [[-1.0, *rows[0][1:]], *rows[1:]]
    fewer = {"units": units[1:], "costs": rows[1:], "sizes": sizes[1:], "statistics": {}}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model_hash": "0" * 64}, ArtifactError, "measure this model"),
        (fewer, ArtifactError, "0.0.expert"),
        ({"format_version": 2}, VersionError, "reads 1"),
        ({"kind": "plan"}, ArtifactError, "not a moeq cost-table"),
        ({"costs": negative}, ArtifactError, "negative or not finite"),
        ({"sizes": [[size * 8 for size in row] for row in sizes]}, ArtifactError, "these sizes"),
        ({"units": [units[1], units[0], *units[2:]]}, ArtifactError, "order"),
        ({"pie": 1}, ArtifactError, "pie"),
    ]
    for change, error, message in cases:
        path = edit(costs, change, tmp_path)
        with pytest.raises(error, match=message) as caught:
            moeq.plan(demo_dir, method="gemq", unit="expert", costs=str(path), bits=2.5)
        assert str(path) in str(caught.value) or "costs" in str(caught.value)
    path = tmp_path / "nan.json"
    path.write_text(costs.read_text().replace(f"{rows[0][0]!r}", "NaN", 1), encoding="utf-8")
    with pytest.raises(ArtifactError):
        moeq.plan(demo_dir, method="gemq", unit="expert", costs=str(path), bits=2.5)


def test_measured_costs_survive_a_kill(
    demo_dir: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "gemq", "bits": 2.5, "calibration": str(calibration_text), "quantizer": "rtn", **SMALL}
    moeq.quantize(demo_dir, tmp_path / "whole", **options)

    class KilledError(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_copied", die)
        with pytest.raises(KilledError):
            moeq.quantize(demo_dir, tmp_path / "cut", **options)
    assert (tmp_path / "cut.partial" / ".moeq-costs").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "table", die)
        moeq.quantize(demo_dir, tmp_path / "cut", resume=True, **options)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes() or path.name == "README.md", path.name


@pytest.mark.parametrize(
    "when", ["rewrite", *(pytest.param(when, marks=pytest.mark.nightly) for when in ("updated", "verify"))]
)
def test_router_tuning_survives_a_kill(
    when: str, demo_dir: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bits": 3.0, "calibration": str(calibration_text), "quantizer": "rtn", "router": "task"}
    options |= SMALL | {"effort": "fast"}
    moeq.quantize(demo_dir, tmp_path / "whole", **options)

    class KilledError(BaseException):
        pass

    rewrite = tuning.store.rewrite

    def half(*args: Any, **kwargs: Any) -> Any:
        rewrite(*args, **kwargs)
        raise KilledError

    def die(*_: Any, **__: Any) -> None:
        raise KilledError

    target = {"rewrite": (tuning.store, "rewrite"), "updated": (tuning, "updated"), "verify": (quantize.verify, "run")}
    with monkeypatch.context() as patch:
        patch.setattr(*target[when], half if when == "rewrite" else die)
        with pytest.raises(KilledError):
            moeq.quantize(demo_dir, tmp_path / "cut", **options)
    notes = Journal.load(tmp_path / "cut.partial" / ".moeq-journal.json").notes
    assert bool(notes) == (when == "verify")
    moeq.quantize(demo_dir, tmp_path / "cut", resume=True, **options)
    for path in (tmp_path / "whole").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.nightly
def test_progressive_takes_up_finished_stages(
    demo_dir: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "gemq", "bits": 2.0, "calibration": str(calibration_text), "quantizer": "rtn", **SMALL}
    out = tmp_path / "out"
    made: list[str] = []
    plain = quantize._once

    def counted(model: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(Path(path).name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return plain(model, path, *args, **kwargs)

    monkeypatch.setattr(quantize, "_once", counted)
    with pytest.raises(KeyboardInterrupt):
        moeq.quantize(demo_dir, out, progressive="3,2.5", **options)
    assert made == ["1-3-bits", "2-2.5-bits"]
    assert (tmp_path / "out.stages" / "1-3-bits" / "moeq.json").is_file()
    report = moeq.quantize(demo_dir, out, progressive="3,2.5", **options)
    assert made[2:] == ["2-2.5-bits", "out"]
    assert not (tmp_path / "out.stages").exists()
    assert report.expert_bits_per_weight <= 2.0
    assert read_manifest(out).recipe["progressive"] == "3,2.5"
    first = plan_of(out)
    shutil.rmtree(out)
    moeq.quantize(demo_dir, out, **options)
    assert plan_of(out).costs_hash != first.costs_hash, "the context changes the costs"


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_line_goes_all_the_way(
    demo_dir: Path, costs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    allocated = run(
        "allocate",
        demo_dir,
        plan,
        "--method",
        "gemq",
        "--unit",
        "expert",
        "--costs",
        costs,
        "--bits",
        "2.5",
        "--svg",
        picture,
        capsys=capsys,
    )
    assert allocated["plan_hash"] == Plan.load(plan).hash
    assert 0 <= allocated["gap"] < 1e-3
    assert sum(allocated["allocation"].values()) == 4 * 16 * 3
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    curve = run(
        "pareto", demo_dir, "--method", "gemq", "--unit", "expert", "--costs", costs, "--points", "8", capsys=capsys
    )
    points = curve["points"]
    assert len(points) == 8
    assert [point["expert_bytes"] for point in points] == sorted(point["expert_bytes"] for point in points)
    assert [point["objective"] for point in points] == sorted((point["objective"] for point in points), reverse=True)
    packed = run("quantize", demo_dir, tmp_path / "out", "--plan", plan, capsys=capsys)
    assert packed["plan_hash"] == allocated["plan_hash"]
    written = tmp_path / "weight.json"
    measured = run(
        *("measure", demo_dir, written, "--cost", "weight-error", "--unit", "matrix", "--candidates", "2,4"),
        capsys=capsys,
    )
    assert (measured["units"], measured["candidates"]) == (4 * 16 * 3, [2, 4])
    assert measured["totals"]["2"] > measured["totals"]["4"] > 0
    assert CostTable.load(written).unit == "matrix"

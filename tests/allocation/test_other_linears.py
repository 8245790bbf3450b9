"""Linears outside the experts in the experts' program: costs, choices, budgets to the byte, refusals."""

import itertools
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import moeq
import zoo
from moeq import cli
from moeq.allocation import decide as setup
from moeq.allocation import measuring as costs_of
from moeq.allocation import other_linears as joining
from moeq.allocation import plans as allocate
from moeq.allocation import program
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, Inventory, Plan
from moeq.calibration.tokens import TokenBatch
from moeq.checkpoint.read import Reader
from moeq.errors import ArtifactError, BudgetError, InfeasibleError, OptionError
from moeq.format.records import dequantize
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import JOINING_KINDS, Recipe
from moeq.spec import TensorInfo, stored_bytes
from moeq.stages import measure
from moeq.writing import arrangement as shards
from moeq.writing import other_files as finish

DEMO = Path(__file__).parent.parent.parent / "assets" / "demo-qwen3moe-4m"
SMALL = {"nsamples": 6, "seqlen": 64, "device": "cpu", "quality": False}
AUTO = Recipe(method="gemq", dense_bits="auto", size="3.4MB", candidates="1,2,3")


@cache
def demo() -> tuple[Inventory, dict[str, TensorInfo]]:
    return read_inventory(DEMO)


def table_of(
    inventory: Inventory, headers: dict[str, TensorInfo], recipe: Recipe, seed: int = 0, dense_scale: float = 1.0
) -> CostTable:
    """Random costs that fall with the width, of experts and of the linears that join."""
    generator = np.random.default_rng(seed)
    candidates = allocate.candidate_specs(recipe)
    units = list(inventory.cost_units("expert"))
    specs, joined = joining.specs(recipe), joining.linears(inventory, recipe)

    def falling(row: tuple[Any, ...], scale: float) -> tuple[float, ...]:
        return tuple(float(scale * generator.lognormal() * 4.0**-spec.bits) for spec in row)

    table = CostTable(
        model_hash=inventory.model_hash,
        cost="fisher",
        unit="expert",
        provenance={},
        units=tuple(unit for unit, _ in units),
        candidates=candidates,
        costs=tuple(falling(candidates, 1.0) for _ in units),
        sizes=tuple(
            tuple(sum(stored_bytes(spec, shape) for shape in shapes) for spec in candidates) for _, shapes in units
        ),
        dense=tuple(linear.path for linear in joined),
        dense_candidates=specs if joined else (),
        dense_costs=tuple((*falling(specs, 10 * dense_scale), 0.0) for _ in joined),
        dense_sizes=tuple(joining.sizes(linear, recipe, headers) for linear in joined),
    )
    table.validate()
    return table


def widths(plan: Plan) -> Counter[int]:
    return Counter(plan.specs[index].bits for index in plan.dense.values())


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_measured_costs_equal_autograd_of_the_loaded_model(form: str, tmp_path: Path) -> None:
    """Attention and shared experts of a whole model at once, against what streaming adds up call by call."""
    directory = tmp_path / "model"
    model = zoo.make_tiny("qwen2_moe", directory).eval().requires_grad_(False)
    inventory, headers = read_inventory(directory)
    num_sequences, seqlen = 5, 12
    ids_NT = torch.randint(3, 120, (num_sequences, seqlen), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(
        method="gemq", dense_bits="auto", group_size=32, device="cpu", seqlen=seqlen, cost_options=f"form={form}"
    )
    what = costs_of.Subject(
        source=directory,
        inventory=inventory,
        headers=headers,
        recipe=recipe.settled(),
        candidates=allocate.candidate_specs(recipe),
        tokens=TokenBatch(ids_NT=ids_NT, hash="0" * 64, source="random", seed=0),
    )
    table = costs_of.table(what)
    joined = joining.linears(inventory, recipe)
    assert {linear.kind for linear in joined} == {"attention", "shared"}
    assert table.dense == tuple(linear.path for linear in joined)

    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for linear in joined:

        def keep(_: Any, args: tuple[Tensor], output: Tensor, path: str = linear.path) -> Tensor:
            value = output if output.requires_grad else output.detach().requires_grad_().clone()
            value.retain_grad()
            kept[path] = args[0].detach().clone(), value
            return value

        model.get_submodule(linear.path).register_forward_hook(keep)
    logits = model(input_ids=ids_NT, use_cache=False).logits[:, :-1]
    functional.cross_entropy(logits.transpose(1, 2), ids_NT[:, 1:], reduction="none").mean(1).sum().backward()
    quantizer, predicted = make_quantizer("rtn", gain=True), seqlen - 1
    with Reader(directory) as reader:
        for linear, costs, sizes in zip(joined, table.dense_costs, table.dense_sizes, strict=True):
            x_TK, y_TN = kept[linear.path]
            w_NK = reader.tensor(linear.source).float()
            assert sizes[-1] == w_NK.numel() * 4
            assert costs[-1] == 0
            for spec, cost in zip(table.dense_candidates, costs, strict=False):
                found = quantizer.quantize(w_NK, spec, None)
                change_NK = dequantize(found.codes_NK, found.scale_NG, found.zero_NG, spec) - w_NK
                product = (y_TN.grad * predicted * (x_TK @ change_NK.T)).double()
                terms = product.square().sum() if form == "diagonal" else product.sum(-1).square().sum()
                assert cost == pytest.approx(float(terms) / 2 / (num_sequences * predicted), rel=1e-3)


def test_program_equals_brute_force() -> None:
    """Two layers of two experts and two linears: every budget, with and without shares."""
    inventory, headers = demo()
    recipe = AUTO.settled()
    whole = table_of(inventory, headers, recipe)
    rows = joining.rows(whole, inventory, recipe)[:2]
    few = [0, 1, 16, 17]  # two experts of each of the first two layers
    unknown = joining.Row(path="unknown", costs=(0.0,) * 4, sizes=(1, 2, 3, 4000))
    table = CostTable(
        model_hash="m",
        cost="fisher",
        unit="expert",
        provenance={},
        units=tuple(whole.units[unit] for unit in few),
        candidates=whole.candidates,
        costs=tuple(whole.costs[unit] for unit in few),
        sizes=tuple(whole.sizes[unit] for unit in few),
    )
    small = _two_layers(inventory)
    for shares, limit in itertools.product(("none", "3:1"), range(50_000, 170_000, 12_000)):
        rules = program.Rules(
            solver="auto", scope="global", shares=shares, candidates=(1, 2, 3), codes=False, dense=(*rows, unknown)
        )
        best = _brute_force(table, rows, limit - 4000, shares)
        if best is None:
            with pytest.raises(InfeasibleError):
                program.choose(table, small, limit, rules)
            continue
        found = program.choose(table, small, limit, rules)
        assert found.objective == pytest.approx(best, rel=1e-9)
        assert found.dense.pop("unknown") == 3, "nothing is known of it: it stays as it is"
        assert list(found.dense) == [row.path for row in rows]
        size = 4000 + sum(row.sizes[found.dense[row.path]] for row in rows)
        size += sum(sizes[column] for sizes, column in zip(table.sizes, found.columns, strict=True))
        assert size <= limit


def _two_layers(inventory: Inventory) -> Inventory:
    layers = tuple(_fewer(layer, 2) for layer in inventory.layers[:2])
    return Inventory(**{name: getattr(inventory, name) for name in inventory.__slots__} | {"layers": layers})


def _fewer(layer: Any, experts: int) -> Any:
    return type(layer)(**{name: getattr(layer, name) for name in layer.__slots__} | {"num_experts": experts})


def _brute_force(table: CostTable, rows: tuple[joining.Row, ...], limit: int, shares: str) -> float | None:
    choices = [range(3)] * 4 + [range(4)] * len(rows)
    costs = [*table.costs, *(row.costs for row in rows)]
    sizes = [*table.sizes, *(row.sizes for row in rows)]
    best = None
    for chosen in itertools.product(*choices):
        if shares != "none" and not (2 in chosen[:2] and 2 in chosen[2:4]):
            continue
        if sum(row[column] for row, column in zip(sizes, chosen, strict=True)) <= limit:
            cost = sum(row[column] for row, column in zip(costs, chosen, strict=True))
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(3_060_000, 6_000_000),
    seed=st.integers(0, 100),
    scale=st.sampled_from((1e-6, 1.0, 1e6)),
    dense=st.sampled_from(("auto", "attention=auto", "attention=auto,lm_head=4")),
    copied=st.sampled_from((300_000, 1_200_000, shards.COPY_SHARD_BYTES)),
)
def test_a_size_is_obeyed_to_the_byte(
    size: int, seed: int, scale: float, dense: str, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears that are copied make other headers, names and files than those that are packed: all are counted."""
    monkeypatch.setattr(shards, "COPY_SHARD_BYTES", copied)
    inventory, headers = demo()
    recipe = AUTO.replace(size=str(size), dense_bits=dense).settled()
    table = table_of(inventory, headers, recipe, seed, scale)
    sidecars = setup.sidecars_of(DEMO, inventory, headers, recipe)
    plan = allocate.run(inventory, headers, recipe, sidecars, table)
    total = shards.sizes(inventory, plan, shards.arrange(inventory, plan, headers)).total + sidecars(plan)
    assert total <= size
    draft = allocate.run(inventory, headers, recipe, sidecars)
    assert set(draft.dense) >= {linear.path for linear in joining.linears(inventory, recipe)}
    files = shards.arrange(inventory, draft, headers)
    assert shards.sizes(inventory, draft, files).total + sidecars(draft) <= size


def test_bytes_go_where_they_save_most() -> None:
    inventory, headers = demo()
    tables = {scale: table_of(inventory, headers, AUTO, dense_scale=scale) for scale in (1e-9, 1.0, 1e9)}

    def solve(scale: float, size: str) -> Plan:
        return allocate.run(inventory, headers, AUTO.replace(size=size), table=tables[scale])

    assert widths(solve(1e-9, "3.2MB")) == {4: 16}
    assert not solve(1e9, "3.2MB").dense, "linears that suffer most stay as they are"
    low, high = solve(1.0, "2.9MB"), solve(1.0, "3.2MB")
    spent = [joining.chosen_bytes(tables[1.0], inventory, AUTO, plan) for plan in (low, high)]
    assert spent[0] < spent[1], "a lower budget makes attention narrower"
    assert low.expert_bytes < high.expert_bytes
    with pytest.raises(BudgetError, match="at least") as caught:
        solve(1.0, "2.6MB")
    least = caught.value.fix.split("at least ")[1].split(" bytes")[0]
    assert widths(solve(1.0, least)) == {4: 16}


@pytest.fixture(scope="module")
def costs(demo_dir: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fisher costs of the bundled model's experts and attention."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    measure.run(demo_dir, Recipe(method="gemq", dense_bits="auto", calibration=str(calibration_text), **SMALL)).save(
        path
    )
    return path


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.nightly
def test_the_command_line_goes_all_the_way(
    demo_dir: Path, costs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "gemq", "--dense-bits", "auto", "--costs", costs, "--router", "none")
    plans = []
    for size in (3_150_000, 3_700_000):
        plan = tmp_path / f"{size}.json"
        said = run("allocate", demo_dir, plan, *options, "--size", size, "--svg", tmp_path / "a.svg", capsys=capsys)
        assert said["stored_bytes"] < size
        plans.append(Plan.load(plan))
    assert sum(bits * count for bits, count in widths(plans[0]).items()) < sum(
        bits * count for bits, count in widths(plans[1]).items()
    )
    assert plans[0].expert_bytes < plans[1].expert_bytes
    assert 0 <= said["gap"] < 1e-3
    asked = run("plan", demo_dir, *options, "--size", 3_150_000, capsys=capsys)
    assert asked["plan_hash"] == plans[0].hash
    curve = run("pareto", demo_dir, *options, "--points", 6, capsys=capsys)["points"]
    objectives = [point["objective"] for point in curve]
    assert objectives == sorted(objectives, reverse=True)
    assert curve[0]["dense_bytes"] < curve[-1]["dense_bytes"]
    out = tmp_path / "out"
    options = (*options, "--no-quality", "--device", "cpu")
    run("quantize", demo_dir, out, *options, "--size", 3_150_000, capsys=capsys)
    assert sum(path.stat().st_size for path in out.iterdir()) <= 3_150_000
    assert Plan.load(out / finish.PLAN_NAME).hash == plans[0].hash
    assert moeq.verify(out).logits_finite
    again = run("quantize", demo_dir, tmp_path / "b", "--plan", tmp_path / "3150000.json", capsys=capsys)
    assert again["quantizer"] == "trellis", "as the plan has it"
    assert again["plan_hash"] == plans[0].hash


@pytest.mark.slow
def test_measuring_and_calibrated_packing_in_one_go(demo_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = moeq.quantize(
        demo_dir, out, method="gemq", dense_bits="auto", size="3.2MB", calibration=str(calibration_text), **SMALL
    )
    assert report.quantizer == "trellis"
    assert report.directory_bytes <= 3_200_000
    assert Plan.load(out / finish.PLAN_NAME).dense


def test_costs_without_these_linears_are_refused_and_measured_again(
    demo_dir: Path, costs: Path, calibration_text: Path, tmp_path: Path
) -> None:
    data = json.loads(costs.read_bytes())
    none = {"dense": [], "dense_candidates": [], "dense_costs": [], "dense_sizes": []}
    fewer = {name: data[name][1:] for name in ("dense", "dense_costs", "dense_sizes")}
    cases: list[tuple[dict[str, Any], str]] = [
        (none, "measure with --dense-bits auto"),
        (fewer, "layers.0.self_attn.q_proj"),
        ({"dense": [*data["dense"][:-1], "model.pie"]}, "model.pie"),
        ({"dense_sizes": [[size + 64 for size in row] for row in data["dense_sizes"]]}, "these sizes"),
        ({"dense_candidates": data["dense_candidates"][:2]}, "dense_costs"),
        ({"dense_costs": [[-1.0, *row[1:]] for row in data["dense_costs"]]}, "negative"),
    ]
    path = tmp_path / "edited.json"
    for change, message in cases:
        path.write_text(json.dumps({**data, **change}), encoding="utf-8")
        with pytest.raises(ArtifactError, match=message) as caught:
            moeq.plan(demo_dir, method="gemq", router="none", dense_bits="auto", size="3.3MB", costs=str(path))
        assert caught.value.fix
    path.write_text(json.dumps({**data, **none}), encoding="utf-8")
    assert moeq.plan(demo_dir, method="gemq", router="none", dense_bits="8", size="3.3MB", costs=str(path)).decided
    assert moeq.plan(demo_dir, method="gemq", router="none", dense_bits="8", size="3.3MB", costs=str(costs)).decided

    inventory, headers = demo()
    recipe = Recipe(method="gemq", dense_bits="auto", calibration=str(calibration_text), **SMALL)
    what = costs_of.subject(demo_dir, inventory, headers, recipe)
    assert setup._measured(costs, what) is not None
    assert setup._measured(path, what) is None, "an interrupted run without auto did not measure these"
    plain = costs_of.subject(demo_dir, inventory, headers, recipe.replace(dense_bits="8"))
    assert setup._measured(costs, plain) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 2.5}, "--size"),
        ({"bits": None, "accounting": "codes", "size": "3MB"}, "accounting"),
        ({"method": "uniform"}, "gemq"),
        ({"method": "alphaq"}, "fisher, weight-error"),
        ({"method": "pmq"}, "scope"),
        ({"cost": "output-error", "cost_options": "mode=squared"}, "fisher, weight-error"),
        ({"scope": "layer"}, "--scope global"),
        ({"dense_bits": "lm_head=auto"}, "16, 8, 6, 4"),
        ({"dense_bits": "attention=automatic"}, "auto"),
        ({"round_context": True, "context": "x"}, "round-context"),
        ({"method": "uniform", "size": None, "plan": "p.json"}, "drop one"),
    ],
)
def test_refusals(options: dict[str, Any], words: str, demo_dir: Path) -> None:
    everything = {"method": "gemq", "dense_bits": "auto", "size": "3.3MB", **options}
    if options.get("bits"):
        everything["size"] = None
    with pytest.raises(OptionError, match=words) as caught:
        moeq.plan(demo_dir, **everything)
    assert caught.value.option == "dense-bits"


def test_kinds_may_join_one_by_one() -> None:
    recipe = Recipe(method="gemq", size="3MB", dense_bits="attention=auto,shared=8")
    assert (recipe.joining(), recipe.dense()["shared"], recipe.dense()["attention"]) == (("attention",), 8, 16)
    assert Recipe(method="gemq", size="3MB", dense_bits="auto").joining() == JOINING_KINDS
    assert Recipe(bits=3, dense_bits="8").joining() == ()


def test_weight_error_needs_no_text(demo_dir: Path) -> None:
    table = measure.run(
        demo_dir, Recipe(method="gemq", cost="weight-error", dense_bits="auto", candidates="2,3", device="cpu")
    )
    assert len(table.dense) == 16
    assert all(row[0] > row[1] > row[2] > row[3] == 0 for row in table.dense_costs)

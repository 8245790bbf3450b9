import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq.artifacts import Artifact, CostTable, EvalResult, Inventory, Plan, expert_bytes
from moeq.errors import ArtifactError, VersionError
from moeq.model_parts import DenseLinear, MatrixSource, MoeLayer
from moeq.spec import BITS, QuantSpec, Unit, stored_bytes, table_bytes

SHAPES = {"gate": (24, 40), "up": (24, 40), "down": (40, 24)}


def layer(index: int, num_experts: int = 3, shapes: dict[str, tuple[int, int]] = SHAPES) -> MoeLayer:
    name = f"model.layers.{index}.mlp.experts"
    return MoeLayer(
        path=name,
        block=f"model.layers.{index}",
        num_experts=num_experts,
        top_k=2,
        shapes=shapes,
        sources={
            projection: MatrixSource(name=f"{name}.{{expert}}.{projection}", stacked=False) for projection in shapes
        },
    )


def inventory(*layers: MoeLayer) -> Inventory:
    linear = DenseLinear(
        path="model.layers.0.attn", kind="attention", source="q", shape=(40, 40), block="model.layers.0"
    )
    return Inventory(
        model_type="m",
        architecture="M",
        model_hash="abc",
        layers=layers or (layer(0), layer(1, 5, {"up": (8, 8), "down": (8, 8)})),
        dense=(linear,),
        source_bytes=10**6,
        parameters=5 * 10**5,
        element_bytes=2,
    )


SPECS = tuple(QuantSpec(bits=bits, group_size=32) for bits in BITS)


def plan(widths: Callable[[Unit], int] = lambda unit: 2, **changes: Any) -> Plan:
    """A plan for `inventory()`."""
    source = inventory()
    experts = tuple(
        tuple(
            tuple(widths(Unit(layer=index, expert=expert, projection=name)) for name in found.projections)
            for expert in range(found.num_experts)
        )
        for index, found in enumerate(source.layers)
    )
    draft = Plan(model_hash="abc", method="uniform", specs=SPECS, experts=experts, expert_bytes=0)
    return replace(draft, expert_bytes=expert_bytes(draft, source), **changes)


COSTS = CostTable(
    model_hash="abc",
    cost="error",
    unit="matrix",
    provenance={"seed": 0},
    units=(Unit(layer=0, expert=0, projection="up"), Unit(layer=0, expert=0, projection="down")),
    candidates=SPECS[:2],
    costs=((1.0, 0.5), (2.0, 1.0)),
    sizes=((64, 128), (64, 128)),
)
RESULT = EvalResult(subject="a", reference=None, metrics={"perplexity": 3.5}, tokens=12, provenance={"text": "t"})
ALL: tuple[Artifact, ...] = (inventory(), COSTS, plan(dense={"model.layers.0.attn": 6}, objective=1.5), RESULT)


@pytest.mark.parametrize("artifact", ALL, ids=lambda artifact: artifact.KIND)
def test_round_trip_through_a_file(artifact: Artifact, tmp_path: Path) -> None:
    artifact.validate()
    path = tmp_path / "artifact.json"
    artifact.save(path)
    assert type(artifact).load(path) == artifact
    assert type(artifact).load(path).hash == artifact.hash
    assert path.read_bytes().endswith(b"}\n")
    data = json.loads(path.read_bytes())
    assert (data["kind"], data["format_version"]) == (artifact.KIND, 1)


@pytest.mark.parametrize("artifact", ALL, ids=lambda artifact: artifact.KIND)
def test_other_kinds_and_versions_are_refused_by_file(artifact: Artifact, tmp_path: Path) -> None:
    kind, data = type(artifact), artifact.to_dict()
    for wrong in ({**data, "kind": "pie"}, [], None):
        with pytest.raises(ArtifactError, match=f"not a moeq {artifact.KIND} .*a.json") as caught:
            kind.from_dict(wrong, file=tmp_path / "a.json")
        assert not isinstance(caught.value, VersionError)
    for version in (0, 2, "1", None):
        with pytest.raises(VersionError, match="this moeq reads 1"):
            kind.from_dict({**data, "format_version": version})
    with pytest.raises(ArtifactError, match=r"unknown key 'pie' .*a\.json"):
        kind.from_dict({**data, "pie": 1}, file=tmp_path / "a.json")


def test_hashes_tell_artifacts_apart() -> None:
    assert len({artifact.hash for artifact in ALL}) == len(ALL)
    assert plan().hash == plan().hash != plan(lambda unit: 3).hash


BROKEN: tuple[tuple[Artifact, str], ...] = (
    (replace(inventory(), layers=()), "at least one MoE layer"),
    (inventory(replace(layer(0), top_k=4)), "top_k 4 of 3"),
    (inventory(replace(layer(0), shapes={"up": (8, 8)})), "same projections"),
    (inventory(layer(0, shapes={"up": (8, 0), "down": (0, 8)})), "no elements"),
    (replace(COSTS, units=COSTS.units[:1] * 2), "twice"),
    (replace(COSTS, costs=((1.0,), (2.0, 1.0))), "costs must have"),
    (replace(COSTS, sizes=COSTS.sizes[:1]), "sizes must have"),
    (replace(COSTS, costs=((1.0, float("nan")), (2.0, 1.0))), "not finite"),
    (replace(COSTS, costs=((1.0, -1.0), (2.0, 1.0))), "negative"),
    (replace(COSTS, unit="layer"), "units 'layer'"),
    (replace(COSTS, candidates=SPECS[:1] * 2), "different specs"),
    (replace(COSTS, statistics={"alpha": (1.0,)}), "one number per unit"),
    (replace(COSTS, dense=("a",), dense_costs=((1.0, 0.5),), dense_sizes=((1, 2, 3),)), "dense_costs must have"),
    (plan(specs=SPECS[:2]), "outside its palette"),
    (plan(dense={"x": -1}), "outside its palette"),
    (replace(plan(), experts=()), "outside its palette"),
    (replace(RESULT, metrics={"kl": float("inf")}), "'kl' is not finite"),
    (replace(RESULT, tokens=-1), "negative"),
)


@pytest.mark.parametrize(("artifact", "message"), BROKEN)
def test_contradictions_are_refused(artifact: Artifact, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        artifact.validate()
    with pytest.raises(ArtifactError, match=message):
        artifact.save(tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(model_hash="xyz"), "for model xyz, this is abc"),
        (replace(plan(), experts=plan().experts[:1]), "other experts"),
        (replace(plan(), experts=(plan().experts[0][:2], plan().experts[1])), "other experts"),
        (replace(plan(), experts=((*plan().experts[0][:2], (2, 2)), plan().experts[1])), "other experts"),
        (plan(dense={"model.pie": 0}), "'model.pie'"),
        (replace(plan(), expert_bytes=1), "expert_bytes"),
    ],
)
def test_plans_for_something_else_are_refused(wrong: Plan, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        wrong.check_model(inventory())
    assert caught.value.option == "plan"
    plan().check_model(inventory())


@given(st.data())
def test_expert_bytes_is_the_sum_of_its_parts(data: st.DataObject) -> None:
    source = inventory()
    chosen = {unit: data.draw(st.integers(0, len(SPECS) - 1)) for unit, _ in source.units()}
    made = plan(chosen.__getitem__)
    tables = sum(table_bytes(found.num_experts, len(found.projections)) for found in source.layers)
    matrices = sum(stored_bytes(SPECS[chosen[unit]], shape) for unit, shape in source.units())
    assert made.expert_bytes == tables + matrices
    for unit, _ in source.units():
        assert made.spec(unit, source.layers[unit.layer].projections) == SPECS[chosen[unit]]


def test_units_come_in_storage_order() -> None:
    units = [(unit.layer, unit.expert, unit.projection) for unit, _ in inventory().units()]
    assert units[:4] == [(0, 0, "gate"), (0, 0, "up"), (0, 0, "down"), (0, 1, "gate")]
    assert units[9:12] == [(1, 0, "up"), (1, 0, "down"), (1, 1, "up")]
    assert len(units) == 3 * 3 + 5 * 2
    assert inventory().expert_parameters == sum(rows * columns for _, (rows, columns) in inventory().units())


def test_names_of_tensors() -> None:
    single = MatrixSource(name="e.{expert}.w", stacked=False, expert_offset=2)
    assert [single.tensor(expert) for expert in (0, 3)] == ["e.2.w", "e.5.w"]
    assert MatrixSource(name="e.w", stacked=True).tensor(7) == "e.w"

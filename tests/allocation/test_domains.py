"""Costs measured text by text: no text pays for another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeq.allocation import measuring
from moeq.allocation.domains import by_text, combined
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable
from moeq.calibration.tokens import Domain, TokenBatch, first_samples
from moeq.costs.component_table import ComponentTable
from moeq.errors import OptionError
from moeq.recipe import Recipe
from moeq.spec import QuantSpec, Unit

SPECS = tuple(QuantSpec(bits=bits) for bits in (1, 2, 3))


def table(rows: list[tuple[float, float, float]], tokens: tuple[float, ...]) -> CostTable:
    return CostTable(
        model_hash="x",
        cost="fisher",
        unit="expert",
        provenance={},
        units=tuple(Unit(layer=0, expert=at, projection="expert") for at in range(len(rows))),
        candidates=SPECS,
        costs=tuple(rows),
        sizes=((1, 2, 3),) * len(rows),
        statistics={"tokens": tokens},
    )


def test_each_text_has_its_own_scale() -> None:
    """The second text's gradients are a thousand times as large; it gets no more to say."""
    quiet = table([(4.0, 1.0, 0.1), (4.0, 3.0, 0.1)], (10, 20))
    loud = table([(4000.0, 3000.0, 100.0), (4000.0, 1000.0, 100.0)], (5, 5))
    mean = combined([quiet, loud], ["a", "b"], [0.5, 0.5], "mean")
    assert mean.costs[0][1] == pytest.approx(mean.costs[1][1])
    assert sum(row[1] for row in mean.costs) == pytest.approx((4 + 4000) / 2)
    worst = combined([quiet, loud], ["a", "b"], [0.5, 0.5], "worst")
    assert worst.costs[0][1] == pytest.approx(worst.costs[1][1])
    assert worst.costs[0][1] == pytest.approx(mean.costs[0][1] * 0.75 / 0.5)
    assert mean.statistics["tokens"] == (15, 25)
    assert mean.statistics["tokens of b"] == (5, 5)
    leaning = combined([quiet, loud], ["a", "b"], [0.9, 0.1], "mean")
    assert leaning.costs[1][1] > leaning.costs[0][1]


def test_a_text_that_loses_nothing_counts_for_nothing() -> None:
    none = table([(0.0, 0.0, 0.0)] * 2, (0, 0))
    some = table([(4.0, 1.0, 0.1), (4.0, 3.0, 0.1)], (10, 20))
    both = combined([none, some], ["a", "b"], [0.5, 0.5], "mean")
    assert both.costs[1][1] == pytest.approx(3 * both.costs[0][1])


def test_samples_of_each_text() -> None:
    ids = torch.arange(24).view(6, 4)
    names = (Domain(name="a", samples=4, documents=9), Domain(name="b", samples=2, documents=3))
    batch = TokenBatch(ids_NT=ids, hash="", source="a,b", seed=0, domains=names, domain_N=(0, 0, 1, 0, 0, 1))
    first, second = by_text(batch)
    assert first.ids_NT[:, 0].tolist() == [0, 4, 12, 16]
    assert second.ids_NT[:, 0].tolist() == [8, 20]
    assert (first.source, second.source) == ("a", "b")
    assert first.hash != second.hash
    some = first_samples(batch, 3)
    assert some.domain_N == (0, 0, 1)
    assert first_samples(batch, 0) is batch
    assert first_samples(batch, 9) is batch


@pytest.mark.parametrize("how", ["mean", "worst", "pooled"])
def test_measured_text_by_text(how: str, demo_dir: Path, text_dir: Path) -> None:
    texts = f"{text_dir / 'calibration.txt'}:0.5,{text_dir / 'eval.txt'}:0.5"
    options = {"nsamples": 8, "seqlen": 32, "device": "cpu", "candidates": "2,3"}
    recipe = Recipe(method="gemq", calibration=texts, cost_options=f"texts={how}", **options)
    inventory, headers = read_inventory(demo_dir)
    what = measuring.subject(demo_dir, inventory, headers, recipe)
    found = measuring.table(what)
    assert isinstance(found, CostTable)
    assert ("tokens of eval.txt" in found.statistics) == (how != "pooled")
    assert found.provenance == what.provenance
    alone = measuring.table(replace(what, tokens=by_text(what.tokens)[0])) if what.tokens else None
    assert alone is not None
    assert alone.costs != found.costs


@pytest.mark.parametrize("how", ["mean", "worst"])
def test_components_text_by_text(how: str, demo_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    texts = f"{text_dir / 'calibration.txt'}:0.75,{text_dir / 'eval.txt'}:0.25"
    recipe = Recipe(
        method="bitsmoe", calibration=texts, cost_options=f"texts={how}", nsamples=8, seqlen=32, device="cpu"
    )
    what = measuring.subject(demo_dir, *read_inventory(demo_dir), recipe)
    assert what.tokens is not None
    parts = [measuring.table(replace(what, tokens=batch)) for batch in by_text(what.tokens)]
    found = measuring.table(what, output=tmp_path / "costs.safetensors")
    assert isinstance(found, ComponentTable)
    assert found.path == tmp_path / "costs.safetensors"
    assert found.provenance == what.provenance
    tables = [part for part in parts if isinstance(part, ComponentTable)]
    middle, places = len(found.candidates) // 2, [(at, name) for at in range(4) for name in ("gate", "up", "down")]
    scales = [
        sum(float(t.layer(*at).weight_EH.double().sum() * t.layer(*at).curve_C[middle]) for at in places)
        for t in tables
    ]
    unit = 0.75 * scales[0] + 0.25 * scales[1]
    for at in places:
        a, b = (table.layer(*at).weight_EH.double() / scale for table, scale in zip(tables, scales, strict=True))
        wanted = torch.maximum(a, b) if how == "worst" else 0.75 * a + 0.25 * b
        torch.testing.assert_close(found.layer(*at).weight_EH.double(), unit * wanted, rtol=1e-5, atol=0)
        assert torch.equal(found.layer(*at).rows, tables[0].layer(*at).rows)
        drops = [table.facts.drop[at[0]][at[1]] for table in tables]
        assert min(drops) - 1e-9 <= found.facts.drop[at[0]][at[1]] <= max(drops) + 1e-9
    counts = zip(*(table.facts.tokens[0] for table in tables), strict=True)
    assert found.facts.tokens[0] == tuple(a + b for a, b in counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gemq", "cost_options": "texts=median"}, "median"),
        ({"method": "gemq", "cost_options": "samples=-1"}, "-1"),
        ({"method": "bitsmoe", "cost_options": "metric=inputs,texts=worst"}, "worst"),
    ],
)
def test_refused(options: dict[str, str], message: str, demo_dir: Path, calibration_text: Path) -> None:
    inventory, headers = read_inventory(demo_dir)
    recipe = Recipe(**options, calibration=str(calibration_text), nsamples=4, seqlen=32)
    with pytest.raises(OptionError, match=message):
        measuring.subject(demo_dir, inventory, headers, recipe)

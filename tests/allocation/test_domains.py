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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gemq", "cost_options": "texts=median"}, "median"),
        ({"method": "gemq", "cost_options": "samples=-1"}, "-1"),
        ({"method": "bitsmoe", "cost_options": "texts=worst"}, "worst"),
    ],
)
def test_refused(options: dict[str, str], message: str, demo_dir: Path, calibration_text: Path) -> None:
    inventory, headers = read_inventory(demo_dir)
    recipe = Recipe(**options, calibration=str(calibration_text), nsamples=4, seqlen=32)
    with pytest.raises(OptionError, match=message):
        measuring.subject(demo_dir, inventory, headers, recipe)

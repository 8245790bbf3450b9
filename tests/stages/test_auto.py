"""Method auto: candidates are made, compared on text that calibration did not see, and the best one is published."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moeq
from moeq import cli
from moeq.errors import BudgetError, OptionError
from moeq.format.manifest import read_manifest
from moeq.recipe import Recipe
from moeq.report.trials import Trial, card_section
from moeq.stages import auto, quantize

SMALL: dict[str, Any] = {"bits": 2.5, "nsamples": 8, "seqlen": 64, "device": "cpu", "quality": False}


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def trial(name: str, *kl: float, error: str = "") -> Trial:
    return Trial(name=name, kl=dict(zip(("a", "b"), kl, strict=False)), error=error)


@pytest.mark.parametrize(
    ("trials", "wanted"),
    [
        ([trial("auto", 0.1, 0.1), trial("uniform", 0.2, 0.2)], "auto"),
        ([trial("auto", 0.1, 0.3), trial("uniform", 0.2, 0.25)], "uniform"),  # better on average, worse for a text
        ([trial("auto", 0.3, 0.3), trial("uniform", 0.2, 0.2)], "uniform"),
        ([trial("auto", 0.1, 0.3), trial("tiled", 0.19, 0.24), trial("uniform", 0.2, 0.25)], "tiled"),
        ([trial("auto", 0.1, 0.1), trial("tiled", error="no"), trial("uniform", error="too small")], "auto"),
        ([trial("auto")], "auto"),
    ],
)
def test_choice(trials: list[Trial], wanted: str) -> None:
    assert auto.choice({each.name: each for each in trials}, "auto") == wanted


def test_candidates_keep_what_the_user_said() -> None:
    recipe = Recipe(method="auto", effort="best", bits=3, group_size=64, calibration="bundled", unit="expert", seed=5)
    found = auto.candidates(recipe)
    assert [*found] == ["auto", "plain-levels", "worst-text", "tiled", "spectral", "uniform"]
    assert {(each.bits, each.group_size, each.calibration, each.seed) for each in found.values()} == {
        (3.0, 64, "bundled", 5)
    }
    assert found["worst-text"].options_of_cost()["texts"] == "worst"
    assert found["auto"].settled().compensate is True
    assert found["uniform"].settled().compensate is False
    assert [*auto.candidates(replace(recipe, quantizer="gptq", calibration="a.txt"))] == [
        "auto", "tiled", "spectral", "uniform",
    ]  # fmt: skip
    joined = Recipe(method="auto", size="8GB", dense_bits="auto", calibration="bundled")
    assert auto.candidates(joined)["uniform"].dense_bits == "16"
    for fast in (replace(recipe, effort="fast"), Recipe(method="gemq", bits=3), Recipe(bits=3)):
        assert not auto.tries(fast)


def test_it_says_what_it_tried(demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    words = ["--bits", "2.5", "--nsamples", "8", "--seqlen", "64", "--device", "cpu", "--no-quality"]
    assert cli.main(["quantize", str(demo_dir), str(out), *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in said["trials"]] == ["auto", "uniform"]
    assert [each["chosen"] for each in said["trials"]] == [True, False]
    assert said["output"] == str(out)
    for each in said["trials"]:
        assert set(each["kl"]) == {"bundled web", "bundled mixture"}
        assert 0 < each["bits"] <= 2.5
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## How this was chosen" in card
    assert "| uniform |" in card
    assert f"# {out.name}" in card
    assert not (tmp_path / "out.stages").exists()
    assert moeq.verify(out).logits_finite
    moeq.quantize(demo_dir, alone, effort="fast", **SMALL)
    assert shards(alone) == shards(out)
    assert "How this was chosen" not in (alone / "README.md").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_best(demo_dir: Path, tmp_path: Path) -> None:
    report = moeq.quantize(demo_dir, tmp_path / "out", effort="best", **SMALL)
    names = ["auto", "plain-levels", "worst-text", "tiled", "spectral", "uniform", "tuned"]
    assert [each.name for each in report.trials] == names
    best = min(report.trials, key=lambda each: sum(each.kl.values()) if each.kl else 9e9)
    assert [each.name for each in report.trials if each.chosen] == [best.name]
    assert moeq.verify(tmp_path / "out").logits_finite


def test_uniform_is_published_where_it_is_better(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = auto.judged

    def judged(*args: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        found = real(*args, **kwargs)
        found["auto"]["bundled web"] = 9.0
        return found

    monkeypatch.setattr(auto, "judged", judged)
    report = moeq.quantize(demo_dir, tmp_path / "out", **SMALL)
    assert report.method == "uniform"
    assert [each.name for each in report.trials if each.chosen] == ["uniform"]
    assert read_manifest(tmp_path / "out").recipe["method"] == "uniform"


@pytest.mark.nightly
def test_an_interrupted_run_takes_up_what_is_made(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    moeq.quantize(demo_dir, whole, **SMALL)
    made: list[str] = []
    real = quantize._once

    def once(model: Any, path: Any, recipe: Recipe, **more: Any) -> Any:
        if recipe.method == "uniform" and not made.count("uniform"):
            made.append("uniform")
            raise KeyboardInterrupt
        made.append(recipe.method)
        return real(model, path, recipe, **more)

    monkeypatch.setattr(quantize, "_once", once)
    with pytest.raises(KeyboardInterrupt):
        moeq.quantize(demo_dir, out, **SMALL)
    assert not out.exists()
    report = moeq.quantize(demo_dir, out, resume=True, **SMALL)
    assert made == ["auto", "uniform", "uniform"], "the finished candidate is not made again"
    assert [each.name for each in report.trials] == ["auto", "uniform"]
    assert shards(out) == shards(whole)


@pytest.mark.nightly
def test_text_that_is_just_enough(demo_dir: Path, tmp_path: Path) -> None:
    """Nothing is left to compare on: it says so, and nothing else is made."""
    text = tmp_path / "short.txt"
    text.write_text("The old man looked at the sea and said nothing of it to the boy. " * 36, encoding="utf-8")
    report = moeq.quantize(demo_dir, tmp_path / "out", calibration=str(text), **SMALL)
    assert [each.name for each in report.trials] == ["auto"]
    assert "left over" in report.trials_note
    assert "left over" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_a_candidate_that_cannot_be_made_is_left_out(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = auto.candidates

    def candidates(recipe: Recipe) -> dict[str, Recipe]:
        found = real(recipe)
        return found | {"uniform": replace(found["uniform"], bits=1.01)}

    monkeypatch.setattr(auto, "candidates", candidates)
    report = moeq.quantize(demo_dir, tmp_path / "out", **SMALL)
    assert [(each.name, each.chosen) for each in report.trials] == [("auto", True), ("uniform", False)]
    assert "cannot be reached" in report.trials[1].error
    assert "cannot be reached" in card_section(report.trials, "")
    monkeypatch.setattr(auto, "candidates", lambda recipe: {"auto": replace(recipe, bits=1.01, effort="fast")})
    with pytest.raises(BudgetError):
        moeq.quantize(demo_dir, tmp_path / "no", **SMALL)


@pytest.mark.parametrize("effort", ["normal", "best"])
def test_every_candidate_can_be_served(effort: str) -> None:
    """The baseline once had several widths in a layer, and would have been published where it was better."""
    recipe = Recipe(method="auto", bits=3, calibration="bundled", serve="vllm-native", effort=effort).settled()
    found = auto.candidates(recipe)
    assert list(found)[-1] == "uniform"
    assert all(each.served.alike for each in found.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effort": "soon"}, "normal"),
        ({"effort": "1s"}, "not enough"),
        ({"effort": "best", "method": "gemq"}, "method auto"),
        ({"effort": "0h"}, "not enough"),
    ],
)
def test_wrong_efforts(options: dict[str, Any], words: str, demo_dir: Path, tmp_path: Path) -> None:
    small = SMALL | options
    with pytest.raises(OptionError, match=words):
        moeq.quantize(demo_dir, tmp_path / "out", **small)
    with pytest.raises(OptionError, match=words):
        moeq.plan(demo_dir, **small)
    assert not [*tmp_path.iterdir()]


def test_a_time_becomes_an_effort(demo_dir: Path) -> None:
    report = moeq.plan(demo_dir, bits=2.5)
    assert [*report.efforts] == ["fast", "normal", "best"]
    assert report.efforts["fast"] < report.efforts["normal"] < report.efforts["best"]
    assert moeq.plan(demo_dir, bits=2.5, effort="2h").seconds == moeq.plan(demo_dir, bits=2.5, effort="best").seconds
    assert moeq.plan(demo_dir, bits=2.5, method="gemq").efforts == {}


@pytest.mark.nightly
def test_a_plan_is_carried_out_as_its_method_has_it(demo_dir: Path, tmp_path: Path) -> None:
    """What is allocated and quantized in two steps is what one step gives."""
    costs, plan = tmp_path / "costs.json", tmp_path / "plan.json"
    small = {name: SMALL[name] for name in ("nsamples", "seqlen", "device")}
    moeq.measure(demo_dir, **small).save(costs)
    moeq.allocate(demo_dir, costs=str(costs), bits=2.5).save(plan)
    moeq.quantize(demo_dir, tmp_path / "planned", plan=str(plan), quality=False, **small)
    moeq.quantize(demo_dir, tmp_path / "whole", effort="fast", **SMALL)
    assert shards(tmp_path / "planned") == shards(tmp_path / "whole")
    moeq.quantize(demo_dir, tmp_path / "plain", plan=str(plan), quality=False, compensate=False, **small)
    assert shards(tmp_path / "plain") != shards(tmp_path / "whole")

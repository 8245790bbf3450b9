"""What a run does where nothing was said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moeq
import zoo
from moeq import cli
from moeq.calibration.texts import parse_texts
from moeq.calibration.tokens import read_documents
from moeq.defaults import filled
from moeq.errors import CheckpointError, OptionError
from moeq.recipe import Recipe

SMALL: dict[str, Any] = {"nsamples": 8, "seqlen": 64, "device": "cpu"}


def chosen(model: Path, **options: Any) -> tuple[str | None, str | None, str | None]:
    found = Recipe(**filled(model, options)).settled()
    return found.method, found.calibration, found.quantizer


def test_what_is_chosen(demo_dir: Path, calibration_text: Path) -> None:
    text = str(calibration_text)
    assert chosen(demo_dir) == ("auto", "bundled", "trellis")
    assert chosen(demo_dir, calibration=text) == ("auto", text, "trellis")
    assert chosen(demo_dir, calibration=text, levels="asym16") == ("auto", text, "gptq")
    assert chosen(demo_dir, calibration="none") == ("uniform", "none", "hqq")
    assert chosen(demo_dir, quantizer="rtn") == ("uniform", "none", "rtn")
    assert chosen(demo_dir, method="uniform") == ("uniform", "bundled", "gptq")
    assert chosen(demo_dir, method="uniform", quantizer="hqq") == ("uniform", "none", "hqq")
    assert chosen(demo_dir, method="alphaq", calibration="none") == ("alphaq", "none", "hqq")
    assert chosen(demo_dir, method="gemq", quantizer="rtn") == ("gemq", "bundled", "rtn")
    assert chosen(demo_dir, method="bitsmoe") == ("bitsmoe", "bundled", "gptq")
    assert chosen(demo_dir, cost="weight-error", unit="matrix", scope="global", shares="none", solver="auto") == (
        "uniform",
        "bundled",
        "gptq",
    )
    assert filled(demo_dir, {"plan": "x.json"}) == {"plan": "x.json", "calibration": "bundled"}
    assert filled(demo_dir, {"plan": "x.json", "quantizer": "rtn"}) == {"plan": "x.json", "quantizer": "rtn"}
    assert filled(demo_dir, {"plan": "x.json", "calibration": "none"}) == {"plan": "x.json", "calibration": "none"}
    assert filled(demo_dir, {"method": None, "calibration": None})["method"] == "auto"


def test_a_model_that_takes_no_text(tmp_path: Path, demo_dir: Path) -> None:
    """Nobody asked for text: it is rounded without. Who names a method that needs some is told."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(demo_dir / file, tmp_path)
    assert chosen(tmp_path) == ("uniform", "none", "hqq")
    assert chosen(tmp_path, method="alphaq") == ("alphaq", "none", "hqq")
    with pytest.raises(OptionError, match="needs calibration text"):
        moeq.plan(tmp_path, method="gemq", bits=3)
    with pytest.raises(CheckpointError, match="tokenizer"):
        moeq.plan(tmp_path, calibration="bundled", bits=3)
    labels = tmp_path / "labels"
    zoo.make_tiny("openai_privacy_filter", labels)
    zoo.write_tokenizer(labels)
    assert chosen(labels)[:2] == ("uniform", "none")


def test_presets(demo_dir: Path) -> None:
    paper = Recipe(**filled(demo_dir, {"method": "gemq", "preset": "paper"})).settled()
    assert (paper.unit, paper.router, paper.shares) == ("expert", "task", "c2c3")
    assert paper.options_of_cost()["perturb"] == "paper"
    own = Recipe(**filled(demo_dir, {"method": "gemq", "preset": "paper", "unit": "matrix"})).settled()
    assert own.unit == "matrix"
    assert filled(demo_dir, {"preset": "paper"})["unit"] == "expert"
    for method in ("bitsmoe", "tileq", "alphaq", "uniform", "pmq"):
        Recipe(**filled(demo_dir, {"method": method, "preset": "paper", "bits": 3}))
    with pytest.raises(OptionError, match="paper"):
        filled(demo_dir, {"preset": "magazine"})


def test_bundled_texts_are_there_and_their_licences_too() -> None:
    texts = parse_texts("bundled")
    assert [text.share for text in texts] == [0.5, 0.5]
    folder = Path(texts[0].source).parent
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for text in texts:
        rows = [json.loads(line) for line in Path(text.source).read_text(encoding="utf-8").splitlines()]
        assert sum(len(row["text"]) for row in rows) > 400_000
        for domain in {row["domain"] for row in rows}:
            assert f"`{domain}`" in licences or domain == "web"
        assert len(read_documents(text.source)) == len(rows)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_300_000


@pytest.mark.nightly
def test_the_call_without_any_option(demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(demo_dir), str(out), "--bits", "2.5", "--json"]
    assert cli.main([*words, "--nsamples", "8", "--seqlen", "64", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["method"] == "auto"
    assert [text["name"] for text in said["calibration"]] == ["bundled web", "bundled mixture"]
    assert set(said["quality_by_text"]) == {"bundled web", "bundled mixture"}
    recipe = json.loads((out / "moeq.json").read_text())["recipe"]
    assert (recipe["calibration"], recipe["unit"], recipe["router"]) == ("bundled", "matrix", "none")
    saved = tmp_path / "recipe.yaml"
    again = tmp_path / "again"
    more = ["--quantizer", "rtn", "--save-recipe", str(saved)]
    assert cli.main(["quantize", str(demo_dir), str(again), "--bits", "4", "--device", "cpu", *more]) == 0
    capsys.readouterr()
    assert "calibration: none" in saved.read_text()
    assert cli.main(["plan", str(demo_dir), "--recipe", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == []

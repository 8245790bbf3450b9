"""Wrong options, texts, plans, recipes and output directories: each is refused before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moeq
import zoo
from hostile import OPTIONS, copy_of, edit_json, no_partial, refused
from moeq import cli, errors
from moeq.allocation.decide import draft
from moeq.recipe_file import load_recipe

WRONG: dict[str, tuple[dict[str, Any], type[errors.MoeqError], tuple[str, ...]]] = {
    "no budget": ({"bits": None}, errors.OptionError, ("option bits",)),
    "two budgets": ({"size": "1MB"}, errors.BudgetError, ("bits, size",)),
    "budget below the minimum": ({"bits": 1.2}, errors.BudgetError, ("option bits", "1.2", "at least")),
    "size below the minimum": ({"bits": None, "size": "2KB"}, errors.BudgetError, ("option size", "2000 bytes")),
    "budget above the original": ({"bits": 17}, errors.BudgetError, ("option bits", "17", "16")),
    "size above the original": ({"bits": None, "size": "1GiB"}, errors.BudgetError, ("option size", "1073741824")),
    "zero bits": ({"bits": 0}, errors.BudgetError, ("option bits", "positive")),
    "negative bits": ({"bits": -3.0}, errors.BudgetError, ("option bits", "positive")),
    "NaN bits": ({"bits": float("nan")}, errors.BudgetError, ("option bits", "positive")),
    "infinite bits": ({"bits": float("inf")}, errors.BudgetError, ("option bits", "16")),
    "zero size": ({"bits": None, "size": "0"}, errors.BudgetError, ("option size", "positive")),
    "wrong units": ({"bits": None, "size": "8 apples"}, errors.BudgetError, ("option size", "8 apples", "GB")),
    "negative size": ({"bits": None, "size": "-8GB"}, errors.BudgetError, ("option size", "-8GB")),
    "bits as text": ({"bits": "three"}, errors.OptionError, ("option bits", "three")),
    "no code width fits": ({"bits": 0.5, "accounting": "codes"}, errors.BudgetError, ("option bits", "at least 1")),
    "unknown accounting": ({"accounting": "fingers"}, errors.OptionError, ("option accounting", "codes")),
    "unknown method": ({"method": "magic"}, errors.OptionError, ("option method", "magic", "uniform")),
    "unknown quantizer": ({"quantizer": "magic"}, errors.OptionError, ("option quantizer", "magic", "gptq")),
    "unknown group size": ({"group_size": 48}, errors.OptionError, ("option group-size", "48", "128")),
    "group size as text": ({"group_size": "64"}, errors.OptionError, ("option group-size", "64")),
    "unknown levels": ({"levels": "golden"}, errors.OptionError, ("option levels", "golden", "asym16")),
    "unknown dense bits": ({"dense_bits": "7"}, errors.OptionError, ("option dense-bits", "7", "16, 8")),
    "unknown dense kind": ({"dense_bits": "router=8"}, errors.OptionError, ("option dense-bits", "router")),
    "dense kind without bits": ({"dense_bits": "attention="}, errors.OptionError, ("option dense-bits",)),
    "no samples": ({"nsamples": 0}, errors.OptionError, ("option nsamples", "at least 1")),
    "samples as text": ({"nsamples": "many"}, errors.OptionError, ("option nsamples", "many")),
    "short samples": ({"seqlen": 1}, errors.OptionError, ("option seqlen", "at least 2")),
    "negative seed": ({"seed": -1}, errors.OptionError, ("option seed",)),
    "no damping": ({"damp": 0.0}, errors.OptionError, ("option damp", "0.01")),
    "unknown routing": ({"routing": "scenic"}, errors.OptionError, ("option routing", "scenic", "natural")),
    "routing to one": ({"routing": "1"}, errors.OptionError, ("option routing",)),
    "no such GPU": ({"device": "cuda:99"}, errors.DeviceError, ("option device", "cuda:99")),
    "unknown device": ({"device": "banana"}, errors.DeviceError, ("option device", "banana")),
    "meta device": ({"device": "meta"}, errors.DeviceError, ("option device", "meta")),
    "gptq without text": (
        {"method": "uniform", "quantizer": "gptq", "calibration": "none"},
        errors.OptionError,
        ("option calibration", "gptq", "hqq"),
    ),
    "a fit without text": (
        {"method": "uniform", "quantizer": "rtn", "compensate": True},
        errors.OptionError,
        ("option compensate", "rtn", "gptq"),
    ),
    "plan is not there": ({"bits": None, "plan": "no-plan.json"}, errors.ArtifactError, ("no-plan.json",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_option(case: str, tiny_dir: Path, tmp_path: Path) -> None:
    changes, kind, words = WRONG[case]
    out = tmp_path / "out"
    refused(kind, lambda: moeq.quantize(tiny_dir, out, **{**OPTIONS, **changes}), *words)
    no_partial(out)


def test_the_smallest_budget_named_in_the_message_is_enough(tiny_dir: Path) -> None:
    error = refused(errors.BudgetError, lambda: moeq.plan(tiny_dir, **{**OPTIONS, "bits": 1.2}))
    least = float(error.fix.split("at least ")[1].split(",")[0])
    report = moeq.plan(tiny_dir, **{**OPTIONS, "bits": least})
    assert report.expert_bits_per_weight <= least
    refused(errors.BudgetError, lambda: moeq.plan(tiny_dir, **{**OPTIONS, "bits": least - 0.01}))
    error = refused(errors.BudgetError, lambda: moeq.plan(tiny_dir, **{**OPTIONS, "bits": None, "size": "2KB"}))
    size = error.fix.split("at least ")[1].split(" bytes")[0]
    moeq.plan(tiny_dir, **{**OPTIONS, "bits": None, "size": size})
    refused(errors.BudgetError, lambda: moeq.plan(tiny_dir, **{**OPTIONS, "bits": None, "size": str(int(size) - 200)}))


def test_an_unknown_option_is_named(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="frobnicate"):
        moeq.quantize(tiny_dir, tmp_path / "out", bits=5, frobnicate=1)


TEXTS: dict[str, tuple[bytes | None, str, tuple[str, ...]]] = {
    "empty": (b"", "text.txt", ("text.txt", "no text")),
    "blank": (b" \n\n \n", "text.txt", ("text.txt", "no text")),
    "too short": (b"One short line.\n", "text.txt", ("text.txt", "8 samples of 64 need 512")),
    "not UTF-8": (b"caf\xe9 au lait\n" * 99, "text.txt", ("text.txt", "byte 3 is not UTF-8")),
    "UTF-16": ("text".encode("utf-16"), "text.txt", ("text.txt", "UTF-8")),
    "missing": (None, "text.txt", ("text.txt", "does not exist")),
    "unknown kind": (b"x", "text.csv", ("text.csv", ".jsonl")),
    "broken jsonl": (b'{"text": "a"}\n{"text": \n', "text.jsonl", ("text.jsonl", "line 2")),
    "jsonl without text": (b'{"body": "a"}\n', "text.jsonl", ("text.jsonl", "line 1")),
}


def write_text(case: str, directory: Path) -> Path:
    data, name, _ = TEXTS[case]
    if data is not None:
        (directory / name).write_bytes(data)
    return directory / name


@pytest.mark.parametrize("case", TEXTS)
def test_bad_calibration_text(case: str, demo_dir: Path, tmp_path: Path) -> None:
    text, out = write_text(case, tmp_path), tmp_path / "out"
    options = {"bits": 4, "quantizer": "gptq", "nsamples": 8, "seqlen": 64, "calibration": str(text)}
    refused(errors.CalibrationError, lambda: moeq.quantize(demo_dir, out, **options), *TEXTS[case][2])
    no_partial(out)


@pytest.mark.parametrize("case", ["empty", "not UTF-8", "missing", "broken jsonl"])
def test_bad_evaluation_text(case: str, demo_dir: Path, tmp_path: Path) -> None:
    text = write_text(case, tmp_path)
    refused(errors.CalibrationError, lambda: moeq.evaluate(demo_dir, text), *TEXTS[case][2])


def test_the_calibration_text_is_a_directory(demo_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = lambda: moeq.quantize(demo_dir, out, bits=4, calibration=str(tmp_path))  # noqa: E731
    refused(errors.CalibrationError, call, str(tmp_path), "directory", out=out)


def test_bad_evaluation_options(demo_dir: Path, text_dir: Path) -> None:
    text = text_dir / "eval.txt"
    refused(errors.OptionError, lambda: moeq.evaluate(demo_dir, text, seqlen=1), "option seqlen")
    refused(errors.OptionError, lambda: moeq.evaluate(demo_dir, text, max_tokens=0), "option max-tokens")
    refused(errors.OptionError, lambda: moeq.evaluate(demo_dir, text, batch_size=0, max_tokens=64), "option batch-size")
    refused(errors.DeviceError, lambda: moeq.evaluate(demo_dir, text, device="cuda:99"), "cuda:99")
    refused(errors.CalibrationError, lambda: moeq.evaluate(demo_dir, text, pairs=text, max_tokens=64), "eval.txt")


def occupied(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    return tmp_path / "out"


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "out").touch()
    return tmp_path / "out"


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "out"


def dangling(tmp_path: Path) -> Path:
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    return tmp_path / "out"


PLACES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "not empty": (occupied, ("exists and is not empty",)),
    "a file": (a_file, ("exists and is not empty",)),
    "a dangling link": (dangling, ("out",)),
    "below a file": (below_a_file, ("out.partial", "directory")),
    "the input": (lambda tmp_path: tmp_path / "source", ("overlaps the input",)),
    "the input by another name": (lambda tmp_path: tmp_path / "x" / ".." / "source", ("overlaps the input",)),
    "inside the input": (lambda tmp_path: tmp_path / "source" / "out", ("overlaps the input",)),
    "around the input": (lambda tmp_path: tmp_path, ("overlaps the input",)),
    "the root": (lambda tmp_path: Path("/"), ("overlaps the input",)),
    "read-only": (lambda tmp_path: Path("/proc/moeq/out"), ("/proc/moeq/out.partial",)),
    "a long name": (lambda tmp_path: tmp_path / ("x" * 300), ("name too long",)),
    "an impossible name": (lambda tmp_path: tmp_path / "a\0b", ("null",)),
}


@pytest.mark.parametrize("place", PLACES)
def test_bad_output(place: str, tiny_dir: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_dir, tmp_path / "source")
    make, words = PLACES[place]
    out = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    error = refused(errors.OutputError, lambda: moeq.quantize(source, out, **OPTIONS))
    assert all(word.lower() in str(error).lower() for word in ("option output", *words)), str(error)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_no_permission(tiny_dir: Path, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir()
    parent.chmod(0o500)
    try:
        (parent / "probe").mkdir()
    except PermissionError:
        refused(errors.OutputError, lambda: moeq.quantize(tiny_dir, parent / "out", **OPTIONS), str(parent))
        assert not any(parent.iterdir())
    else:
        pytest.skip("this user may write everywhere")


def test_an_empty_output_directory_and_a_relative_name_are_fine(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    report = moeq.quantize(tiny_dir, "out", **OPTIONS)
    assert report.output == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def made_plan(tiny_dir: Path, path: Path) -> Path:
    draft(tiny_dir, moeq.Recipe(**OPTIONS)).plan.save(path)
    return path


def update(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(changes)


def first_spec(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["specs"][0].update(changes)


PLANS: dict[str, tuple[Callable[[Path], object], type[errors.MoeqError], tuple[str, ...]]] = {
    "empty": (lambda plan: plan.write_text(""), errors.ArtifactError, ("JSON",)),
    "not UTF-8": (lambda plan: plan.write_bytes(b"\xff\xfe"), errors.ArtifactError, ("JSON",)),
    "another kind": (lambda plan: edit_json(plan, update(kind="pie")), errors.ArtifactError, ("not a moeq plan",)),
    "unknown key": (lambda plan: edit_json(plan, update(pie=1)), errors.ArtifactError, ("pie",)),
    "missing key": (lambda plan: edit_json(plan, lambda data: data.pop("specs")), errors.ArtifactError, ("specs",)),
    "wrong type": (lambda plan: edit_json(plan, update(experts=3)), errors.ArtifactError, ("experts",)),
    "unknown width": (lambda plan: edit_json(plan, first_spec(bits=7)), errors.ArtifactError, ("7",)),
    "unknown group size": (lambda plan: edit_json(plan, first_spec(group_size=5)), errors.ArtifactError, ("5",)),
    "outside its palette": (
        lambda plan: edit_json(plan, lambda data: data["experts"][0][0].__setitem__(0, 99)),
        errors.ArtifactError,
        ("palette",),
    ),
    "wrong size": (
        lambda plan: edit_json(plan, update(expert_bytes=1)), errors.ArtifactError, ("expert_bytes",),
    ),
    "a ragged expert": (
        lambda plan: edit_json(plan, lambda data: data["experts"][0][1].pop()), errors.ArtifactError, ("experts",),
    ),
    "a missing expert": (
        lambda plan: edit_json(plan, lambda data: data["experts"][0].pop()), errors.ArtifactError, ("experts",),
    ),
    "an unknown linear": (
        lambda plan: edit_json(plan, lambda data: data["dense"].update({"model.pie": 0})),
        errors.ArtifactError,
        ("model.pie",),
    ),
    "of the future": (
        lambda plan: edit_json(plan, update(format_version=2)), errors.VersionError, ("version 2",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_bad_plan(case: str, tiny_dir: Path, tmp_path: Path) -> None:
    breaking, kind, words = PLANS[case]
    plan, out = made_plan(tiny_dir, tmp_path / "plan.json"), tmp_path / "out"
    breaking(plan)
    options = {**OPTIONS, "bits": None, "plan": str(plan)}
    error = refused(kind, lambda: moeq.quantize(tiny_dir, out, **options), *words)
    assert error.option == "plan" or error.file == str(plan)
    no_partial(out)


def test_plan_for_another_model(tiny_dir: Path, tmp_path: Path) -> None:
    plan, out = made_plan(tiny_dir, tmp_path / "plan.json"), tmp_path / "out"
    zoo.make_tiny("qwen3_moe", tmp_path / "other", seed=7, dtype=torch.bfloat16)
    options = {**OPTIONS, "bits": None, "plan": str(plan)}
    call = lambda: moeq.quantize(tmp_path / "other", out, **options)  # noqa: E731
    refused(errors.ArtifactError, call, "option plan", "the plan is for model")
    no_partial(out)


RECIPES: dict[str, tuple[str | bytes | None, tuple[str, ...]]] = {
    "unknown key": ("bits: 4\nbitz: 3\n", ("bitz",)),
    "wrong type": ("bits: three\n", ("bits", "three")),
    "number as text": ("bits: 4\nnsamples: '12'\n", ("nsamples", "12")),
    "flag as text": ("bits: 4\nact-order: 'yes'\n", ("act-order",)),
    "a list": ("- bits\n- 4\n", ("mapping",)),
    "empty": ("", ("mapping",)),
    "not YAML": ("bits: [4\n", ("line",)),
    "a tab": ("bits:\t- 4\n\t- x", ("line",)),
    "not UTF-8": (b"bits: 4 # \xff", ("utf-8",)),
    "python object": ("!!python/object/apply:os.system ['true']", ("constructor",)),
    "bad date": ("bits: 2026-99-99\n", ("month",)),
    "nested deeply": ("[" * 1500, ("nested",)),
    "impossible value": ("bits: 20\n", ("20", "16")),
    "unknown choice": ("bits: 4\nlevels: golden\n", ("golden",)),
    "duplicate meaning": ("bits: 4\ngroup-size: 32\ngroup_size: 64\n", ("group_size", "twice")),
    "missing": (None, ("No such file",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_bad_recipe(case: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = RECIPES[case]
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(errors.RecipeError, lambda: load_recipe(file), "recipe.yaml", *words)
    assert cli.main(["quantize", str(tiny_dir), str(out), "--recipe", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "RecipeError"
    no_partial(out)

"""The command line: its options are frozen, stdout is one JSON document, and recipes go round."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import moeq
import moeq_cli
from moeq import cli
from moeq.artifacts import Plan
from moeq.recipe import Recipe

DOCUMENTATION = Path(__file__).parent.parent / "docs" / "json.md"

RECIPE_OPTIONS = (
    "--recipe --method --effort --bits --size --accounting --quantizer --group-size --levels --dense-bits "
    "--calibration --preset --mtp --trust-remote-code --nsamples --seqlen --seed --routing --act-order "
    "--no-act-order --damp --gain --no-gain --compensate --no-compensate --device --plan --costs --cost "
    "--cost-options --unit --candidates --context --round-context --no-round-context --scope --shares --solver "
    "--router --router-epochs --router-lr --tune --quality --no-quality --rank --allocation --tile-options "
    "--progressive --serve"
)
OPTIONS = {
    "plan": f"model --json --quiet --save-plan --workers {RECIPE_OPTIONS}",
    "inspect": "model --json --quiet",
    "measure": f"model output --json --quiet --ray --workers {RECIPE_OPTIONS}",
    "allocate": f"model output --json --quiet --svg {RECIPE_OPTIONS}",
    "pareto": f"model --json --quiet --points --svg {RECIPE_OPTIONS}",
    "export": "form directory output --json --quiet --like --embeddings",
    "imatrix": "model output --json --quiet --calibration --nsamples --seqlen --seed --like --device",
    "repair": "directory output --json --quiet --calibration --nsamples --seqlen --seed --loss --reference --device "
    "--router-epochs --router-lr --tune",
    "quantize": f"model output --json --quiet --resume --save-recipe --ray --workers {RECIPE_OPTIONS}",
    "eval": "model --json --quiet --text --reference --pairs --seqlen --max-tokens --batch-size --device "
    "--trust-remote-code --preset --tasks --num-fewshot --limit --task-path --chat-template "
    "--ray --workers",
    "compare": "models --json --quiet --text --reference --pairs --seqlen --max-tokens --batch-size --speed --no-speed "
    "--device --trust-remote-code",
    "report": "directories --json --quiet -o --output --compared",
    "generate": "model prompt --json --quiet --max-new-tokens --temperature --seed --device --trust-remote-code",
    "run": "model --json --quiet --system --max-new-tokens --temperature --seed --device --trust-remote-code",
    "serve": "model --json --quiet --host --port --api-key --served-name --max-new-tokens --running --waiting "
    "--log-requests --device --trust-remote-code",
    "bench": "directory --json --quiet --prompt-tokens --new-tokens --threads --exact-activations --breakdown",
    "verify": "directory --json --quiet --trust-remote-code",
    "push": "directory repo --json --quiet --yes --public",
    "doctor": "--json --quiet",
}
"""Every argument of every verb. Adding one is fine; to rename or remove one breaks scripts of users."""

SMALL = ["--bits", "5", "--group-size", "32", "--quantizer", "minmax", "--device", "cpu"]


@pytest.mark.parametrize("verb", ["quantize", "eval", "serve", "generate"])
def test_no_verb_keeps_code_for_every_shape(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's usual 1024 shapes, comparing candidates of two OLMoE layers took 7.2 GB instead of 2.4."""
    for name in moeq_cli.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "run", lambda args: 0)
    assert moeq_cli.main([verb, *(["no-model", "x"] if verb in ("quantize", "generate") else ["no-model"])]) == 0
    assert {name: os.environ[name] for name in moeq_cli.CACHES} == moeq_cli.CACHES


def run(*words: object, capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    """The one JSON document that a verb prints; nothing else may be on stdout."""
    assert cli.main([*map(str, words), "--json"]) == status
    printed = capsys.readouterr()
    assert "{" not in printed.err
    return json.loads(printed.out)


def documented(section: str) -> set[str]:
    """The fields that docs/json.md names under a heading."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    part = re.split(r"^#+ ", re.split(f"^#+ {section}$", text, flags=re.MULTILINE)[1], flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE))


def check_fields(document: dict[str, Any], verb: str) -> None:
    assert set(document) == documented("Every document") | documented(verb)
    assert (document["verb"], document["json_version"], document["moeq_version"]) == (verb, 1, moeq.__version__)


def subparsers() -> dict[str, argparse.ArgumentParser]:
    actions = moeq_cli.build_parser()._actions
    (choice,) = (action for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(choice.choices)


def test_options_are_frozen() -> None:
    found: dict[str, set[str]] = {}
    for verb, parser in subparsers().items():
        names = [action.option_strings or [action.dest] for action in parser._actions]
        found[verb] = {name for group in names for name in group} - {"-h", "--help"}
    assert found == {verb: set(words.split()) for verb, words in OPTIONS.items()}


def test_every_recipe_field_is_an_option_of_the_same_name() -> None:
    fields = {"--" + name.replace("_", "-") for name in Recipe.__dataclass_fields__} | {"--preset"}
    assert fields == {name for name in RECIPE_OPTIONS.split() if not name.startswith("--no-")} - {"--recipe"}


@pytest.mark.parametrize("verb", OPTIONS)
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in OPTIONS[verb].split())
    assert all(action.help for action in subparsers()[verb]._actions)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moeq {moeq.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["plan"],
        ["plan", "model", "--bits", "three"],
        ["plan", "model", "--bit", "3"],
        ["quantize", "model"],
        ["quantize", "model", "out", "--nsamples", "1.5"],
        ["compare", "model"],
        ["verify", "a", "b"],
    ],
)
def test_wrong_arguments_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--json"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: moeq" in printed.err


@pytest.mark.parametrize("verb", [verb for verb in OPTIONS if verb != "doctor"])
def test_a_failure_exits_with_1_and_a_document(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nothing"
    rest = {
        "plan": ["--bits", "3"],
        "measure": [tmp_path / "costs", "--cost", "weight-error", "--unit", "matrix"],
        "allocate": [tmp_path / "plan", "--bits", "3"],
        "pareto": ["--costs", missing, "--method", "gemq"],
        "export": [tmp_path / "out"],
        "imatrix": [tmp_path / "out", "--calibration", missing],
        "repair": [tmp_path / "out", "--calibration", missing],
        "quantize": [tmp_path / "out", "--bits", "3"],
        "eval": ["--text", missing],
        "compare": ["--text", missing],
        "generate": ["Once"],
        "push": ["me/name"],
    }
    first = ["compressed-tensors"] if verb == "export" else []
    document = run(verb, *first, missing, *rest.get(verb, []), capsys=capsys, status=1)
    assert set(document) == {"verb", "json_version", "error", "message"}
    assert document["error"] == ("PackedError" if verb in ("verify", "report", "export", "push") else "CheckpointError")
    assert str(missing) in document["message"]
    assert cli.main([verb, *first, str(missing), *map(str, rest.get(verb, []))]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"moeq {verb}: {document['message']}\n")


def test_plan(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--bits", "3.5", "--calibration", "none", "--dense-bits", "attention=4,lm_head=16")
    document = run("plan", demo_dir, *words, capsys=capsys)
    check_fields(document, "plan")
    assert document["quantizer"] == "hqq"
    assert document["expert_bits_per_weight"] <= 3.5
    assert sum(document["allocation"].values()) == 4 * 16 * 3
    assert set(document["families"]) == {"experts", "attention", "lm_head", "other"}
    assert all(set(family) == documented("Family") for family in document["families"].values())
    assert document["quantized"] == ["experts", "attention"]
    assert any("gptq" in warning for warning in document["warnings"])


def test_inspect(demo_dir: Path, packed_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, packed = (run("inspect", path, capsys=capsys) for path in (demo_dir, packed_demo))
    for document in (source, packed):
        check_fields(document, "inspect")
        assert document["stored_bytes"] > sum(family["bytes"] for family in document["families"].values()) > 0
    same = (
        "model_type",
        "architecture",
        "model_hash",
        "layers",
        "experts_per_layer",
        "parameters",
        "expert_parameters",
    )
    assert [source[name] for name in same] == [packed[name] for name in same]
    assert (source["packed"], source["plan_hash"], source["method"]) == (False, None, None)
    assert (packed["packed"], packed["method"]) == (True, "uniform")
    assert packed["expert_bits_per_weight"] <= 3.7 < source["expert_bits_per_weight"] == 16


def test_quantize_verify_and_the_card(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    document = run("quantize", tiny_dir, out, *SMALL, capsys=capsys)
    check_fields(document, "quantize")
    assert document["output"] == str(out)
    assert document["directory_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert document["stored_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert document["tokens_per_expert"] is None
    assert "moeq eval" in document["quality_note"]
    assert set(document["seconds"]) == {"allocate", "pack", "tune", "verify", "quality"}
    verified = run("verify", out, capsys=capsys)
    check_fields(verified, "verify")
    assert set(document["verified"]) == documented("verify")
    assert verified["decoded"] == 3 * 4 * 3
    command = " ".join(["moeq", "quantize", str(tiny_dir), str(out), *SMALL])
    assert command in (out / "README.md").read_text(encoding="utf-8")
    assert "--json" not in (out / "README.md").read_text(encoding="utf-8")


def test_quantize_with_calibration(
    tiny_dir: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--bits", "5", "--group-size", "32", "--device", "cpu", "--nsamples", "4", "--seqlen", "32"]
    document = run("quantize", tiny_dir, tmp_path / "out", *words, "--calibration", calibration_text, capsys=capsys)
    check_fields(document, "quantize")
    assert document["quantizer"] == "trellis"
    tokens = document["tokens_per_expert"]
    assert set(tokens) == {"min", "median", "max", "without_tokens", "layers"}
    assert [sum(layer) for layer in tokens["layers"]] == [4 * 32 * 2] * 3
    assert set(document["quality"]) == documented("Metrics") - {"blimp"} | {"tokens"}
    assert document["quality_note"] is None


def test_eval(tiny_dir: Path, packed_tiny: Path, text_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text", text_dir / "eval.txt", "--seqlen", "32", "--max-tokens", "128", "--device", "cpu"]
    alone = run("eval", packed_tiny, *words, capsys=capsys)
    assert set(alone) == documented("Every document") | documented("eval") | {"perplexity"}
    compared = run("eval", packed_tiny, *words, "--reference", tiny_dir, capsys=capsys)
    assert set(compared) == documented("Every document") | documented("eval") | documented("Metrics") - {"blimp"}
    assert compared["tokens"] == alone["tokens"] == 4 * 31
    assert compared["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert compared["reference"] == str(tiny_dir)
    assert 0 < compared["kl"] < 1
    assert 0.3 < compared["top1_agreement"] < 1
    assert 0.3 < compared["router_overlap"] < 1


def test_eval_of_a_model_against_itself(tiny_dir: Path, text_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text", text_dir / "eval.txt", "--seqlen", "32", "--max-tokens", "64", "--reference", tiny_dir]
    document = run("eval", tiny_dir, *words, "--device", "cpu", capsys=capsys)
    assert document["kl"] == pytest.approx(0, abs=1e-6)
    assert (document["top1_agreement"], document["router_overlap"]) == (1, 1)


def test_eval_with_pairs(tiny_dir: Path, text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = (text_dir / "blimp.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    pairs.write_text("\n".join(lines), encoding="utf-8")
    words = ["--text", text_dir / "eval.txt", "--seqlen", "32", "--max-tokens", "64", "--pairs", pairs]
    document = run("eval", tiny_dir, *words, "--device", "cpu", capsys=capsys)
    assert set(document) == documented("Every document") | documented("eval") | {"perplexity", "blimp"}
    assert document["provenance"]["blimp"]["pairs"] == 3


def test_generate(packed_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", packed_tiny, "The history of", "--max-new-tokens", "5", "--device", "cpu"]
    document = run(*words, capsys=capsys)
    check_fields(document, "generate")
    assert 1 <= document["new_tokens"] <= 5
    assert run(*words, "--temperature", "0", capsys=capsys)["continuation"] == document["continuation"]
    sampled = [run(*words, "--temperature", "1.5", "--seed", seed, capsys=capsys)["continuation"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert run(*words[:2], "", capsys=capsys, status=1)["error"] == "OptionError"


def test_bench(packed_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", packed_tiny, "--prompt-tokens", "9", "--new-tokens", "3", "--threads", "1"]
    document = run(*words, capsys=capsys)
    check_fields(document, "bench")
    assert (document["threads"], document["prefill_tokens"], document["decode_tokens"]) == (1, 9, 3)
    assert 0 < document["expert_bytes_per_token"] < document["bytes_per_token"]
    assert sum(document["shares"].values()) == pytest.approx(1)
    assert min(document["shares"].values()) > 0
    for option in ("--prompt-tokens", "--new-tokens", "--threads"):
        assert run(*words[:2], option, "0", capsys=capsys, status=1)["error"] == "OptionError"
    assert "too long" not in run(*words[:2], "--prompt-tokens", 10**7, capsys=capsys, status=1)["message"]
    assert document["breakdown"] == []
    parts = run(*words, "--breakdown", capsys=capsys)["breakdown"]
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    attention = next(part for part in parts if part["module"] == "model.layers.*.self_attn.q_proj")
    layers = json.loads((packed_tiny / "config.json").read_text())["num_hidden_layers"]
    assert attention["calls"] == layers
    assert attention["milliseconds"] > 0
    assert cli.main([*map(str, words), "--exact-activations", "--breakdown"]) == 0
    text = capsys.readouterr().out
    assert "tokens/s" in text
    assert "model.layers.*.self_attn.q_proj" in text


def test_text_output(demo_dir: Path, packed_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(demo_dir), "--bits", "3.5"]) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert cli.main(["inspect", str(packed_demo)]) == 0
    assert "packed by moeq" in capsys.readouterr().out
    assert cli.main(["verify", str(packed_demo)]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_a_recipe_goes_out_and_in_again(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (tmp_path / name / "out" for name in "abc")
    recipe, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"
    run("quantize", tiny_dir, first, *SMALL, "--dense-bits", "8", "--save-recipe", recipe, capsys=capsys)
    assert set(yaml.safe_load(recipe.read_text(encoding="utf-8"))) == set(Recipe.__dataclass_fields__)
    run("quantize", tiny_dir, second, "--recipe", recipe, "--save-recipe", again, capsys=capsys)
    assert again.read_bytes() == recipe.read_bytes()
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        if name != "README.md":  # it quotes the command
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    short = tmp_path / "short.yaml"
    short.write_text("bits: 5\ngroup-size: 32\nquantizer: minmax\ndense_bits: 8\ndevice: cpu\n", encoding="utf-8")
    run("quantize", tiny_dir, third, "--recipe", short, capsys=capsys)
    assert (third / "moeq.json").read_bytes() == (first / "moeq.json").read_bytes()


def test_the_command_line_wins_over_the_recipe(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Recipe(bits=5, group_size=32, calibration="none").to_yaml(), encoding="utf-8")
    plain = run("plan", tiny_dir, "--recipe", recipe, capsys=capsys)
    wider = run("plan", tiny_dir, "--recipe", recipe, "--bits", "6.5", capsys=capsys)
    assert plain["expert_bits_per_weight"] <= 5 < wider["expert_bits_per_weight"] <= 6.5
    sized = run("plan", tiny_dir, "--recipe", recipe, "--size", "250KB", capsys=capsys)
    assert sized["stored_bytes"] < 250_000
    empty = tmp_path / "empty.yaml"
    empty.write_text("group_size: 32\ncalibration: none\nbits:\n", encoding="utf-8")
    assert run("plan", tiny_dir, "--recipe", empty, "--bits", "5", capsys=capsys)["plan_hash"] == plain["plan_hash"]
    assert run("plan", tiny_dir, "--recipe", empty, capsys=capsys, status=1)["error"] == "OptionError"


def test_a_plan_goes_out_and_in_again(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    planned = run("plan", tiny_dir, *SMALL, "--dense-bits", "6", "--save-plan", file, capsys=capsys)
    assert Plan.load(file).hash == planned["plan_hash"]
    words = ["--plan", file, "--quantizer", "minmax", "--device", "cpu"]
    document = run("quantize", tiny_dir, tmp_path / "out", *words, capsys=capsys)
    for name in ("plan_hash", "stored_bytes", "expert_bytes", "families"):
        assert document[name] == planned[name], name
    assert Plan.load(tmp_path / "out" / "moeq_plan.json").hash == planned["plan_hash"]


@pytest.mark.parametrize("option", ["--save-plan", "--save-recipe"])
def test_where_nothing_can_be_saved(
    option: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["plan", tiny_dir] if option == "--save-plan" else ["quantize", tiny_dir, tmp_path / "out"]
    for file in (tmp_path / "nothing" / "file", tmp_path):
        document = run(*verb, *SMALL, option, file, capsys=capsys, status=1)
        assert document["error"] == "OutputError"
        assert f"option {option[2:]}" in document["message"]
    assert not (tmp_path / "out").exists(), "found out before the work"


def test_a_real_process(tiny_dir: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moeq.cli", "quantize", str(tiny_dir), str(tmp_path / "out"), *SMALL, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_fields(json.loads(done.stdout), "quantize")
    assert "writing files" in done.stderr


def test_nothing_but_a_typed_error_leaves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dir: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("moeq.stages.inspect.run", broken)
    assert cli.main(["inspect", str(tiny_dir), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "InternalError"
    assert "ZeroDivisionError: division by zero" in err.splitlines()[-1]
    assert "doctor" in err

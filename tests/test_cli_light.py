"""The command `moeq` before there is anything to do: it loads nothing, suggests, completes, and can be interrupted."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moeq_cli
from moeq_cli.args import EXAMPLES, build_parser

LOADED = """
import sys
from moeq_cli import main
try:
    main({words!r})
except SystemExit as stop:
    heavy = {{"moeq", "torch", "transformers", "numpy", "scipy", "safetensors"}} & set(sys.modules)
    print(stop.code, sorted(heavy), len(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["quantize", "--help"], 0),
        (["--print-completion", "bash"], 0),
        (["quantise"], 2),
        (["plan", "model", "--bits", "three"], 2),
    ],
)
def test_nothing_heavy_is_loaded(words: list[str], status: int) -> None:
    code = LOADED.format(words=words)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = run.stderr.splitlines()[-1]
    assert said.startswith(f"{status} []"), run.stderr
    assert int(said.split()[-1]) < 400, "modules, Python's own included"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantise", "a", "b"], "moeq: VERB 'quantise' is not known; did you mean quantize?"),
        (["frobnicate"], "moeq: VERB 'frobnicate' is not known; choose one of plan, inspect, quantize"),
        (["plan", "model", "--bit", "3"], "moeq plan: there is no option --bit; did you mean --bits?"),
        (
            ["plan", "model", "--calibraton=x"],
            "no option --calibraton; did you mean --calibration?",
        ),
        (["plan", "model", "--zzzzzz"], "moeq plan: there is no option --zzzzzz\n"),
        (["verify", "a", "b"], "moeq verify: 'b' is one argument too many"),
        (["plan", "model", "--bits", "three"], "moeq plan: argument --bits: invalid float value: 'three'"),
        (["quantize", "model"], "moeq quantize: the following arguments are required: output"),
        (["repair", "a", "b"], "moeq repair: the following arguments are required: --calibration"),
        (["repair", "a", "b", "--calibration", "c", "--tune", "modle"], "did you mean model?"),
    ],
)
def test_a_mistake_is_two_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        moeq_cli.main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 2
    assert "usage: moeq" in printed.err


def test_every_verb_has_an_example_that_parses() -> None:
    import shlex

    parser = build_parser()
    assert set(EXAMPLES) == set(parser.verbs)
    for verb, example in EXAMPLES.items():
        words = shlex.split(example)
        assert words[:2] == ["moeq", verb]
        parser.parse_args(words[1:])


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        moeq_cli.main(["--print-completion", shell])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert "quantize" in script
    assert "--calibration" in script


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "import sys; from moeq_cli import main; sys.exit(main())", *map(str, words)]


def test_ctrl_c_while_it_loads(tiny_dir: Path) -> None:
    run = subprocess.Popen(command("plan", tiny_dir, "--bits", "5"), stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)  # Python is up and torch is not
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (130, "interrupted\n")


SMALL = ("--bits", "5", "--group-size", "32", "--quantizer", "minmax", "--device", "cpu")


@pytest.mark.nightly
def test_without_a_terminal_there_are_lines(tiny_dir: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        command("quantize", tiny_dir, tmp_path / "a", *SMALL), capture_output=True, text=True, check=True
    )
    assert re.search(r"^writing files: 1 of \d+, peak memory \d", run.stderr, re.MULTILINE)
    assert "\r" not in run.stderr
    assert "Loading" not in run.stderr
    quiet = subprocess.run(
        command("quantize", tiny_dir, tmp_path / "b", *SMALL, "--quiet"), capture_output=True, text=True, check=True
    )
    assert quiet.stderr == ""
    assert "wrote" in quiet.stdout


def test_on_a_terminal_there_is_one_display(tiny_dir: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = command("quantize", tiny_dir, tmp_path / "a", *SMALL)
    run = subprocess.Popen(words, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    said = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 120)
        assert ready, "it hangs"
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        said += part
    assert run.wait() == 0
    text = said.decode()
    assert "writing files" in text
    assert "verifying" in text
    assert "peak" in text
    assert "Loading weights" not in text

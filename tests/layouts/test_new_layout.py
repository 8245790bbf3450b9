"""A layout that moeq does not have: its own package, a name in `LAYOUTS` and a method that uses it are all it takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moeq

HERE = Path(__file__).parent
USE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, {copy!r})
import moeq
from moeq import cli

assert moeq.__file__.startswith({copy!r}), moeq.__file__
words = "--method reversed --quantizer rtn --levels sym --group-size 32 --bits 3.9 --device cpu".split()
for command in (
    ["plan", {model!r}, *words],
    ["quantize", {model!r}, {out!r}, *words],
    ["verify", {out!r}],
    ["inspect", {out!r}],
    ["generate", {out!r}, "The old man", "--max-new-tokens", "2"],
):
    assert cli.main(command) == 0, command
found = moeq.evaluate({out!r}, {text!r}, reference={model!r}, seqlen=64, max_tokens=256)
assert 0 < found.metrics["kl"] < 0.2, found.metrics
"""


@pytest.mark.filterwarnings("default")
def test_a_layout_is_a_package_and_a_line(demo_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "src" / "moeq"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(moeq.__file__).parent, copy, ignore=ignored)
    shutil.copytree(HERE / "reversed", copy / "layouts" / "reversed", ignore=ignored)
    for file, old, new in (
        ("spec.py", "LAYOUTS = (", 'LAYOUTS = ("reversed", '),
        ("methods.py", "METHODS = {", 'METHODS = {"reversed": Method(unit="none", layout="reversed"),'),
    ):
        text = (copy / file).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    out = tmp_path / "packed"
    script = USE.format(copy=str(copy.parent), model=str(demo_dir), out=str(out), text=str(text_dir / "eval.txt"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"layout":"reversed"' in (out / "moeq.json").read_text(encoding="utf-8")

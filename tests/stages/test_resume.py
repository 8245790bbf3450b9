"""A run that is killed with SIGKILL goes on with --resume and ends in the same bytes."""

import hashlib
import signal
from pathlib import Path

import pytest

import fresh
from moeq.errors import ResumeError
from moeq.recipe import Recipe
from moeq.stages import quantize

KILLED_RUN = """
import os, signal, sys
import moeq
from moeq.recipe import Recipe
from moeq.stages import quantize

model, out, calibration, quantizer, point = sys.argv[1:]
events = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def progress(what, done, total):
    if f"{what}:{done}" == point:
        die()

if point.startswith("write:"):
    left = int(point.removeprefix("write:"))
    plain = os.write
    def write(file, data):
        global left
        left -= len(data)
        if left < 0:
            plain(file, data[: max(1, len(data) // 2)])
            die()
        return plain(file, data)
    os.write = write

recipe = Recipe(bits=3, quantizer=quantizer, calibration=calibration, nsamples=6, seqlen=64, dense_bits="8")
quantize.run(model, out, recipe, progress=progress)
"""

POINTS = {
    "hqq": ("shards:1", "shards:3", "write:2700000", "shards:5", "verify:0"),
    "gptq": ("shards:1", "packing:1", "write:2900000", "packing:3", "verify:0"),
}


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def recipe(quantizer: str, calibration: Path) -> Recipe:
    return Recipe(bits=3, quantizer=quantizer, calibration=str(calibration), nsamples=6, seqlen=64, dense_bits="8")


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [pytest.param("hqq", marks=pytest.mark.nightly), "gptq"])
def test_killed_at_five_points(quantizer: str, demo_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    quantize.run(demo_dir, whole, recipe(quantizer, calibration_text))
    wanted = hashes(whole)
    for point in POINTS[quantizer]:
        out = tmp_path / point.replace(":", "-") / "whole"
        out.parent.mkdir()
        words = [str(demo_dir), str(out), str(calibration_text), quantizer, point]
        run = fresh.run(KILLED_RUN, *words)
        assert run.returncode == -signal.SIGKILL, (point, run.stderr[-2000:])
        assert not out.exists(), point
        with pytest.raises(ResumeError, match="--resume"):
            quantize.run(demo_dir, out, recipe(quantizer, calibration_text))
        quantize.run(demo_dir, out, recipe(quantizer, calibration_text), resume=True)
        assert hashes(out) == wanted, point
        assert not out.with_name(out.name + ".partial").exists()

"""Runs that end before their time: wrong resumes, a full disk, Ctrl-C. What is left can be resumed, or nothing is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moeq
from hostile import (
    OPTIONS,
    WEIGHTS,
    copy_of,
    edit_json,
    edit_tensors,
    flip,
    no_partial,
    nothing_complete,
    partial_of,
    refused,
)
from moeq import cli, errors
from moeq.checkpoint.journal import JOURNAL_NAME


class StopError(Exception):
    pass


def stop_at(point: str) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if f"{what}:{done}" == point:
            raise StopError

    return progress


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def interrupted(tiny_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and where a run of it stopped after two of its four shards."""
    source, out = copy_of(tiny_dir, tmp_path / "source"), tmp_path / "out"
    with pytest.raises(StopError):
        moeq.quantize(source, out, progress=stop_at("shards:2"), **OPTIONS)
    nothing_complete(out)
    assert len(json.loads((partial_of(out) / JOURNAL_NAME).read_bytes())["finished"]) == 2
    return source, out


def test_any_exception_leaves_a_run_that_can_be_resumed(
    interrupted: tuple[Path, Path], tiny_dir: Path, tmp_path: Path
) -> None:
    source, out = interrupted
    refused(
        errors.ResumeError, lambda: moeq.quantize(source, out, **OPTIONS), "--resume", str(partial_of(out)), out=out
    )
    moeq.quantize(source, out, resume=True, **OPTIONS)
    moeq.quantize(source, tmp_path / "again" / "out", **OPTIONS)
    assert contents(out) == contents(tmp_path / "again" / "out")
    assert not partial_of(out).exists()


OTHER_OPTIONS = {
    "bits": ({"bits": 5.5}, "option bits was 5.0, is 5.5"),
    "quantizer": ({"quantizer": "rtn"}, "option quantizer was minmax, is rtn"),
    "dense bits": ({"dense_bits": "8"}, "option dense_bits was 16, is 8"),
    "seed": ({"seed": 3}, "option seed was 0, is 3"),
}


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_resume_with_another_option(option: str, interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    changes, words = OTHER_OPTIONS[option]
    before = contents(partial_of(out))
    call = lambda: moeq.quantize(source, out, resume=True, **{**OPTIONS, **changes})  # noqa: E731
    refused(errors.ResumeError, call, words, out=out)
    assert contents(partial_of(out)) == before, "the unfinished run must survive the mistake"


def bump(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][0, 0] += 1


INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda source: edit_tensors(source, bump), WEIGHTS),
    "config": (lambda source: edit_json(source / "config.json", lambda data: data.update(rms_norm_eps=1e-5)), "config"),
    "time": (lambda source: os.utime(source / WEIGHTS, ns=(0, 0)), "modification time"),
}


@pytest.mark.parametrize("change", INPUTS)
def test_resume_with_another_input(change: str, interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    INPUTS[change][0](source)
    call = lambda: moeq.quantize(source, out, resume=True, **OPTIONS)  # noqa: E731
    refused(errors.ResumeError, call, INPUTS[change][1], "changed", out=out)


def test_resume_with_another_version(interrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = interrupted
    monkeypatch.setattr("moeq.writing.packing.__version__", "9.9.9")
    call = lambda: moeq.quantize(source, out, resume=True, **OPTIONS)  # noqa: E731
    refused(errors.ResumeError, call, "moeq version was", "9.9.9", out=out)


JOURNALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "empty": (lambda journal: journal.write_bytes(b""), ("damaged",)),
    "garbage": (lambda journal: journal.write_bytes(os.urandom(200)), ("damaged",)),
    "truncated": (lambda journal: journal.write_bytes(journal.read_bytes()[:-30]), ("damaged",)),
    "of the future": (lambda journal: edit_json(journal, lambda data: data.update(format_version=2)), ("version 2",)),
    "leads elsewhere": (
        lambda journal: edit_json(journal, lambda data: data["finished"].update({"../x": {"bytes": 1, "sha256": ""}})),
        ("../x",),
    ),
}


@pytest.mark.parametrize("damage", JOURNALS)
def test_damaged_journal(damage: str, interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    change, words = JOURNALS[damage]
    change(partial_of(out) / JOURNAL_NAME)
    call = lambda: moeq.quantize(source, out, resume=True, **OPTIONS)  # noqa: E731
    refused(errors.ResumeError, call, JOURNAL_NAME, *words, out=out)


def test_a_finished_shard_was_changed_or_removed(interrupted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = interrupted
    shard = next(partial_of(out).glob("model-00001*"))
    flip(shard, -1)
    call = lambda: moeq.quantize(source, out, resume=True, **OPTIONS)  # noqa: E731
    refused(errors.ResumeError, call, shard.name, "remove it", out=out)
    shard.unlink()
    moeq.quantize(source, out, resume=True, **OPTIONS)
    assert moeq.verify(out).logits_finite


def test_resume_without_a_run_begins_one(tiny_dir: Path, tmp_path: Path) -> None:
    assert moeq.quantize(tiny_dir, tmp_path / "out", resume=True, **OPTIONS).verified.logits_finite


def test_a_partial_directory_of_somebody_else(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial_of(out).mkdir()
    (partial_of(out) / "mine").write_text("mine", encoding="utf-8")
    refused(errors.ResumeError, lambda: moeq.quantize(tiny_dir, out, **OPTIONS), "files of something else")
    assert (partial_of(out) / "mine").read_text(encoding="utf-8") == "mine"


def test_the_output_appears_while_we_work(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def occupy(what: str, done: int, total: int) -> None:
        if what == "verify" and not done:
            out.mkdir()
            (out / "mine").touch()

    def run(**options: Any) -> object:
        return moeq.quantize(tiny_dir, out, **options, **OPTIONS)

    refused(errors.StorageError, lambda: run(progress=occupy), str(out), "--resume")
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    run(resume=True)
    assert moeq.verify(out).logits_finite


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "moeq", str(disk)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, left: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - left))
    return filler


@pytest.mark.parametrize("point", ["shards:1", "shards:3", "verify:0"])
def test_disk_full_on_the_way(point: str, small_disk: Path, tiny_dir: Path, tmp_path: Path) -> None:
    out = small_disk / "out"

    def progress(what: str, done: int, total: int) -> None:
        if f"{what}:{done}" == point:
            fill(small_disk, 0)

    call = lambda: moeq.quantize(tiny_dir, out, progress=progress, **OPTIONS)  # noqa: E731
    error = refused(errors.StorageError, call, "the disk is full", str(out) + ".partial", "free ", out=out)
    assert error.file is not None
    assert (partial_of(out) / JOURNAL_NAME).exists()
    (small_disk / "filler").unlink()
    moeq.quantize(tiny_dir, out, resume=True, **OPTIONS)
    moeq.quantize(tiny_dir, tmp_path / "out", **OPTIONS)
    assert contents(out) == contents(tmp_path / "out")


def test_disk_too_small_from_the_start(small_disk: Path, tiny_dir: Path) -> None:
    fill(small_disk, 100 * 1024)
    call = lambda: moeq.quantize(tiny_dir, small_disk / "out", **OPTIONS)  # noqa: E731
    refused(errors.StorageError, call, "bytes free", "write elsewhere")
    no_partial(small_disk / "out")


def test_disk_full_at_the_first_byte(small_disk: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.writing.directory._check_space", lambda *_: fill(small_disk, 0))
    call = lambda: moeq.quantize(tiny_dir, small_disk / "out", **OPTIONS)  # noqa: E731
    refused(errors.StorageError, call, "the disk is full")
    no_partial(small_disk / "out")


def test_ctrl_c_on_the_command_line(demo_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Without data the run would be over before the signal arrives.
    words = ["quantize", str(demo_dir), str(out), "--bits", "3.7", "--quantizer", "gptq", "--device", "cpu"]
    words += ["--effort", "fast", "--calibration", str(calibration_text), "--nsamples", "32", "--seqlen", "128"]
    with subprocess.Popen(
        [sys.executable, "-m", "moeq.cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        # Shells start what runs in the background deaf to this signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as run:
        journal = partial_of(out) / JOURNAL_NAME
        while run.poll() is None and not (journal.exists() and json.loads(journal.read_bytes())["finished"]):
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, printed = run.communicate(timeout=60)
    assert run.returncode == 130, printed
    assert "Traceback" not in printed
    assert "--resume" in printed
    nothing_complete(out)
    assert cli.main([*words, "--resume"]) == 0
    assert moeq.verify(out).logits_finite
    assert not partial_of(out).exists()

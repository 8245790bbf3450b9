"""`moeq doctor` says what is right, what is wrong, and nothing about whose machine it is."""

import getpass
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeq
from moeq import cli, native
from moeq.layouts import selftest, trust
from moeq.layouts.grouped import gpu
from moeq.stages import doctor
from test_cli import check_fields, documented

needs_native = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Small buffers, and a cache of its own."""
    monkeypatch.setattr(doctor, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = trust.cache_directory()
    trust.forget()
    trust.keep_verdicts_in(tmp_path / "moeq")
    yield
    trust.keep_verdicts_in(before)
    trust.forget()


@needs_native
def test_the_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    check_fields(document, "doctor")
    assert set(document["devices"][0]) == documented("Device")
    assert set(document["routes"][0]) == documented("Route")
    assert set(document["checks"][0]) == documented("Check")
    assert document["ok"] is True
    assert document["failures"] == []
    cpu = document["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["read_bandwidth"] > 1e6
    assert cpu["copy_bandwidth"] > 1e6
    assert {route["path"] for route in document["routes"] if route["device"] == "cpu"} == {"native"}
    assert [check["subject"] for check in document["checks"] if check["device"] == "cpu"] == list(selftest.SUBJECTS)
    assert document["cache_works"] is True
    for private in (str(tmp_path), str(Path.home()), platform.node()):
        assert private not in text
    names = {getpass.getuser(), Path.home().name} - {"root", ""}
    assert not [name for name in names if f'"{name}"' in text or f"/{name}" in text]


@needs_native
def test_the_text_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "ok: all compiled paths answer rightly" in printed
    for name in ("moeq", "torch", "native grouped", "its self-test passed"):
        assert name in printed


@needs_native
def test_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "experts", zeros_like_inputs)
        assert cli.main(["doctor"]) == 1
        shown = capsys.readouterr()
        assert cli.main(["doctor", "--json"]) == 1
        printed = capsys.readouterr()
    assert "WRONG" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 100
    assert "moeq doctor: native grouped on cpu" in shown.err
    document = json.loads(printed.out)
    check_fields(document, "doctor")
    assert document["ok"] is False
    assert "native grouped on cpu" in document["failures"][0]
    paths = {route["layers"]: route["path"] for route in document["routes"] if route["device"] == "cpu"}
    assert paths["grouped"] == paths["tiled"] == "torch"  # tiled layers without factors are grouped ones
    assert paths["linear"] == paths["spectral"] == "native"
    assert not trust.recheck("native", torch.device("cpu"))[0].failure
    assert cli.main(["doctor"]) == 0  # and the verdict is taken back


def zeros_like_inputs(_data: Tensor, _table: Tensor, _inner: int, x_TH: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(x_TH)


def test_without_anything_compiled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(gpu, "AVAILABLE", False)
    monkeypatch.setattr(trust, "installed", lambda name: "none" if name == "triton" else "1")
    report = moeq.doctor()
    assert report.ok
    assert report.native is False
    assert report.versions["triton"] is None
    assert not report.checks
    assert {route.path for route in report.routes} == {"torch"}
    assert report.devices[0].read_bandwidth is None
    assert report.devices[0].copy_bandwidth
    assert cli.main(["doctor"]) == 0
    assert "torch computes everything" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME")
    trust.keep_verdicts_in(tmp_path / "file")
    report = moeq.doctor()
    assert report.ok
    assert report.cache_works is False

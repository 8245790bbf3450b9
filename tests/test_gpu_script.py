"""benchmarks/gpu.py, as far as it goes without a GPU."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeq.layouts.spectral.shape import Form, blob_bytes
from moeq.spec import QuantSpec, stored_bytes

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu_")]:
        del sys.modules[name]


@pytest.mark.parametrize("shape", [(2048, 768, 128), (2048, 1024, 64), (4096, 14336, 8), (128, 128, 2)])
def test_dropped_components_fit_the_bytes(shape: tuple[int, int, int]) -> None:
    """The last try of a bisection need not fit: at Qwen3-30B's shape it was 704 bytes too many, and the run stopped."""
    import gpu_layouts

    hidden, inner, num_experts = shape
    budget = 3 * num_experts * stored_bytes(QuantSpec(bits=3), (inner, hidden))
    slabs = {b: QuantSpec(bits=b, levels="half" if b <= 2 else "sym", layout="spectral") for b in (2, 3, 4)}
    form = Form(basis_bits=8, joint=True, slabs=slabs)
    rng = np.random.default_rng(0)
    names = ("gate", "up", "down")
    draws = {name: rng.choice(np.array([2, 3, 4], dtype=np.uint8), (num_experts, hidden)) for name in names}
    ranks = {name: rng.random((num_experts, hidden)) for name in names}
    found = gpu_layouts.dropped(draws, ranks, lambda widths: blob_bytes(form, widths, hidden, inner), budget)
    size = blob_bytes(form, found, hidden, inner)
    assert size <= budget
    assert size >= (1 - gpu_layouts.BYTES_TOLERANCE) * budget or shape == (128, 128, 2)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_every_part_runs(tmp_path: Path) -> None:
    """With a GPU that is not there, and kernels that run from what their compiler makes of them."""
    pytest.importorskip("triton")
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=500)
    rows = rows_of(tmp_path)
    assert done.returncode == 0, [row for row in rows if "failed" in row or row.get("ok") is False] or done.stderr[
        -2000:
    ]
    import gpu

    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert all(row.get("error", 0) < 0.05 for row in rows if row["part"] in ("end to end", "layers"))
    assert "## Packing" in (tmp_path / "gpu.md").read_text()


def board(tmp_path: Path) -> Any:
    import gpu

    return gpu.Board(output=tmp_path, where="nowhere", command="a test", smoke=False)


def test_a_part_that_raises_is_a_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_checks

    def breaks(**_: Any) -> Iterator[dict[str, Any]]:
        yield {"what": "first"}
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_checks, "selftest_rows", breaks)
    monkeypatch.setattr(gpu_checks, "test_rows", lambda **_: iter([{"what": "a test", "ok": True}]))
    kept = board(tmp_path)
    gpu.run(kept, ["selftest", "tests"], 60.0, {})
    first, second, third = rows_of(tmp_path)
    assert first == {"part": "selftest", "what": "first"}
    assert "illegal memory access" in second["failed"]
    assert third["ok"] is True
    page = (tmp_path / "gpu.md").read_text()
    assert "no native test fails" in page
    assert "illegal memory access" in page


def test_parts_get_their_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_checks

    ends: list[float] = []

    def notes(until: float) -> Iterator[dict[str, Any]]:
        ends.append(until - time.monotonic())
        return iter([{"what": "out of time", "skipped": "out of time"}])

    monkeypatch.setattr(gpu_checks, "selftest_rows", notes)
    monkeypatch.setattr(gpu_checks, "test_rows", notes)
    gpu.run(board(tmp_path), ["selftest", "tests"], 30.0, {})
    assert ends == [pytest.approx(10, abs=1), pytest.approx(30, abs=1)]


def test_targets_are_judged_by_the_rows(tmp_path: Path) -> None:
    kept = board(tmp_path)
    common = {"shape": "Mixtral", "bits": "3", "packed us": 10.0}
    kept.add("layers", common | {"what": "a", "tokens": 1, "of copy": 0.7, "speed-up": 2.0})
    kept.add("layers", common | {"what": "b", "tokens": 8, "of copy": 0.5, "speed-up": 0.9})
    mixed = {"bits": "mixed 2, 3, 4", "packed us": 10.5, "what": "c", "tokens": 8, "of copy": 0.6, "speed-up": 1.5}
    kept.add("layers", common | mixed)
    verdicts = {words: verdict for words, _, verdict in kept.verdicts()}
    assert verdicts["decoding reads at least 60 % of the copy bandwidth (Mixtral, 1 to 8 tokens)"] == "2 of 3 met"
    assert verdicts["the mixed plan is at least 90 % as fast as 3 bits"] == "met"
    assert verdicts["no self-test fails"] == "not measured"


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    for words in (["--only", "nothing"], ["--all"], []):
        command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--output", str(tmp_path / "out"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr

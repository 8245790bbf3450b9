"""Are the kernels right on this GPU? The self-tests, and those native tests that matter, for benchmarks/gpu.py."""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as Tree
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/layouts/test_grouped_gpu.py::test_experts_of_mixed_widths",
    "tests/layouts/test_grouped_gpu.py::test_linear_of_every_dtype",
    "tests/layouts/test_grouped_gpu.py::test_experts_with_many_tokens_are_decoded_once",
    "tests/layouts/test_grouped_gpu.py::test_a_family_with_biases_and_a_gate_of_its_own",
    "tests/layouts/test_gpu_rows.py::test_components_of_every_width",
    "tests/layouts/test_gpu_rows.py::test_tiles",
    "tests/layouts/test_gpu_rows.py::test_nothing_waits_for_the_host",
    "tests/layouts/test_gpu_codebooks.py::test_experts",
    "tests/layouts/test_gpu_trellis.py::test_experts",
)
"""Not the whole suite: every case costs compilations."""
SMOKE_TESTS = TESTS[:1]
SMOKE_SUBJECTS = ("decode", "linear")
"""tests/layouts/test_gpu_selftest.py runs all."""


def selftest_rows(device: torch.device, *, smoke: bool, quick: bool, until: float) -> Iterator[dict[str, Any]]:
    """What a process runs before it believes a kernel (`moeq doctor`)."""
    from moeq.layouts import selftest

    for path, place in (("triton", device), ("native", torch.device("cpu"))):
        wanted = tuple(s for s in selftest.subjects(path, place) if not smoke or s in SMOKE_SUBJECTS)
        if not wanted:
            yield {"what": path, "skipped": "there are no such kernels on this machine"}
        for subject in wanted:
            if time.monotonic() > until:
                yield {"what": path, "skipped": "out of time"}
                break
            for check in selftest.run(path, place, (subject,)):
                yield {
                    "what": f"{path} {subject}", "ok": check.ok, "error": check.error,
                    "tolerance": check.tolerance, "seconds": check.seconds, "why": check.failure or "",
                }  # fmt: skip


def test_rows(device: torch.device, *, smoke: bool, quick: bool, until: float) -> Iterator[dict[str, Any]]:
    """One process of pytest for each test, so that one that hangs or crashes takes no other along."""
    for name in SMOKE_TESTS if smoke else TESTS:
        left = until - time.monotonic()
        if left < 10:
            yield {"what": name, "skipped": "out of time"}
            continue
        yield from _run(name, left)


def _run(name: str, seconds: float) -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        # Without the project's options: their plugins may not be there.
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
        words += ["-c", os.devnull, f"--rootdir={ROOT}", "-o", "pythonpath=tests", "-W", "ignore"]
        try:
            done = subprocess.run(
                [*words, f"--junitxml={report}", name],
                cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield {"what": name, "skipped": f"not done after {seconds:.0f} s"}
            return
        if not report.is_file():
            yield {"what": name, "failed": f"pytest did not start: {done.stdout[-200:]} {done.stderr[-200:]}"}
            return
        for case in Tree.parse(report).iter("testcase"):  # our own file
            bad = [each for each in case if each.tag in ("failure", "error")]
            skipped = case.find("skipped")
            row: dict[str, Any] = {"what": case.get("name"), "seconds": float(case.get("time", "nan"))}
            if skipped is not None:
                row["skipped"] = skipped.get("message", "")[:200]
            else:
                row["ok"] = not bad
                row["why"] = " ".join(each.get("message", "")[:200] for each in bad)
            yield row

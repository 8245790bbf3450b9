"""Known-answer tests of compiled kernels on the machine where they are about to be used.

Every kernel was tested where it was written; whether this compiler, driver and processor make the same of it is found
out here, in milliseconds on a CPU and with a few compilations on a GPU. What a path answers for tiny layers
(`moeq.layouts.known_answers`) is compared with the torch reference in float64 on the CPU, which no compiled kernel of
ours takes part in: not even the one that decodes takes float64.

`moeq.layouts.trust` decides when to ask, and remembers what came out.
"""

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Final

import torch

from moeq import native
from moeq.layouts import dense_known
from moeq.layouts.base import part
from moeq.layouts.grouped import gpu
from moeq.layouts.known_answers import EXACT, Case, Cases
from moeq.spec import LAYOUTS

PATHS: Final = ("native", "triton")
"""C++ kernels on CPUs, Triton kernels on GPUs."""
_KNOWN: Final = tuple(part(name, "known") for name in LAYOUTS)
CASES: Final[dict[str, Cases]] = {
    subject: cases
    for field in ("CASES", "LATE_CASES")
    for each in _KNOWN
    for subject, cases in getattr(each, field).items()
} | dict(dense_known.CASES)
"""Subject -> its calls: what is tested on its own."""
SUBJECTS: Final = tuple(CASES)
_NEEDS: Final[dict[str, tuple[str, ...]]] = {key: value for each in _KNOWN for key, value in each.NEEDS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What came out of one self-test.

    Attributes:
        path: one of `PATHS`.
        subject: one of `SUBJECTS`.
        device: torch's name of it.
        error: the largest distance of a token's answer from the right one, as a share of the latter's length, where
            it came closest to `tolerance`; None if there was no number.
        tolerance: what it may be at most.
        seconds: that the test took, compilation included.
        failure: what is wrong, None if nothing is. It holds no path of this machine.
    """

    path: str
    subject: str
    device: str
    error: float | None
    tolerance: float
    seconds: float
    failure: str | None

    @property
    def ok(self) -> bool:
        """Whether the answers are right."""
        return self.failure is None


def subjects(path: str, device: torch.device) -> tuple[str, ...]:
    """What the path computes on a device; nothing where its compiler, or the right kind of processor, is missing."""
    if path == "native":
        return SUBJECTS if device.type == "cpu" and native.available() else ()
    if not gpu.AVAILABLE or device.type not in ("cuda", "cpu"):  # on a CPU in triton's interpreter
        return ()
    if device.type == "cuda" and torch.cuda.get_device_properties(device).major < gpu.AMPERE:
        return ()
    return tuple(subject for subject in SUBJECTS if subject not in ("decode", "dense"))


def needs(path: str, subject: str) -> tuple[str, ...]:
    """Other subjects that the calls of one also run through."""
    return _NEEDS.get(subject, ()) if path == "native" else ()


def run(path: str, device: torch.device, wanted: tuple[str, ...] | None = None) -> tuple[Check, ...]:
    """Test a path on a device; no failure of a kernel raises.

    Args:
        path: one of `PATHS`.
        device: "cpu" for the native path; a CUDA device for Triton, or "cpu" in triton's interpreter.
        wanted: of `subjects(path, device)`, None for all of them.
    """
    found = subjects(path, device)
    return tuple(_check(path, subject, device) for subject in found if wanted is None or subject in wanted)


def _check(path: str, subject: str, device: torch.device) -> Check:
    started = time.perf_counter()
    error: float | None = 0.0
    tolerance, failure = EXACT, None
    # Whatever the caller has switched on: neither its devices nor its dtypes nor its gradients are ours.
    with _one_thread(), torch.no_grad(), torch.device("cpu"), torch.autocast(device.type, enabled=False):
        try:
            cases = CASES[subject](path, device)
            if device.type == "cuda":
                cases = _compiled(list(cases))
            for case in cases:
                found, failure = _judge(case)
                if failure is not None or found / case.tolerance >= (error or 0.0) / tolerance:
                    error, tolerance = found if math.isfinite(found) else None, case.tolerance
                if failure is not None:
                    break
        except torch.OutOfMemoryError:
            error, failure = None, OUT_OF_MEMORY
        except Exception as problem:  # whatever a compiler or a driver makes of it: the reference serves
            error, failure = None, _words(problem)
    seconds = time.perf_counter() - started
    return Check(
        path=path, subject=subject, device=str(device), error=error, tolerance=tolerance, seconds=seconds,
        failure=failure,
    )  # fmt: skip


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices are tiny: on a busy machine threads that wait for each other would take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compiled(cases: list[Case]) -> Iterator[Case]:
    """The cases, whose kernels are compiled side by side before the first one runs."""
    launch = import_module("moeq.kernels.triton_launch")  # needs triton, an optional dependency
    with launch.compiling(os.cpu_count() or 1):
        for case in cases:
            case.answer()
    yield from cases


OUT_OF_MEMORY: Final = "there was no memory left for the test"
"""The failure that says nothing about the kernels, so that it is not remembered."""


def _judge(case: Case) -> tuple[float, str | None]:
    """The error of an answer, and what is wrong with it."""
    answer = case.answer()
    if answer is None:
        return math.nan, f"{case.name}: the kernels refuse the call"
    answer = answer.detach().to("cpu", torch.float64)
    if answer.shape != case.wanted.shape:
        return math.nan, f"{case.name}: the answer has the shape {list(answer.shape)}"
    if not bool(answer.isfinite().all()):
        return math.nan, f"{case.name}: answers are not finite"
    lengths = case.wanted.norm(dim=1)
    # A token that nobody answers is compared with the others.
    errors = (answer - case.wanted).norm(dim=1) / lengths.clamp(min=0.1 * float(lengths.mean()))
    error = float(errors.max())
    if error <= case.tolerance:
        return error, None
    return error, f"{case.name}: answers are off by {error:.2g} of their length, {case.tolerance:.2g} is allowed"


def _words(problem: Exception) -> str:
    """An exception in one line, of whose paths only names of files are left: it goes into reports of bugs."""
    text = " ".join(str(problem).split())[:300]
    return f"{type(problem).__name__}: {_PATH.sub(_file_name, text)}"


_PATH: Final = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\",:]+){2,}[/\\]?")


def _file_name(path: re.Match[str]) -> str:
    last = re.split(r"[/\\]", path.group().rstrip("/\\"))[-1]
    return last if "." in last else "(path)"

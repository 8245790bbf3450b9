"""Says what moeq would run on here, tests it again, and measures what the memory gives: the first page of a bug report.

Nothing of it names a user, a machine or a directory.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moeq import native
from moeq.layouts import selftest, trust
from moeq.layouts.grouped import gpu
from moeq.layouts.selftest import Check
from moeq.version import __version__

BUFFER_BYTES: Final = 256 << 20
"""What bandwidths are measured on: more than last-level caches hold."""
GPU_BUFFER_BYTES: Final = 1 << 30
ROUNDS: Final = 3
PACKAGES: Final = ("torch", "triton", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A processor that models can run on; see docs/json.md."""

    device: str
    name: str
    cores: int
    threads: int | None
    instruction_sets: list[str]
    capability: str | None
    driver: str | None
    memory_bytes: int
    free_bytes: int
    read_bandwidth: float | None
    copy_bandwidth: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What computes layers of a kind on a device, and why; see docs/json.md."""

    device: str
    layers: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What was found; see docs/json.md."""

    ok: bool
    failures: list[str]
    system: str
    versions: dict[str, str | None]
    cuda: str | None
    native: bool
    devices: list[Device]
    routes: list[Route]
    checks: list[Check]
    cache_works: bool
    cache_free_bytes: int | None
    seconds: float


def run() -> DoctorReport:
    """Test every compiled path of this machine again, whatever was known of it, and measure its memory.

    Verdicts replace those that `moeq.load` goes by, in this process and in the cache.
    """
    started = time.perf_counter()
    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    checks = [check for place in places for check in trust.recheck(_path(place), place)]
    devices = [_device(place) for place in places]
    free = _cache_free_bytes()
    return DoctorReport(
        ok=all(check.ok for check in checks),
        failures=[
            f"{check.path} {check.subject} on {check.device}: {check.failure}" for check in checks if not check.ok
        ],
        system=f"{platform.system()} {platform.machine()}",
        versions={"moeq": __version__, "python": platform.python_version(), **_versions()},
        cuda=torch.version.cuda,
        native=native.available(),
        devices=devices,
        routes=[route for place in places for route in _routes(place, checks)],
        checks=checks,
        cache_works=trust.cache_works(),
        cache_free_bytes=free,
        seconds=time.perf_counter() - started,
    )


def _path(place: torch.device) -> str:
    return "native" if place.type == "cpu" else "triton"


def _versions() -> dict[str, str | None]:
    found = {name: trust.installed(name) for name in PACKAGES}
    return {name: None if version == "none" else version for name, version in found.items()}


def _routes(place: torch.device, checks: list[Check]) -> list[Route]:
    """Layers of every kind; "decode" is no layer, but all others on a CPU go through it."""
    path, there = _path(place), selftest.subjects(_path(place), place)
    failed = {check.subject for check in checks if check.path == path and check.device == str(place) and not check.ok}
    routes = []
    for layers in selftest.SUBJECTS[1:]:
        needed = {*selftest.needs(path, layers), layers}
        if layers in there and not needed & failed:
            route = path, "its self-test passed"
        elif layers in there:
            route = "torch", f"self-test failed: {', '.join(sorted(needed & failed))}"
        else:
            route = "torch", _lacking(place)
        routes.append(Route(device=str(place), layers=layers, path=route[0], reason=route[1]))
    return routes


def _lacking(place: torch.device) -> str:
    """Why there is no compiled path for some layers."""
    if place.type == "cpu":
        return "the compiled kernels are not built, or slower here; a C++ compiler and a new install make them"
    if not gpu.AVAILABLE:
        return "triton is not installed"
    if torch.cuda.get_device_properties(place).major < gpu.AMPERE:
        return f"the kernels need compute capability {gpu.AMPERE}.0"
    return "there is no kernel for them"


def _device(place: torch.device) -> Device:
    if place.type == "cpu":
        return _cpu()
    properties = torch.cuda.get_device_properties(place)
    free, total = torch.cuda.mem_get_info(place)
    return Device(
        device=str(place),
        name=properties.name,
        cores=properties.multi_processor_count,
        threads=None,
        instruction_sets=[],
        capability=f"{properties.major}.{properties.minor}",
        driver=trust.gpu_driver(),
        memory_bytes=total,
        free_bytes=free,
        read_bandwidth=None,
        copy_bandwidth=_copy_bandwidth(place, min(GPU_BUFFER_BYTES, free // 4)),
    )


def _cpu() -> Device:
    total, free = _memory()
    size = BUFFER_BYTES if free == 0 else min(BUFFER_BYTES, free // 4)
    return Device(
        device="cpu",
        name=trust.cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instruction_sets=list(native.isas()),
        capability=None,
        driver=None,
        memory_bytes=total,
        free_bytes=free,
        read_bandwidth=_read_bandwidth(size),
        copy_bandwidth=_copy_bandwidth(torch.device("cpu"), size),
    )


def _memory() -> tuple[int, int]:
    """Bytes of memory, and those that a process could still get; zeros where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)


def _read_bandwidth(size: int) -> float | None:
    """Bytes per second, by the compiled kernels; None without them."""
    if not native.available() or not size:
        return None
    buffer = torch.ones(size, dtype=torch.uint8)
    return max(native.read_bandwidth(buffer) for _ in range(ROUNDS))


def _copy_bandwidth(place: torch.device, size: int) -> float | None:
    """Bytes read and written per second by torch's copy; None if there is no memory to try it on."""
    if not size:
        return None
    try:
        source = torch.ones(size, dtype=torch.uint8, device=place)
        target = torch.zeros_like(source)
    except torch.OutOfMemoryError:
        return None
    seconds = min(_seconds(lambda: target.copy_(source), place) for _ in range(ROUNDS))
    return 2 * size / seconds


def _seconds(work: Callable[[], object], place: torch.device) -> float:
    _wait(place)
    started = time.perf_counter()
    work()
    _wait(place)
    return time.perf_counter() - started


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _cache_free_bytes() -> int | None:
    """Free bytes where verdicts are kept; None where nobody knows."""
    directory = trust.cache_directory()
    if directory is None:
        return None
    for place in (directory, *directory.absolute().parents):
        if place.is_dir():
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None

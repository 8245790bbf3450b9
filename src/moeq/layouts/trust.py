"""Whether a compiled path may compute here: asked when bytes are bound to a device, never inside a call.

The first question about a path on a kind of device runs its self-test (`moeq.layouts.selftest`); the verdict is kept in
this process, and in a file under `cache_directory()` whose name depends on everything that could change it: processor,
driver, versions, and the kernels themselves. What failed stays off until one of them changes or `recheck` is called
(`moeq doctor`); the torch reference serves, and one warning says so.
"""

import hashlib
import json
import os
import platform
import re
import tempfile
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from moeq import native
from moeq.errors import KernelWarning
from moeq.layouts import selftest
from moeq.layouts.selftest import Check
from moeq.version import __version__

FILE_VERSION: Final = 1
FOLDER: Final = "selftest"
"""Where verdicts lie in the cache directory."""
NAMES: Final = {"native": "compiled CPU kernels", "triton": "Triton kernels"}


@dataclass(slots=True, kw_only=True)
class _State:
    """What this process knows.

    Attributes:
        lock: held while tests run, so that they run once.
        default: nobody said where the cache is.
        directory: of the cache; None keeps no files.
        checks: (digest of the key) -> verdict.
        answers: (path, subject, device) -> whether it is trusted.
        said: (path, device) of the warnings that were given.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    default: bool = True
    directory: Path | None = None
    checks: dict[str, Check] = field(default_factory=dict)
    answers: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    said: set[tuple[str, str]] = field(default_factory=set)


_state: Final = _State()


def compiled(device: torch.device, *subjects: str) -> bool:
    """Whether what is compiled for a device may compute all of the subjects there; True where there is nothing."""
    path = {"cpu": "native", "cuda": "triton"}.get(device.type)
    return path is None or all(trusted(path, subject, device) for subject in subjects)


def trusted(path: str, subject: str, device: torch.device) -> bool:
    """Whether a path gives right answers on a device, as far as its self-test can tell.

    The first question runs the test, unless an earlier process wrote its verdict down; a failure is warned of once.

    Args:
        path: one of `selftest.PATHS`.
        subject: one of `selftest.SUBJECTS`.
        device: where the bytes are.

    Returns:
        Also True where the path does not exist, as there is nothing to distrust; False for a subject that it lacks.
    """
    known = _state.answers.get((path, subject, str(device)))
    if known is not None:
        return known
    with _state.lock:
        return _answer(path, subject, device)


def recheck(path: str, device: torch.device) -> tuple[Check, ...]:
    """Run all tests of a path on a device again, and replace whatever was known; warns of nothing."""
    with _state.lock:
        found = selftest.run(path, device)
        for check in found:
            _remember(path, check, device)
        for place in [place for place in _state.answers if place[0] == path]:
            del _state.answers[place]
        _settle(path, device)
    return found


def keep_verdicts_in(directory: Path | None) -> None:
    """Where verdicts are kept from now on; None keeps them in this process alone."""
    with _state.lock:
        _state.directory, _state.default = directory, False


def cache_directory() -> Path | None:
    """Where verdicts are kept; None if nowhere. `~/.cache/moeq` unless `keep_verdicts_in` said something else."""
    if not _state.default:
        return _state.directory
    try:
        return Path.home() / ".cache" / "moeq"
    except RuntimeError:  # nobody knows the home directory
        return None


def cache_works() -> bool:
    """Whether verdicts outlive this process."""
    directory = cache_directory()
    if directory is None:
        return False
    try:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory / FOLDER):
            return True
    except OSError:
        return False


def forget() -> None:
    """Forget what this process knows, but no files."""
    with _state.lock:
        _state.checks.clear()
        _state.answers.clear()
        _state.said.clear()
        native.stop_decoding(False)


def key(path: str, subject: str, device: torch.device) -> dict[str, str]:
    """Everything that a verdict depends on."""
    facts = {
        "path": path,
        "subject": subject,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "moeq": __version__,
        "kernels": _kernels_hash(path),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        cuda = torch.version.cuda or torch.version.hip or "none"
        return {**facts, "device": properties.name, "capability": capability, "driver": gpu_driver(), "cuda": cuda}
    return {**facts, "device": cpu_name(), "instructions": " ".join(native.isas()) or "none"}


def installed(package: str) -> str:
    """The version of a package, "none" without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def cpu_name() -> str:
    """The processor, as the system calls it."""
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "cpu model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


@cache
def gpu_driver() -> str:
    """The version of NVIDIA's driver, "unknown" where the system does not say."""
    with suppress(OSError, UnicodeDecodeError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
        if found is not None:
            return found.group(1)
    return "unknown"


def _answer(path: str, subject: str, device: torch.device) -> bool:
    there = selftest.subjects(path, device)
    asked = (*selftest.needs(path, subject), subject)
    if not there:
        right = True
    elif subject not in there:
        right = False
    else:
        right = all(_verdict(path, name, device).ok for name in asked)
    if there and not right and subject in there:
        _settle(path, device)
        _warn(path, [_verdict(path, name, device) for name in there], device)
    return _state.answers.setdefault((path, subject, str(device)), right)


def _settle(path: str, device: torch.device) -> None:
    """Let decoding follow its verdict: it has no place of its own where it is bound to a device."""
    if path == "native" and "decode" in selftest.subjects(path, device):
        native.stop_decoding(not _verdict(path, "decode", device).ok)


def _verdict(path: str, subject: str, device: torch.device) -> Check:
    """What a test found, now or earlier."""
    facts = key(path, subject, device)
    digest = _digest(facts)
    found = _state.checks.get(digest) or _read(facts, digest)
    if found is None:
        (found,) = selftest.run(path, device, (subject,))
        _remember(path, found, device)
    _state.checks[digest] = found
    return found


def _remember(path: str, check: Check, device: torch.device) -> None:
    facts = key(path, check.subject, device)
    digest = _digest(facts)
    _state.checks[digest] = check
    if check.failure != selftest.OUT_OF_MEMORY:
        _write(facts, digest, check)


def _warn(path: str, checks: list[Check], device: torch.device) -> None:
    """Say once for each path and device what failed; later questions find it said."""
    place = path, str(device)
    if place in _state.said:
        return
    _state.said.add(place)
    failed = [f"{check.subject} ({check.failure})" for check in checks if not check.ok]
    warnings.warn(
        f"moeq's {NAMES[path]} failed their self-test on {key(path, 'linear', device)['device']} ({device}): "
        f"{'; '.join(failed)}. What failed is off in this process: torch computes it, so answers stay right "
        "but take longer. Run `moeq doctor` to test again, and report what its --json writes",
        KernelWarning,
        stacklevel=2,
    )


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def _kernels_hash(path: str) -> str:
    """A digest of the kernels: their sources, and the extension where it computes."""
    here = Path(__file__).parent
    files = sorted(file for file in here.iterdir() if file.suffix in (".py", ".json"))
    extension = native.file()
    if path == "native" and extension is not None:
        files.append(extension)
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):  # as in a zip archive: the version has to do
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _place(facts: Mapping[str, str], digest: str) -> Path | None:
    directory = cache_directory()
    return None if directory is None else directory / FOLDER / f"{facts['path']}-{facts['subject']}-{digest[:32]}.json"


def _read(facts: Mapping[str, str], digest: str) -> Check | None:
    """The verdict of an earlier process; None for whatever is not exactly one."""
    place = _place(facts, digest)
    if place is None:
        return None
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        if data["version"] != FILE_VERSION or data["key"] != dict(facts):
            return None
        check = Check(**data["check"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = [check.tolerance, check.seconds, *([] if check.error is None else [check.error])]
    plain = all(isinstance(number, int | float) for number in numbers)
    plain = plain and (check.failure is None or isinstance(check.failure, str))
    return check if plain and (check.path, check.subject) == (facts["path"], facts["subject"]) else None


def _write(facts: Mapping[str, str], digest: str, check: Check) -> None:
    """Keep a verdict, in a file that is whole or absent whoever else writes it; not at all where that is impossible."""
    place = _place(facts, digest)
    if place is None:
        return
    text = json.dumps({"version": FILE_VERSION, "key": dict(facts), "check": asdict(check)}, indent=1)
    partial = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(dir=place.parent, prefix=".", suffix=".partial")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(partial, place)
    except OSError:
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)

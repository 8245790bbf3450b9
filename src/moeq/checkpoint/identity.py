"""Tells checkpoints apart: by file (has an input changed since?) and as a model (is this the one measured?)."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moeq import codec
from moeq.checkpoint.header import read_header_bytes, unreadable
from moeq.checkpoint.locate import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, read_config
from moeq.checkpoint.read import read_headers
from moeq.checkpoint.rounded.gguf import LISTING
from moeq.spec import TensorInfo

VOLATILE_KEYS: Final = frozenset(("_name_or_path", "_commit_hash", "transformers_version"))
"""Keys of config.json that say where a model came from, not what it is."""
SAMPLE_PAGES: Final = 64
PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What is remembered of one input file.

    Attributes:
        size: bytes.
        mtime_ns: time of the last change, nanoseconds since the epoch.
        header_sha256: of the safetensors header, or of the whole file if it is JSON; of nothing if it is GGUF.
        sample_sha256: of up to `SAMPLE_PAGES` pages spread over the file.
    """

    size: int
    mtime_ns: int
    header_sha256: str
    sample_sha256: str


def fingerprint(directory: Path) -> dict[str, FileStamp]:
    """file name -> stamp, for config.json, the index and every shard.

    Raises:
        CheckpointError: the checkpoint is broken or cannot be read.
    """
    single = (directory / SINGLE_NAME).exists()
    names = {part.file for info in read_headers(directory).values() for part in info.stored}
    names |= {name for name in (CONFIG_NAME, INDEX_NAME, LISTING) if (directory / name).exists()} - (
        {INDEX_NAME} if single else set()
    )
    return {name: _stamp(directory / name) for name in sorted(names)}


def model_hash(directory: Path, headers: Mapping[str, TensorInfo]) -> str:
    """sha256 that names a model, whatever its path and file times.

    It covers config.json without `VOLATILE_KEYS`, the sorted names, dtypes and shapes of all tensors, and
    up to `SAMPLE_PAGES` pages of the data of each shard.

    Args:
        directory: the checkpoint.
        headers: what `read_headers` returned for it.

    Raises:
        CheckpointError: config.json is absent or malformed, or a file cannot be read.
    """
    config = read_config(directory / CONFIG_NAME)
    stored = {name: info for name, info in headers.items() if info.rounded is None}
    for name, info in headers.items():
        if info.rounded is not None:
            stored |= {f"{name}:{role}": part for role, part in info.rounded.parts}
    spans: dict[str, tuple[int, int]] = {}
    for info in stored.values():
        start, stop = spans.get(info.file, (info.start, info.stop))
        spans[info.file] = min(start, info.start), max(stop, info.stop)
    return codec.digest(
        {
            "config": _stable(config),
            "tensors": [[name, info.dtype, list(info.shape)] for name, info in sorted(stored.items())],
            "samples": [_sample(directory / name, *span) for name, span in sorted(spans.items())],
        }
    )


def _stable(value: Any) -> Any:
    """A config without its volatile keys, at every depth."""
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _stamp(path: Path) -> FileStamp:
    try:
        info = path.stat()
        whole = path.suffix == ".json"
        # What a GGUF file's header says is in the listing, which has a stamp of its own.
        header = path.read_bytes() if whole else b"" if path.suffix == ".gguf" else read_header_bytes(path)[0]
    except OSError as error:
        raise unreadable(path, error) from error
    return FileStamp(
        size=info.st_size,
        mtime_ns=info.st_mtime_ns,
        header_sha256=hashlib.sha256(header).hexdigest(),
        sample_sha256=_sample(path, 0, info.st_size),
    )


def _sample(path: Path, start: int, stop: int) -> str:
    """sha256 of pages spread evenly over bytes [start, stop), the first and the last included."""
    pages = min(SAMPLE_PAGES, -(-(stop - start) // PAGE_BYTES))
    last = max(stop - PAGE_BYTES, start)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for page in range(pages):
                position = start + (last - start) * page // max(pages - 1, 1)
                file.seek(position)
                digest.update(file.read(min(PAGE_BYTES, stop - position)))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()

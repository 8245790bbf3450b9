"""Writes files that are either whole or absent: temp file in the same directory, fsync, rename, fsync.

The temp file of `name` is `.name.partial`, so that a run after a killed one overwrites its leftovers.
"""

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self, final

import torch
from torch import Tensor

from moeq.checkpoint.dtypes import DTYPE_BITS, DTYPE_NAMES, data_bytes
from moeq.checkpoint.header import LENGTH_BYTES, METADATA_KEY, parse_header, unreadable
from moeq.checkpoint.locate import INDEX_NAME
from moeq.checkpoint.read import CHUNK_BYTES
from moeq.checkpoint.rounded.gguf import LISTING
from moeq.errors import CheckpointError, HeaderError, StorageError
from moeq.spec import ALIGN

Declared = tuple[str, str, tuple[int, ...]]
"""A tensor to come: name, safetensors dtype, shape."""
Bytes = bytes | bytearray | memoryview
Data = Tensor | Bytes | Iterable[Bytes]

METADATA: Final = {"format": "pt"}
"""Older transformers refuse a file whose metadata does not say which framework wrote it."""

_SKIPPED_PATTERNS: Final = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
)  # fmt: skip
_SKIPPED_ON_TOP: Final = ("config.json", "README.md", LISTING)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """What a finished file must look like.

    Attributes:
        bytes: its size.
        sha256: of its content, hexadecimal.
    """

    bytes: int
    sha256: str


def header_bytes(tensors: Sequence[Declared]) -> int:
    """Bytes in front of the data of a file with these tensors, a multiple of `ALIGN`; a budget must count them.

    Raises:
        HeaderError: a declaration is not one that a safetensors file can hold.
    """
    return len(_make_header(tensors, Path("(not written yet)")))


def hash_file(path: Path) -> FileDigest:
    """Size and sha256 of a file.

    Raises:
        OSError: it cannot be read; the caller knows what that means.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())


@final
class ShardWriter:
    """Streams one safetensors file to disk, tensor by tensor in the declared order.

    Use it as a context manager: leaving it well closes the file, leaving it by an error aborts it. Declare wide
    dtypes before narrow ones if readers should find every tensor aligned; the format allows no padding between.

    Args:
        path: the file to write; nothing is seen there before `close`.
        tensors: all tensors, in the order in which they will come.

    Raises:
        HeaderError: a name comes twice, or a dtype or shape cannot be stored.
        StorageError: the disk refuses.
    """

    def __init__(self, path: Path, tensors: Sequence[Declared]) -> None:
        header = _make_header(tensors, path)
        self._path = path
        self._pending = list(reversed(tensors))
        sizes = (data_bytes(dtype, shape) or 0 for _, dtype, shape in tensors)
        self._total = len(header) + sum(sizes)
        self._file: _PartialFile | None = _PartialFile(path, self._total)
        self._guarded(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, name: str, data: Data) -> None:
        """Append the next tensor; any error aborts the file.

        Args:
            name: must be the next declared one.
            data: a tensor of the declared dtype and shape, or its bytes, or its bytes in pieces.

        Raises:
            HeaderError: another tensor is due, or dtype, shape or size differ from the declaration.
            StorageError: the disk is full or refuses.
        """
        if self._file is None:
            raise HeaderError("the file is closed", file=self._path, tensor=name, fix="open a new writer")
        try:
            if not self._pending or self._pending[-1][0] != name:
                due = self._pending[-1][0] if self._pending else "nothing"
                raise self._wrong(name, f"{due} is due")
            _, dtype, shape = self._pending.pop()
            size = data_bytes(dtype, shape) or 0
            for piece in self._pieces(name, data, dtype, shape):
                size -= piece.nbytes
                if size < 0:
                    raise self._wrong(name, f"there are at least {-size} bytes more than declared")
                self._file.write(piece)
            if size:
                raise self._wrong(name, f"{size} bytes of the declared size are missing")
        except BaseException:
            self.abort()
            raise

    def close(self) -> FileDigest:
        """Make the file appear under its name, safely on disk.

        Raises:
            HeaderError: declared tensors were not written.
            StorageError: the disk is full or refuses.
        """
        if self._file is None:
            raise HeaderError("the file is closed", file=self._path, fix="open a new writer")
        if self._pending:
            self.abort()
            raise self._wrong(self._pending[-1][0], "it was declared but not written")
        file, self._file = self._file, None
        return file.commit()

    def abort(self) -> None:
        """Remove what was written; does nothing after `close`."""
        file, self._file = self._file, None
        if file is not None:
            file.discard()

    def _guarded(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(memoryview(data))
        except BaseException:
            self.abort()
            raise

    def _wrong(self, name: str, message: str) -> HeaderError:
        return HeaderError(message, file=self._path, tensor=name, fix="write exactly the declared tensors, in order")

    def _pieces(self, name: str, data: Data, dtype: str, shape: tuple[int, ...]) -> Iterable[memoryview]:
        if isinstance(data, Tensor):
            if DTYPE_NAMES.get(data.dtype) != dtype or tuple(data.shape) != tuple(shape):
                raise self._wrong(name, f"{data.dtype} {list(data.shape)} came, {dtype} {list(shape)} was declared")
            flat = data.detach().cpu().contiguous().view(-1)
            return (flat.view(torch.uint8).numpy().data,)
        if isinstance(data, Bytes):
            return (memoryview(data).cast("B"),)
        return (memoryview(piece).cast("B") for piece in data)


@final
class _PartialFile:
    """A file under a temporary name, hashed as it grows."""

    def __init__(self, path: Path, expected: int) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._expected = expected
        self._written = 0
        self._digest = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.open(self._partial, flags, 0o666)
        except OSError as error:
            raise self._refused(error) from error

    def write(self, data: memoryview) -> None:
        while data:
            try:
                count = os.write(self._file, data[:CHUNK_BYTES])
            except OSError as error:
                raise self._refused(error) from error
            self._digest.update(data[:count])
            self._written += count
            data = data[count:]

    def commit(self) -> FileDigest:
        try:
            os.fsync(self._file)
            self._close()
            self._partial.replace(self._path)
            _sync_directory(self._path.parent)
        except OSError as error:
            self.discard()
            raise self._refused(error) from error
        return FileDigest(bytes=self._written, sha256=self._digest.hexdigest())

    def discard(self) -> None:
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _refused(self, error: OSError) -> StorageError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = max(self._expected - self._written, 1)
            return StorageError("the disk is full", file=self._path, fix=f"free {missing} bytes there and run again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return StorageError(
                f"cannot be written: {error.strerror}", file=self._path, fix="choose an output directory you may write"
            )
        return StorageError(f"cannot be written: {error.strerror or error}", file=self._path, fix="check the disk")


def write_file_atomic(path: Path, data: bytes) -> FileDigest:
    """Write a small file so that it is whole or absent, whatever happens.

    Raises:
        StorageError: the disk is full or refuses.
    """
    file = _PartialFile(path, len(data))
    try:
        file.write(memoryview(data))
    except BaseException:
        file.discard()
        raise
    return file.commit()


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> FileDigest:
    """Write `model.safetensors.index.json`.

    Args:
        directory: where the shards lie.
        weight_map: tensor -> file name.
        total_size: bytes of all tensors.

    Raises:
        StorageError: the disk is full or refuses.
    """
    return write_file_atomic(directory / INDEX_NAME, index_text(weight_map, total_size))


def index_text(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """What `write_index` writes."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def copy_sidecars(source: Path, out: Path, skip: Collection[str] = ()) -> dict[str, FileDigest]:
    """Copy what a model needs beside its weights: tokenizer, generation config, chat templates, custom code.

    Weights in any format, config.json, README.md and hidden files stay behind. Links to directories are not
    followed; links to files are, as long as they end inside `source`, in the blobs of its hub cache, or in a folder
    that the weights are links into.

    Args:
        source: the source checkpoint.
        out: the output directory.
        skip: further paths, relative to `source` with "/" between parts, that are not copied.

    Returns:
        relative path -> size and hash of the copy.

    Raises:
        CheckpointError: a file cannot be read, or is a link that leads elsewhere.
        StorageError: the disk is full or refuses.
    """
    return {name: _copy_file(path, out / name) for name, path in list_sidecars(source, skip, out)}


def list_sidecars(source: Path, skip: Collection[str] = (), out: Path | None = None) -> Iterator[tuple[str, Path]]:
    """What `copy_sidecars` copies: (path relative to `source`, path). `out` is not looked into.

    Raises:
        CheckpointError: a file is a link that leads elsewhere.
    """
    output = None if out is None else out.resolve()
    for folder, folders, names in os.walk(source, followlinks=False):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != output)
        for name in sorted(names):
            relative = (here / name).relative_to(source)
            if relative.as_posix() in skip or _stays_behind(relative):
                continue
            _check_inside(here / name, source)
            if (here / name).is_file():
                yield relative.as_posix(), here / name


def _stays_behind(relative: Path) -> bool:
    return (
        relative.name.startswith(".")
        or str(relative) in _SKIPPED_ON_TOP
        or any(relative.match(pattern) for pattern in _SKIPPED_PATTERNS)
    )


def _copy_file(source: Path, path: Path) -> FileDigest:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", file=path.parent, fix="check the disk") from error
    try:
        with source.open("rb") as file:
            return _copy_stream(file, source, path)
    except OSError as error:
        raise unreadable(source, error) from error


def _copy_stream(file: BinaryIO, source: Path, path: Path) -> FileDigest:
    copy = _PartialFile(path, source.stat().st_size)
    try:
        while piece := file.read(CHUNK_BYTES):
            copy.write(memoryview(piece))
    except BaseException:
        copy.discard()
        raise
    return copy.commit()


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _make_header(tensors: Sequence[Declared], path: Path) -> bytes:
    """Length and padded JSON, proven by the parser that readers use."""
    entries: dict[str, object] = {METADATA_KEY: METADATA}
    end = 0
    for name, dtype, shape in tensors:
        if name in entries:
            raise HeaderError("the name is taken", file=path, tensor=name, fix="declare every tensor once")
        size = data_bytes(dtype, shape) if dtype in DTYPE_BITS else None
        if size is None:
            raise HeaderError(
                f"{dtype} {list(shape)} cannot be stored", file=path, tensor=name, fix="use another dtype"
            )
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGN)
    parse_header(text, end, path)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _check_inside(path: Path, source: Path) -> None:
    if not path.is_symlink():
        return
    root = source.resolve()
    # Downloads into a directory may be links into a cache. A link to anywhere else could carry off a private file.
    weights = [each for each in source.glob("*.safetensors") if each.is_symlink()]
    allowed = [root, *(each.resolve().parent for each in weights)]
    if root.parent.name == "snapshots":  # the hub's cache: files of a snapshot are links into ../../blobs
        allowed.append((root.parent.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            "a link leads out of the checkpoint", file=path, fix="replace the link by the file, or remove it"
        )

"""A strict parser of safetensors headers: nothing is read, allocated or mapped before it is proven.

A file is 8 bytes n (little-endian), n bytes of JSON that start with "{", then the data. The JSON maps each
tensor's name to its dtype, shape and [start, stop) inside the data; the tensors must cover the data without
holes, overlaps or a rest. `ShardWriter` passes its own header through `parse_header` before it writes a byte.
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moeq.checkpoint.dtypes import DTYPE_BITS, data_bytes
from moeq.errors import CheckpointError, HeaderError, MissingTensorError
from moeq.spec import TensorInfo

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit, so that a hostile length cannot make us allocate."""
MAX_DIMS: Final = 64
MAX_ELEMENTS: Final = 2**63 - 1
METADATA_KEY: Final = "__metadata__"

_TENSOR_KEYS: Final = frozenset(("dtype", "shape", "data_offsets"))
_DOWNLOAD: Final = "download or copy the file again"
_REWRITE: Final = "write the file again with the safetensors library"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header of one file says.

    Attributes:
        tensors: name -> where the tensor lies, in the order of the header.
        metadata: the free strings of the file.
        data_start: first byte after the header, counted from the start of the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, with offsets counted from the start of the file.

    Raises:
        MissingTensorError: the file does not exist.
        HeaderError: the file is truncated or contradicts its own header.
        CheckpointError: the file cannot be read.
    """
    return scan(path).tensors


def scan(path: Path) -> Header:
    """The whole header of one safetensors file; raises as `read_header` does."""
    header, data_size = read_header_bytes(path)
    return parse_header(header, data_size, path)


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON bytes of the header and the number of bytes behind it; raises as `read_header` does."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would block for ever
            raise CheckpointError("not a regular file", file=path, fix="give a safetensors checkpoint")
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                raise HeaderError(f"the file has only {size} bytes", file=path, fix=_DOWNLOAD)
            length = int.from_bytes(prefix, "little")
            if length > size - LENGTH_BYTES:
                raise HeaderError(
                    f"the header claims {length} bytes, the file has {size - LENGTH_BYTES} left",
                    file=path,
                    fix=_DOWNLOAD,
                )
            if length > MAX_HEADER_BYTES:
                raise HeaderError(
                    f"the header claims {length} bytes, the format allows {MAX_HEADER_BYTES}", file=path, fix=_REWRITE
                )
            header = file.read(length)
    except FileNotFoundError:
        raise MissingTensorError("the file does not exist", file=path, fix=_DOWNLOAD) from None
    except OSError as error:
        raise unreadable(path, error) from error
    if len(header) != length:
        raise HeaderError("the file became shorter while it was read", file=path, fix=_DOWNLOAD)
    return header, size - LENGTH_BYTES - length


def parse_header(header: bytes, data_size: int, path: Path) -> Header:
    """Prove a header and turn it into tensors.

    Args:
        header: the JSON bytes.
        data_size: bytes of the file behind the header.
        path: the file, for messages; its name goes into the `TensorInfo`s.

    Raises:
        HeaderError: naming the file, and the tensor where one is at fault.
    """
    if not header.startswith(b"{"):
        raise HeaderError("the header does not start with '{'", file=path, fix="give a safetensors file")
    entries = parse_json_object(header, path)
    metadata = entries.pop(METADATA_KEY, {})
    if metadata is None:  # the library opens such files
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{METADATA_KEY} must map strings to strings", file=path, fix=_REWRITE)
    start = LENGTH_BYTES + len(header)
    tensors = {name: _parse_tensor(name, entry, start, path) for name, entry in entries.items()}
    _check_cover(tensors, start, start + data_size, path)
    return Header(tensors=tensors, metadata=metadata, data_start=start)


def parse_json_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parse one JSON object: UTF-8 only, no duplicate keys, names that can be printed.

    Raises:
        HeaderError: it is something else.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise HeaderError("the JSON is nested too deeply", file=path, fix=_REWRITE) from None
    except ValueError as error:
        raise HeaderError(f"not valid UTF-8 JSON: {error}", file=path, fix=_DOWNLOAD) from error
    if not isinstance(value, dict):
        raise HeaderError("the JSON is not an object", file=path, fix=_DOWNLOAD)
    return value


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error to raise when the system refuses to read `path`."""
    return CheckpointError(
        f"cannot be read: {error.strerror or error}", file=path, fix="check permissions and the disk"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # a lone surrogate cannot be printed or stored; UnicodeEncodeError is a ValueError
        if key in seen:
            raise ValueError(f"the key {key!r} comes twice")
        seen[key] = value
    return seen


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _is_counts(value: Any) -> bool:
    """Whether `value` is a list of non-negative ints (bools are not ints here)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _parse_tensor(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    def wrong(message: str, fix: str = _REWRITE) -> HeaderError:
        return HeaderError(message, file=path, tensor=name, fix=fix)

    if not isinstance(entry, dict) or set(entry) != _TENSOR_KEYS:
        raise wrong("the entry must have exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"unknown dtype {str(dtype)[:40]!r}", "convert the checkpoint to bfloat16")
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        raise wrong(f"the shape must be a list of at most {MAX_DIMS} numbers >= 0")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets must be [start, stop] with 0 <= start <= stop, not {str(offsets)[:60]}")
    elements = 1
    for dim in shape:
        elements *= max(dim, 1)
        if elements > MAX_ELEMENTS:
            raise wrong("the shape has more than 2^63 elements")
    size = data_bytes(dtype, shape)
    if size != offsets[1] - offsets[0]:
        raise wrong(f"{dtype} {shape} needs {size} bytes, the offsets span {offsets[1] - offsets[0]}")
    return TensorInfo(
        file=path.name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        stop=data_start + offsets[1],
    )


def _check_cover(tensors: Mapping[str, TensorInfo], data_start: int, file_size: int, path: Path) -> None:
    """The tensors must follow each other without gap from `data_start` to the end of the file."""
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.stop > file_size:
            raise HeaderError(
                f"the data ends at byte {info.stop}, the file at {file_size}", file=path, tensor=name, fix=_DOWNLOAD
            )
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise HeaderError(f"the data {kind} (byte {info.start}, not {end})", file=path, tensor=name, fix=_REWRITE)
        end = info.stop
    if end != file_size:
        raise HeaderError(
            f"{file_size - end} bytes follow the last tensor that no tensor owns", file=path, fix=_DOWNLOAD
        )

"""Frozen dataclasses to JSON and back, strictly: unknown keys, missing keys and wrong types are errors.

What lies in a file of its own is an `Artifact`, with kind and version in front. No torch here.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin

from moeq.errors import ArtifactError, OptionError, VersionError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """A dataclass, or any nesting of dataclasses, mappings and sequences, as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def canonical(value: Any) -> bytes:
    """The one JSON text of a value that hashes are taken of."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def decode(kind: type[T], data: Any, where: str = "$") -> T:
    """Build `kind` from JSON values.

    Args:
        kind: a dataclass, or a type made of str, int, float, bool, None, tuple, dict and unions.
        data: what json.loads returned.
        where: the path to `data`, for messages.

    Raises:
        ArtifactError: a key is missing or unknown, or a value has another type or is refused by its dataclass.
    """
    return typing.cast(T, _decode(kind, data, where))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(kind, data, where)
    if origin is tuple:
        return _decode_tuple(kind, data, where)
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            raise _mismatch(where, "an object", data)
        _, item = get_args(kind)
        return {key: _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    if kind is Any:
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is int and isinstance(data, bool):
        raise _mismatch(where, "int", data)
    if not isinstance(data, kind):
        raise _mismatch(where, kind.__name__, data)
    return data


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _mismatch(where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ArtifactError(f"unknown key {unknown[0]!r} at {where}", fix=f"known keys are {', '.join(fields)}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if missing:
        raise ArtifactError(f"missing key {missing[0]!r} at {where}", fix="write the artifact again")
    values = {name: _decode(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except OptionError as error:
        raise ArtifactError(f"{where}.{error.option}: {error.message}", fix=error.fix) from error


def _decode_union(kind: Any, data: Any, where: str) -> Any:
    failures = []
    for option in get_args(kind):
        if option is type(None):
            if data is None:
                return None
            continue
        try:
            return _decode(option, data, where)
        except ArtifactError as error:
            failures.append(error)
    raise failures[0] if failures else _mismatch(where, "null", data)


def _decode_tuple(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, list):
        raise _mismatch(where, "a list", data)
    args = get_args(kind)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(args) != len(data):
        raise _mismatch(where, f"{len(args)} items", data)
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))


def _mismatch(where: str, wanted: str, data: Any) -> ArtifactError:
    return ArtifactError(f"{where} must be {wanted}, not {str(data)[:40]!r}", fix="write the artifact again")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ArtifactError: the file is absent or unreadable, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError("the file does not exist", file=path, fix="check the path") from None
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", file=path, fix="check permissions") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, numbers too long, nesting too deep
        raise ArtifactError(f"not valid JSON: {error}", file=path, fix="write the file again") from error


class Artifact:
    """What all artifacts share: one JSON file each, with kind and version in front."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def validate(self) -> None:
        """Raise ArtifactError if the parts contradict each other."""
        raise NotImplementedError

    @property
    def hash(self) -> str:
        """sha256 of the artifact's canonical JSON."""
        return digest(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `kind` and `format_version`."""
        return {"kind": self.KIND, "format_version": self.VERSION, **encode(self)}

    @classmethod
    def from_dict(cls, data: Any, *, file: Path | None = None) -> Self:
        """Inverse of `to_dict`; validated.

        Raises:
            VersionError: written by a later version of moeq.
            ArtifactError: another kind of artifact, or malformed.
        """
        if not isinstance(data, dict) or data.get("kind") != cls.KIND:
            raise ArtifactError(f"not a moeq {cls.KIND}", file=file, fix=f"give a file that holds a {cls.KIND}")
        version = data.get("format_version")
        if version != cls.VERSION:
            raise VersionError(
                f"{cls.KIND} has format version {version!r}, this moeq reads {cls.VERSION}",
                file=file,
                fix="use the moeq version that wrote it, or write it again",
            )
        body = {key: value for key, value in data.items() if key not in ("kind", "format_version")}
        try:
            artifact = decode(cls, body)
            artifact.validate()
        except ArtifactError as error:
            if file is None or error.file is not None:
                raise
            raise type(error)(error.message, file=file, tensor=error.tensor, fix=error.fix) from error
        return artifact

    def save(self, path: Path) -> None:
        """Write the artifact as JSON."""
        self.validate()
        path.write_bytes(canonical(self.to_dict()) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate the artifact at `path`."""
        return cls.from_dict(read_json(path), file=path)

"""What all artifacts share: one JSON file each, with kind and version in front. No torch here."""

from pathlib import Path
from typing import Any, ClassVar, Self

from moeq import codec
from moeq.errors import ArtifactError, VersionError


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
        return codec.digest(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `kind` and `format_version`."""
        return {"kind": self.KIND, "format_version": self.VERSION, **codec.encode(self)}

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
            artifact = codec.decode(cls, body)
            artifact.validate()
        except ArtifactError as error:
            if file is None or error.file is not None:
                raise
            raise type(error)(error.message, file=file, tensor=error.tensor, fix=error.fix) from error
        return artifact

    def save(self, path: Path) -> None:
        """Write the artifact as JSON."""
        self.validate()
        path.write_bytes(codec.canonical(self.to_dict()) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate the artifact at `path`."""
        return cls.from_dict(codec.read_json(path), file=path)

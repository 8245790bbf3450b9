"""`moeq.json`: what a packed checkpoint holds and what each of its files must look like.

The file is the manifest's JSON with one more key, `sha256`: that of the canonical JSON (sorted keys, no spaces)
of everything else. It guards what nothing else can contradict, such as a shape whose bytes happen to be the same.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final

from moeq import codec
from moeq.checkpoint.write import FileDigest, write_file_atomic
from moeq.codec import Artifact
from moeq.errors import ArtifactError, PackedError
from moeq.layouts.base import part
from moeq.model_parts import PROJECTIONS
from moeq.spec import LAYOUTS

MANIFEST_NAME: Final = "moeq.json"

_HASH_KEY: Final = "sha256"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """One layer of packed experts.

    Attributes:
        path: module path of the experts; the tensors are `<path>.moeq_data` and `<path>.moeq_table`.
        num_experts: routed experts.
        projections: names of the matrices of an expert, in storage order.
        shapes: projection -> (N, K), output rows and input columns.
        concatenated: gate rows precede up rows in the model's fused output; else they alternate.
        transposed: the model's own stacked parameters are (E, K, N).
        layout: how the layer is stored, one of `moeq.spec.LAYOUTS`.
        attached: transformers' model has a module for it; else its bytes are for whoever has one.
        members: projection -> path of an expert's linear below `path`, "{expert}" for its number, where experts are
            modules of their own.
    """

    path: str
    num_experts: int
    projections: tuple[str, ...]
    shapes: dict[str, tuple[int, int]]
    concatenated: bool = True
    transposed: bool = False
    layout: str = "grouped"
    attached: bool = True
    members: dict[str, str] = field(default_factory=dict)

    @property
    def ordered_shapes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of each projection, in storage order."""
        return tuple(self.shapes[name] for name in self.projections)

    @property
    def named_shapes(self) -> dict[str, tuple[int, int]]:
        """Projection -> (N, K), in storage order; JSON objects have no order of their own."""
        return {name: self.shapes[name] for name in self.projections}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """A packed linear layer outside the experts.

    Attributes:
        path: its module path; the tensors are `<path>.moeq_data` and `<path>.moeq_table`.
        shape: (N, K).
    """

    path: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Artifact):
    """What a packed checkpoint holds.

    Attributes:
        moeq_version: version that wrote it.
        method: name of the method.
        plan_hash: hash of the plan that was carried out.
        model_hash: the source model.
        files: path inside the directory -> size and hash; everything but the manifest itself.
        layers: the packed layers of experts.
        dense: the packed linears.
        recipe: all options that the bytes depend on.
        calibration: which texts and seeds were used, None if none.
    """

    KIND: ClassVar[str] = "packed-checkpoint"

    moeq_version: str
    method: str
    plan_hash: str
    model_hash: str
    files: dict[str, FileDigest]
    layers: tuple[PackedLayer, ...]
    dense: tuple[PackedLinear, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None

    def validate(self) -> None:
        """Raise ArtifactError if the manifest contradicts itself or names files outside its directory."""
        for name, digest in self.files.items():
            if not _is_inside(name):
                raise ArtifactError(f"{name[:80]!r} is not a path inside the checkpoint", fix="download it again")
            if digest.bytes < 0 or not _SHA256.fullmatch(digest.sha256):
                raise ArtifactError(f"size or sha256 of file {name!r} is malformed", fix="download it again")
        paths = [layer.path for layer in self.layers] + [linear.path for linear in self.dense]
        if not paths or len(set(paths)) != len(paths):
            raise ArtifactError("a packed checkpoint needs packed layers, each named once", fix="download it again")
        for layer in self.layers:
            _check_layer(layer)
        for linear in self.dense:
            _check_shape(linear.path, linear.shape)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the packed checkpoint in `directory`.

    Raises:
        PackedError: there is none, or its content is not what was written.
        VersionError: a later moeq wrote it.
        ArtifactError: it is malformed.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise PackedError(f"not a packed checkpoint: no {MANIFEST_NAME}", file=path, fix="give a moeq output directory")
    data = codec.read_json(path)
    claimed = data.pop(_HASH_KEY, None) if isinstance(data, dict) else None
    manifest = Manifest.from_dict(data, file=path)
    try:
        actual = codec.digest(data)
    except (ValueError, RecursionError):  # NaN, or values nested too deeply: we never write those
        actual = ""
    if claimed != actual:
        raise PackedError("the manifest is not what moeq wrote", file=path, fix="download the checkpoint again")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a checkpoint: with it the checkpoint is complete.

    Raises:
        ArtifactError: the manifest contradicts itself.
        StorageError: the disk is full or refuses.
    """
    manifest.validate()
    data = manifest.to_dict()
    write_file_atomic(directory / MANIFEST_NAME, codec.canonical({**data, _HASH_KEY: codec.digest(data)}) + b"\n")


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    clean = bool(parts) and name == "/".join(parts) and not any(part in ("/", "..", ".") for part in parts)
    return clean and name.isprintable() and not any(char in name for char in "\\:") and name != MANIFEST_NAME


def _check_layer(layer: PackedLayer) -> None:
    if layer.num_experts < 1:
        raise ArtifactError(f"{layer.num_experts} experts", tensor=layer.path, fix="download it again")
    known = tuple(name for name in PROJECTIONS if name in layer.shapes)
    if layer.projections != known or len(known) != len(layer.shapes) or not known:
        raise ArtifactError(
            f"projections must be those of {', '.join(PROJECTIONS)} that have shapes, in this order",
            tensor=layer.path,
            fix="download it again",
        )
    for shape in layer.shapes.values():
        _check_shape(layer.path, shape)
    if layer.layout not in LAYOUTS:
        raise ArtifactError(f"layout {layer.layout!r} is not known", tensor=layer.path, fix="upgrade moeq")
    problem = part(layer.layout, "shape").problem(layer.shapes)
    if problem is not None:
        raise ArtifactError(problem, tensor=layer.path, fix="download it again")


def _check_shape(path: str, shape: tuple[int, int]) -> None:
    if min(shape) < 1 or max(shape) >= 2**31:
        raise ArtifactError(f"shape {list(shape)} is not that of a matrix", tensor=path, fix="download it again")

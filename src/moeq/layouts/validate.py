"""Proves a packed checkpoint before anything is loaded from it.

`validate_packed` is cheap (manifest, headers, tables) and runs at every load. `verify_files` reads every byte.
"""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moeq.checkpoint.read import Reader, read_headers
from moeq.checkpoint.write import FileDigest, hash_file
from moeq.errors import PackedError
from moeq.format.manifest import Manifest, read_manifest
from moeq.layouts.grouped.serving import check_records
from moeq.layouts.serving import Layout, Tables, layout
from moeq.spec import LAYOUTS, TensorInfo

_FIX: Final = "download the checkpoint again, or quantize the model again"


SUFFIXES: Final = tuple(sorted({suffix for name in LAYOUTS for suffix in layout(name).suffixes}))
"""Endings of the names of packed tensors, of all layouts."""


def validate_packed(directory: Path) -> Manifest:
    """Prove everything of a packed checkpoint but the content of its data; reads headers and tables only.

    Raises:
        PackedError: it is inconsistent.
        ArtifactError: the manifest is malformed (VersionError: of a later moeq).
        CheckpointError: a safetensors file is malformed (HeaderError) or absent (MissingTensorError).
    """
    manifest = read_manifest(directory)
    for name, digest in sorted(manifest.files.items()):
        _check_size(directory / name, digest)
    headers = read_headers(directory)
    for name in sorted({info.file for info in headers.values()} - set(manifest.files)):
        raise PackedError("the manifest does not list this file", file=directory / name, fix=_FIX)
    _check_names(headers, manifest)
    with Reader(directory, headers) as reader:
        tables = Tables(headers, reader)
        for layer in manifest.layers:
            layout(layer.layout).check(layer, tables)
        for linear in manifest.dense:
            check_records(linear.path, 1, (linear.shape,), tables)
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Hash every file that the manifest lists.

    Raises:
        PackedError: naming the first file (by name) that is absent, or differs in size or content.
    """
    for name, digest in sorted(manifest.files.items()):
        path = directory / name
        _check_size(path, digest)
        try:
            actual = hash_file(path)
        except OSError as error:
            raise PackedError(f"cannot be read: {error.strerror}", file=path, fix="check the disk") from error
        if actual != digest:
            raise PackedError(
                f"sha256 is {actual.sha256[:16]}..., the manifest says {digest.sha256[:16]}...", file=path, fix=_FIX
            )


def _check_size(path: Path, digest: FileDigest) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise PackedError(f"a listed file cannot be opened: {error.strerror}", file=path, fix=_FIX) from error
    if not stat.S_ISREG(info.st_mode):
        raise PackedError("a listed file is not a regular file", file=path, fix=_FIX)
    if info.st_size != digest.bytes:
        raise PackedError(f"the file has {info.st_size} bytes, the manifest says {digest.bytes}", file=path, fix=_FIX)


def _check_names(headers: Mapping[str, TensorInfo], manifest: Manifest) -> None:
    """Each packed tensor must belong to something in the manifest."""
    owned = {layer.path + suffix for layer in manifest.layers for suffix in layout(layer.layout).suffixes}
    owned |= {linear.path + suffix for linear in manifest.dense for suffix in Layout.suffixes}
    for name in sorted(headers):
        if name.endswith(SUFFIXES) and name not in owned:
            raise PackedError("the manifest does not know this packed tensor", tensor=name, fix=_FIX)

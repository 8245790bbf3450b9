"""Proves a packed checkpoint before anything is loaded from it.

`validate_packed` is cheap (manifest, headers, tables) and runs at every load. `verify_files` reads every byte.
"""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from moeq.checkpoint.read import Reader, read_headers
from moeq.checkpoint.write import FileDigest, hash_file
from moeq.errors import PackedError
from moeq.format.blob import DATA_SUFFIX, SIDES_SUFFIX, SUFFIXES, TABLE_SUFFIX, TILES_SUFFIX, Shapes, parse_table
from moeq.format.manifest import Manifest, read_manifest
from moeq.format.spectral import parse_spectral_table
from moeq.format.tiled import parse_tile_table
from moeq.spec import TABLE_COLUMNS, TensorInfo

_FIX: Final = "download the checkpoint again, or quantize the model again"


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
    packed = tuple(_packed_tensors(manifest))
    spectral = {layer.path: layer.spectral_shape for layer in manifest.layers if layer.layout == "spectral"}
    tiled = {layer.path: layer for layer in manifest.layers if layer.layout == "tiled"}
    _check_names(headers, {path for path, _, _ in packed} | set(spectral), set(tiled))
    with Reader(directory, headers) as reader:
        for path, shape in spectral.items():
            size = _expect(headers, path + DATA_SUFFIX, "U8", 1).shape[0]
            _expect(headers, path + TABLE_SUFFIX, "I64", 3)
            parse_spectral_table(reader.tensor(path + TABLE_SUFFIX), shape, size, tensor=path + TABLE_SUFFIX)
        for path, each in tiled.items():
            size = _expect(headers, path + SIDES_SUFFIX, "U8", 1).shape[0]
            _expect(headers, path + TILES_SUFFIX, "I64", 2)
            found = reader.tensor(path + TILES_SUFFIX)
            parse_tile_table(found, each.num_experts, each.named_shapes, size, tensor=path + TILES_SUFFIX)
        for path, num_experts, shapes in packed:
            data = _expect(headers, path + DATA_SUFFIX, "U8", 1)
            table = _expect(headers, path + TABLE_SUFFIX, "I64", 3)
            if table.shape != (num_experts, len(shapes), len(TABLE_COLUMNS)):
                raise PackedError(
                    f"the table has shape {list(table.shape)}, the manifest says {num_experts} experts "
                    f"with {len(shapes)} matrices",
                    tensor=path + TABLE_SUFFIX,
                    fix=_FIX,
                )
            parse_table(reader.tensor(path + TABLE_SUFFIX), shapes, data.shape[0], tensor=path + TABLE_SUFFIX)
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


def _packed_tensors(manifest: Manifest) -> Iterator[tuple[str, int, Shapes]]:
    """path, number of experts and shapes of everything packed in groups."""
    for layer in manifest.layers:
        if layer.layout in ("grouped", "tiled"):
            yield layer.path, layer.num_experts, layer.ordered_shapes
    for linear in manifest.dense:
        yield linear.path, 1, (linear.shape,)


def _check_size(path: Path, digest: FileDigest) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise PackedError(f"a listed file cannot be opened: {error.strerror}", file=path, fix=_FIX) from error
    if not stat.S_ISREG(info.st_mode):
        raise PackedError("a listed file is not a regular file", file=path, fix=_FIX)
    if info.st_size != digest.bytes:
        raise PackedError(f"the file has {info.st_size} bytes, the manifest says {digest.bytes}", file=path, fix=_FIX)


def _check_names(headers: Mapping[str, TensorInfo], paths: set[str], tiled: set[str]) -> None:
    """Each packed tensor must belong to something in the manifest."""
    for name in sorted(headers):
        for suffix in SUFFIXES:
            owners = tiled if suffix in (SIDES_SUFFIX, TILES_SUFFIX) else paths
            if name.endswith(suffix) and name.removesuffix(suffix) not in owners:
                raise PackedError("the manifest does not know this packed tensor", tensor=name, fix=_FIX)


def _expect(headers: Mapping[str, TensorInfo], name: str, dtype: str, num_dims: int) -> TensorInfo:
    info = headers.get(name)
    if info is None:
        raise PackedError("a packed tensor is missing", tensor=name, fix=_FIX)
    if info.dtype != dtype or len(info.shape) != num_dims:
        raise PackedError(
            f"the tensor is {info.dtype} {list(info.shape)}, not {dtype} with {num_dims} dimensions",
            tensor=name,
            fix=_FIX,
        )
    return info

"""Writes a packed checkpoint in a format that other programs run without moeq."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.checkpoint.read import Reader, file_bytes, read_headers
from moeq.checkpoint.write import Declared, ShardWriter, copy_sidecars, write_file_atomic, write_index
from moeq.errors import InternalError, OptionError
from moeq.format.manifest import Manifest
from moeq.format.records import decode_matrix
from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.layouts.grouped.stored import parse_table
from moeq.layouts.validate import SUFFIXES, validate_packed
from moeq.option_values import choose
from moeq.progress import Progress
from moeq.spec import QuantSpec
from moeq.version import __version__
from moeq.writing import compressed_tensors as target
from moeq.writing.directory import all_or_nothing, building, publish
from moeq.writing.other_files import HOOK_NAME, OWN_FILES

FORMS: Final = ("compressed-tensors",)
CARD_NAME: Final = "README.md"
Weights = dict[str, PackedMatrix]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written; field names are those of the JSON document (docs/json.md).

    Attributes:
        output: the directory.
        form: its format.
        stored_bytes: of its weight files.
        packed_bytes: of those that it was made from.
        widths: code bits of the experts, layer by layer.
        checked: matrices that were read back and are what was packed.
    """

    output: str
    form: str
    stored_bytes: int
    packed_bytes: int
    widths: tuple[int, ...]
    checked: int
    seconds: float


def run(
    directory: str | Path, out: str | Path, *, form: str = "compressed-tensors", progress: Progress | None = None
) -> ExportReport:
    """Write a packed checkpoint as integers and scales of compressed-tensors, the same weights bit for bit.

    Args:
        directory: what `moeq quantize --serve vllm-native` wrote.
        out: the directory to make.
        form: one of `FORMS`.
        progress: called as layers are written.

    Raises:
        OptionError: the format cannot hold a layer, or the family's names are not known; it says what would fit.
        PackedError: `directory` is no packed checkpoint, or is damaged.
        OutputError, StorageError: `out` cannot be written.
    """
    choose("form", form, FORMS)
    begun = time.monotonic()
    source, out = Path(directory), Path(os.path.abspath(out))
    manifest = validate_packed(source)
    config = read_config(source / CONFIG_NAME)
    headers = read_headers(source)
    with Reader(source, headers) as reader:
        packed = {path: _opened(reader, path, shapes) for path, shapes in _paths(manifest).items()}
        specs = {path: _one_spec(path, layer) for path, layer in packed.items()}
        names = {path: list(_named(config["model_type"], manifest, path, packed[path])) for path in packed}
        for path, weights in names.items():
            for name, matrix in weights:
                target.check_spec(name, specs[path], matrix.shape)
        stored = file_bytes(source, headers)
        needed = stored + stored // 50
        with building(source, out, resume=False, needed_bytes=needed) as partial, all_or_nothing(partial):
            places = _write(reader, partial, names, progress)
            copy_sidecars(source, partial, skip=(*OWN_FILES, CARD_NAME, CONFIG_NAME))
            write_index(partial, places, _total(partial))
            text = json.dumps(_config(config, manifest, specs), indent=2) + "\n"
            write_file_atomic(partial / CONFIG_NAME, text.encode())
            write_file_atomic(partial / CARD_NAME, _card(out.name, manifest).encode())
            checked = _check(partial, names)
            publish(partial, out)
    return ExportReport(
        output=str(out),
        form=form,
        stored_bytes=file_bytes(out, read_headers(out)),
        packed_bytes=stored,
        widths=tuple(specs[layer.path].bits for layer in manifest.layers),
        checked=checked,
        seconds=time.monotonic() - begun,
    )


def _paths(manifest: Manifest) -> dict[str, dict[str, tuple[int, int]]]:
    """Path of what is packed -> its shapes, those of a linear under the name ""."""
    for layer in manifest.layers:
        if layer.layout != "grouped":
            message = f"{layer.path}: compressed-tensors holds no layers of the layout {layer.layout}"
            raise OptionError(message, option="serve", fix="quantize with --method auto --serve vllm-native")
    return {layer.path: layer.named_shapes for layer in manifest.layers} | {
        linear.path: {"": linear.shape} for linear in manifest.dense
    }


def _opened(reader: Reader, path: str, shapes: dict[str, tuple[int, int]]) -> PackedLayer:
    data, table = reader.tensor(path + DATA_SUFFIX), reader.tensor(path + TABLE_SUFFIX)
    entries = parse_table(table, list(shapes.values()), data.numel(), tensor=path + TABLE_SUFFIX)
    return PackedLayer(data=data, entries=entries, shapes=shapes)


def _one_spec(path: str, layer: PackedLayer) -> QuantSpec:
    specs = {spec for expert in layer.entries for _, spec in expert}
    if len(specs) > 1:
        widths = ", ".join(str(spec.bits) for spec in sorted(specs))
        message = f"{path}: its experts have {widths} bits, compressed-tensors has one width for a layer"
        raise OptionError(message, option="serve", fix="quantize with --serve vllm-native")
    return specs.pop()


def _named(model_type: str, manifest: Manifest, path: str, layer: PackedLayer) -> Iterator[tuple[str, PackedMatrix]]:
    """Module as files name it -> its matrix."""
    if "" in layer.shapes:
        offset, spec = layer.entries[0][0]
        yield path, PackedMatrix(record=layer.data[offset:], spec=spec, shape=layer.shapes[""])
        return
    for expert in range(layer.num_experts):
        for projection in layer.shapes:
            yield target.expert_name(model_type, path, expert, projection), layer.matrix(expert, projection)


def _write(
    reader: Reader,
    partial: Path,
    names: Mapping[str, list[tuple[str, PackedMatrix]]],
    progress: Progress | None,
) -> dict[str, str]:
    """Write every file again, with what is packed in the other format; tensor -> file."""
    places: dict[str, str] = {}
    files = sorted({info.file for info in reader.headers.values()})
    for number, file in enumerate(files, start=1):
        inside = sorted((info.start, name) for name, info in reader.headers.items() if info.file == file)
        copied = [name for _, name in inside if not name.endswith(SUFFIXES)]
        packed = [
            pair for _, name in inside if name.endswith(DATA_SUFFIX) for pair in names[name.removesuffix(DATA_SUFFIX)]
        ]
        tensors: list[Declared] = [(name, reader.info(name).dtype, reader.info(name).shape) for name in copied]
        for name, matrix in packed:
            tensors += target.declared(name, matrix.spec, matrix.shape)
        with ShardWriter(partial / file, tensors) as writer:
            for name in copied:
                writer.write(name, reader.chunks(name))
            for name, matrix in packed:
                parts = target.declared(name, matrix.spec, matrix.shape)
                for (part, _, _), value in zip(parts, target.tensors(matrix), strict=True):
                    writer.write(part, value)
        places |= dict.fromkeys((name for name, _, _ in tensors), file)
        if progress is not None:
            progress("shards", number, len(files))
    return places


def _total(partial: Path) -> int:
    return sum(path.stat().st_size for path in partial.glob("*.safetensors"))


def _config(config: dict[str, Any], manifest: Manifest, specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    ours = config["quantization_config"]
    hook = HOOK_NAME.removesuffix(".py")
    own = {key: value for key, value in config.get("auto_map", {}).items() if not str(value).startswith(hook)}
    rest = {key: value for key, value in config.items() if key != "auto_map"} | ({"auto_map": own} if own else {})
    outside = {layer.path: target.experts_path(config["model_type"], layer.path) for layer in manifest.layers}
    modules = {outside.get(path, path): spec for path, spec in specs.items()}
    ignored = [path for path in ours["modules_to_not_convert"] if path not in specs]
    return rest | {"quantization_config": target.quantization_config(modules, ignored, __version__)}


def _card(name: str, manifest: Manifest) -> str:
    return (
        f"# {name}\n\nExperts as `compressed-tensors` (`pack-quantized`), one width for each layer, written by moeq "
        f"{__version__} from a checkpoint of the method {manifest.method}.\n\n"
        f"```bash\nvllm serve {name}\n```\n\nvLLM's own kernels take 4 and 8 bits; other widths need its extra "
        "package humming-kernels and a GPU. transformers loads all of them with compressed-tensors installed.\n"
    )


def _check(partial: Path, names: Mapping[str, list[tuple[str, PackedMatrix]]]) -> int:
    """Read back the first and the last matrix of everything packed.

    Raises:
        InternalError: one of them is not what was packed.
    """
    checked = 0
    with Reader(partial) as reader:
        for weights in names.values():
            for name, matrix in (weights[0], weights[-1])[: len(weights)]:
                wanted: Tensor = decode_matrix(matrix.record, matrix.spec, matrix.shape)
                found = reader.tensor(f"{name}.weight")
                if not torch.equal(found, wanted.to(found.dtype)):
                    raise InternalError(f"{name} reads back as something else", fix="report this as a bug")
                checked += 1
    return checked

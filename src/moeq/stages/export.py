"""Writes a packed checkpoint in a format that other programs run without moeq."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial as partial_of
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
from moeq.writing import gguf_facts, gguf_file
from moeq.writing.directory import all_or_nothing, building, one_file, publish
from moeq.writing.other_files import HOOK_NAME, OWN_FILES

FORMS: Final = {"compressed-tensors": "vllm-native", "gguf": "gguf"}
"""Format -> what `moeq quantize --serve` is to be told for it."""
EMBEDDINGS: Final = (16, 8, 6, 5, 4, 3, 2)
CARD_NAME: Final = "README.md"
Weights = dict[str, PackedMatrix]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written; field names are those of the JSON document (docs/json.md).

    Attributes:
        output: the directory, or file.
        form: its format.
        stored_bytes: of its weight files.
        packed_bytes: of those that it was made from.
        widths: code bits of the experts, layer by layer; the least where gate, up and down differ.
        types: gguf: tensor -> its type, as `llama-quantize --tensor-type` takes them.
        checked: matrices that were read back and are what was packed.
    """

    output: str
    form: str
    stored_bytes: int
    packed_bytes: int
    widths: tuple[int, ...]
    types: dict[str, str]
    checked: int
    seconds: float


def run(
    directory: str | Path,
    out: str | Path,
    *,
    form: str = "compressed-tensors",
    like: str | Path | None = None,
    embeddings: int = 8,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a packed checkpoint in a format of other programs, the same weights bit for bit.

    Args:
        directory: what `moeq quantize` wrote, with --serve vllm-native or gguf.
        out: the directory to make; for gguf the file.
        form: one of `FORMS`.
        like: gguf: a file of the same model that everything which is not packed is taken from.
        embeddings: gguf: bits of the tables of tokens, 16 for as they are.
        progress: called as parts are written.

    Raises:
        OptionError: the format cannot hold a layer, or the family's names are not known; it says what would fit.
        PackedError: `directory` is no packed checkpoint, or is damaged.
        CheckpointError: the file that is to be like cannot be read, or the package gguf is missing.
        OutputError, StorageError: `out` cannot be written.
    """
    choose("form", form, tuple(FORMS))
    choose("embeddings", embeddings, EMBEDDINGS)
    if like is not None and form != "gguf":
        raise OptionError("it has no effect on this format", option="like", fix="drop it, or export gguf")
    begun = time.monotonic()
    source, out = Path(directory), Path(os.path.abspath(out))
    manifest = validate_packed(source)
    headers = read_headers(source)
    with Reader(source, headers) as reader:
        packed = {path: _opened(reader, path, shapes) for path, shapes in _paths(manifest, form).items()}
        job = _Job(source=source, out=out, manifest=manifest, reader=reader, packed=packed, progress=progress)
        if form == "gguf":
            stored, widths, types, checked = _gguf(job, None if like is None else Path(like), embeddings)
        else:
            stored, widths, types, checked = _compressed(job)
    return ExportReport(
        output=str(out),
        form=form,
        stored_bytes=stored,
        packed_bytes=file_bytes(source, headers),
        widths=widths,
        types=types,
        checked=checked,
        seconds=time.monotonic() - begun,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """What every format is made from.

    Attributes:
        packed: path of a layer, or of a linear outside the experts -> its records.
    """

    source: Path
    out: Path
    manifest: Manifest
    reader: Reader
    packed: dict[str, PackedLayer]
    progress: Progress | None


_Done = tuple[int, tuple[int, ...], dict[str, str], int]
"""Stored bytes, narrowest code of each layer, types by name, matrices that were read back."""


def _compressed(job: _Job) -> _Done:
    """Integers and scales in a directory as the original's."""
    source, manifest, packed = job.source, job.manifest, job.packed
    config = read_config(source / CONFIG_NAME)
    specs = {path: _one_spec(path, layer) for path, layer in packed.items()}
    names = {path: list(_named(config["model_type"], manifest, path, packed[path])) for path in packed}
    for path, weights in names.items():
        for name, matrix in weights:
            target.check_spec(name, specs[path], matrix.shape)
    stored = file_bytes(source, job.reader.headers)
    with (
        building(source, job.out, resume=False, needed_bytes=stored + stored // 50) as partial,
        all_or_nothing(partial),
    ):
        places = _write(job.reader, partial, names, job.progress)
        copy_sidecars(source, partial, skip=(*OWN_FILES, CARD_NAME, CONFIG_NAME))
        write_index(partial, places, _total(partial))
        text = json.dumps(_config(config, manifest, specs), indent=2) + "\n"
        write_file_atomic(partial / CONFIG_NAME, text.encode())
        write_file_atomic(partial / CARD_NAME, _card(job.out.name, manifest).encode())
        checked = _check(partial, names)
        publish(partial, job.out)
    widths = tuple(specs[layer.path].bits for layer in manifest.layers)
    return file_bytes(job.out, read_headers(job.out)), widths, {}, checked


def _gguf(job: _Job, like: Path | None, bits: int) -> _Done:
    """One file for llama.cpp."""
    config = read_config(job.source / CONFIG_NAME)
    config = config.get("text_config") or config
    rest = None if like is None else gguf_file.Like(like)
    arch = gguf_facts.architecture(config["model_type"]) if rest is None else rest.architecture
    table = gguf_facts.names(arch, int(config["num_hidden_layers"]))
    parts: dict[str, tuple[PackedLayer, str]] = {}
    for path, layer in job.packed.items():
        if "" in layer.shapes:
            parts |= dict.fromkeys(gguf_facts.tensor_names(iter([f"{path}.weight"]), table).values(), (layer, ""))
        else:
            named = gguf_file.expert_names(path, list(layer.shapes))
            parts |= {name: (layer, projection) for projection, name in named.items()}
    ours = {name: gguf_file.packed_entries(name, layer, which) for name, (layer, which) in parts.items()}
    if rest is not None:
        entries = list(rest.entries(ours, bits))
        for name, (layer, which) in parts.items():
            rest.check(name, gguf_file.first_matrix(layer, which), 0 if which else None)
        facts: Callable[[Any], None] = rest.facts
    else:
        keys = (name for name in job.reader.headers if not name.endswith(SUFFIXES))
        entries = [*ours.values(), *gguf_file.beside(job.reader, gguf_facts.tensor_names(keys, table), bits)]
        facts = partial_of(gguf_facts.add, config=config, directory=job.source)
    with one_file(job.source, job.out, sum(entry.size for entry in entries)) as unfinished:
        gguf_file.write(unfinished, arch, facts, entries, job.progress)
        checked = gguf_file.check(unfinished, parts)
    widths = tuple(
        min(spec.bits for expert in job.packed[layer.path].entries for _, spec in expert)
        for layer in job.manifest.layers
    )
    return job.out.stat().st_size, widths, gguf_file.tensor_types(entries), checked


def _paths(manifest: Manifest, form: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Path of what is packed -> its shapes, those of a linear under the name ""."""
    for layer in manifest.layers:
        if layer.layout != "grouped":
            message = f"{layer.path}: {form} holds no layers of the layout {layer.layout}"
            raise OptionError(message, option="serve", fix=f"quantize with --method auto --serve {FORMS[form]}")
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

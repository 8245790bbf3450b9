"""GGUF files for llama.cpp and what is built on it: packed matrices as they are, everything else from beside them.

What is not packed, names, hyperparameters and tokenizer come from a GGUF file of the same model that llama.cpp's
converter made, or, for families in `moeq.writing.gguf_facts`, from the checkpoint itself.

Legend: E experts, N output rows, K input columns.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeq import blocks
from moeq.checkpoint.read import Reader
from moeq.errors import CheckpointError, InternalError, OptionError
from moeq.format.records import decode_matrix
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.progress import Progress
from moeq.quantizers.ggml import fit
from moeq.spec import block_type
from moeq.version import __version__
from moeq.writing import gguf_facts

EMBEDDINGS: Final = ("token_embd.weight", "output.weight")
"""Tensors with a row for each token."""
ALIKE: Final = 0.5
"""Least cosine between what was packed and the same matrix of the file that the rest is taken from."""
OURS: Final = ("general.architecture", "general.file_type", "general.quantization_version", "general.quantized_by")
"""Facts that are not taken over."""
ROWS: Final = 8192
"""Rows of an embedding that are rounded at a time."""
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor of the file to be.

    Attributes:
        name: in GGUF.
        kind: its type as a number of ggml.
        kind_name: the same in words.
        shape: of the weights, rows outermost.
        size: bytes.
        data: its bytes, made when they are written.
    """

    name: str
    kind: int
    kind_name: str
    shape: tuple[int, ...]
    size: int
    data: Callable[[], Array]


def packed_entries(name: str, layer: PackedLayer, projection: str) -> Entry:
    """One projection of a layer's experts, or a linear, as a tensor.

    Raises:
        OptionError: its matrices are no blocks of ggml, or of more than one type.
    """
    matrices = (
        [layer.matrix(expert, projection) for expert in range(layer.num_experts)] if projection else [_only(layer)]
    )
    kinds = {None if not each.spec.in_blocks else blocks.kind_of(each.spec, each.shape[1]) for each in matrices}
    kind = kinds.pop()
    if kinds or kind is None:
        what = "is of several widths" if kinds else "is not stored in types of ggml"
        raise OptionError(f"{name} {what}", option="serve", fix="quantize with --serve gguf")
    rows, columns = matrices[0].shape
    width = columns // kind.weights * kind.size

    def data() -> Array:
        stored = torch.stack([each.record[: rows * width].view(rows, width) for each in matrices])
        return stored.numpy() if projection else stored[0].numpy()

    return Entry(
        name=name,
        kind=kind.number,
        kind_name=kind.name,
        shape=(len(matrices), rows, columns) if projection else (rows, columns),
        size=len(matrices) * rows * width,
        data=data,
    )


def _only(layer: PackedLayer) -> PackedMatrix:
    """The matrix of a linear outside the experts."""
    offset, spec = layer.entries[0][0]
    return PackedMatrix(record=layer.data[offset:], spec=spec, shape=layer.shapes[""])


def expert_names(path: str, projections: list[str]) -> dict[str, str]:
    """Projection -> its tensor.

    Raises:
        OptionError: the path has no number of a block.
    """
    found = re.findall(r"\.(\d+)\.", f".{path}.")
    if not found:
        raise OptionError(f"{path} is in no numbered block", option="form", fix="export another model")
    return {each: f"blk.{found[-1]}.ffn_{each}_exps.weight" for each in projections}


def plain_entry(name: str, value: Callable[[], Tensor], dtype: str, shape: tuple[int, ...]) -> Entry:
    """A tensor that was not packed: matrices in their own dtype, vectors and routers in float32."""
    small = len(shape) < 2 or "ffn_gate_inp" in name or dtype == "F32"
    kind, number, size = ("F32", 0, 4) if small else (dtype, {"F16": 1, "BF16": 30}[dtype], 2)

    def data() -> Array:
        found = value().reshape(shape)
        return found.float().numpy() if small else found.contiguous().view(torch.int16).numpy()

    count = int(np.prod(shape))
    return Entry(name=name, kind=number, kind_name=kind, shape=shape, size=count * size, data=data)


def rounded_entry(entry: Entry, bits: int, value: Callable[[], Tensor]) -> Entry:
    """An embedding rounded to the type of a width, without data."""
    rows, columns = entry.shape
    kind = block_type(bits, columns)

    def data() -> Array:
        w_NK, weight_K = value(), torch.ones(columns)
        return torch.cat([blocks.pack(fit(part.float(), kind, weight_K), kind) for part in w_NK.split(ROWS)]).numpy()

    size = rows * columns // kind.weights * kind.size
    return Entry(name=entry.name, kind=kind.number, kind_name=kind.name, shape=entry.shape, size=size, data=data)


def beside(reader: Reader, names: Mapping[str, str], bits: int) -> Iterator[Entry]:
    """Entries of the tensors of a checkpoint that are not packed.

    Args:
        reader: of the checkpoint.
        names: tensor -> its name in GGUF.
        bits: width of embeddings; 16 leaves them as they are.
    """
    for key, name in names.items():
        info = reader.info(key)
        shape = tuple(side for side in info.shape if side != 1) if "gate_inp_shexp" in name else info.shape
        entry = plain_entry(name, partial(reader.tensor, key), info.dtype, shape)
        if name in EMBEDDINGS and bits < 16:
            entry = rounded_entry(entry, bits, partial(reader.tensor, key))
        yield entry


class Like:
    """A GGUF file of the same model, that everything but packed matrices is taken from.

    Raises:
        CheckpointError: it cannot be read, or is one of several parts.
    """

    def __init__(self, path: Path) -> None:
        gguf = gguf_facts.package()
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader checks little, and fails wherever it stumbles
            message = f"this is no GGUF file that can be read: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(message, file=path, fix="give a file that llama.cpp's converter made") from error
        self._path = path
        self.tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}
        self.architecture = str(self.field("general.architecture"))
        if self.field("split.count") not in (None, 0, 1):
            raise CheckpointError("this is one of several parts", file=path, fix="join them with llama-gguf-split")

    def field(self, name: str) -> Any:
        """A value of the metadata, None if there is none."""
        found = self._reader.get_field(name)
        return None if found is None else found.contents()

    def facts(self, writer: Any) -> None:
        """Copy the metadata."""
        kinds = gguf_facts.package().GGUFValueType
        for field in self._reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in OURS:
                continue
            inner = field.types[-1] if field.types[0] == kinds.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)

    def entries(self, ours: Mapping[str, Entry], bits: int) -> Iterator[Entry]:
        """All its tensors, ours in the place of its own.

        Raises:
            OptionError: it lacks one of ours, or has it in another shape.
        """
        for name, entry in ours.items():
            if name not in self.tensors or self._shape(name) != entry.shape:
                shape = self._shape(name) if name in self.tensors else "no such tensor"
                message = f"{self._path.name}: {name} is {list(entry.shape)} here, {shape} there"
                raise OptionError(message, option="like", fix="give a GGUF file of the model that was packed")
        for name, tensor in self.tensors.items():
            if name in ours:
                yield ours[name]
                continue
            copied = Entry(
                name=name,
                kind=int(tensor.tensor_type),
                kind_name=tensor.tensor_type.name,
                shape=self._shape(name),
                size=int(tensor.n_bytes),
                data=partial(getattr, tensor, "data"),
            )
            small = name in EMBEDDINGS and bits < 16 and copied.kind_name in ("F32", "F16", "BF16")
            yield rounded_entry(copied, bits, partial(self.values, name)) if small else copied

    def values(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor, or an expert's part of it, float32."""
        tensor = self.tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        return torch.from_numpy(gguf_facts.package().quants.dequantize(data, tensor.tensor_type).copy())

    def check(self, name: str, packed: PackedMatrix, expert: int | None) -> None:
        """Prove that a matrix is the one that was packed.

        Raises:
            OptionError: it is another one, or its rows are in another order.
        """
        ours = decode_matrix(packed.record, packed.spec, packed.shape).flatten()
        theirs = self.values(name, expert).flatten()
        if float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) < ALIKE:
            fix = "give a GGUF file of the model that was packed"
            fix += "" if expert is not None else "; families whose q and k llama.cpp reorders need --dense-bits 16"
            raise OptionError(f"{self._path.name}: {name} is another matrix than was packed", option="like", fix=fix)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(side) for side in reversed(self.tensors[name].shape))


def write(
    path: Path, architecture: str, facts: Callable[[Any], None], entries: list[Entry], progress: Progress | None = None
) -> None:
    """Write a file, one tensor in memory at a time.

    Args:
        path: where.
        architecture: its name in GGUF.
        facts: adds the metadata to a `gguf.GGUFWriter`.
        entries: the tensors.
        progress: called as they are written.
    """
    gguf = gguf_facts.package()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        facts(writer)
        writer.add_string("general.quantized_by", f"moeq {__version__}")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for entry in entries:
            # Of a shape in weights: numpy's dtype only must not be uint8, which would stand for a shape in bytes.
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), entry.size, gguf.GGMLQuantizationType(entry.kind)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, entry in enumerate(entries, start=1):
            writer.write_tensor_data(np.ascontiguousarray(entry.data()))
            if progress is not None:
                progress("tensors", number, len(entries))
    finally:
        writer.close()


def check(path: Path, packed: Mapping[str, tuple[PackedLayer, str]]) -> int:
    """Read back the first and the last matrix of every packed tensor by the package gguf.

    Raises:
        InternalError: one is not what was packed.
    """
    gguf = gguf_facts.package()
    tensors = {str(tensor.name): tensor for tensor in gguf.GGUFReader(path).tensors}
    checked = 0
    for name, (layer, projection) in packed.items():
        for expert in {0, layer.num_experts - 1} if projection else {None}:
            matrix = _only(layer) if expert is None else layer.matrix(expert, projection)
            data = tensors[name].data if expert is None else tensors[name].data[expert]
            found = torch.from_numpy(gguf.quants.dequantize(data, tensors[name].tensor_type).copy())
            if not torch.equal(found, decode_matrix(matrix.record, matrix.spec, matrix.shape)):
                raise InternalError(f"{name} reads back as something else", fix="report this as a bug")
            checked += 1
    return checked


def first_matrix(layer: PackedLayer, projection: str) -> PackedMatrix:
    """The matrix that `Like.check` compares."""
    return layer.matrix(0, projection) if projection else _only(layer)


def tensor_types(entries: list[Entry]) -> dict[str, str]:
    """Tensor -> its type, as `llama-quantize --tensor-type` takes them; only those in blocks."""
    return {each.name: each.kind_name.lower() for each in entries if each.kind_name not in ("F32", "F16", "BF16")}

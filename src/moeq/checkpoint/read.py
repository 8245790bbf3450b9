"""Reads a source checkpoint tensor by tensor, or only the slice that one expert needs.

`Reader` uses positioned reads (`preadv`) into fresh buffers, not a memory map. Mapped pages count as resident
memory until the kernel takes them back, a mapped file that shrinks kills the process with SIGBUS, and the
network file systems that checkpoints often lie on fault slowly. A positioned read holds exactly the bytes
asked for, gives them back with the tensor, needs no shared file position (so threads may share a Reader),
and turns a file that shrinks into an error. The price is one copy out of the page cache.

Legend: N output rows, K input columns.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

import torch
from torch import Tensor

from moeq.checkpoint.dtypes import DTYPE_BITS, TORCH_DTYPES, WEIGHT_DTYPES
from moeq.checkpoint.header import unreadable
from moeq.checkpoint.locate import CONFIG_NAME, read_config, stored_headers
from moeq.checkpoint.rounded.registry import decode, facts_of, unrounded
from moeq.errors import CheckpointError, HeaderError, MissingTensorError, TensorError
from moeq.model_parts import MatrixSource
from moeq.spec import TensorInfo

CHUNK_BYTES: Final = 16 * 2**20

_BAD_VALUES: Final = "download the file again, or get a checkpoint that was saved without overflow"


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint: `model.safetensors`, else `model.safetensors.index.json` and its shards.

    Tensors that lie in a shard but not in the index are included, since nothing may be lost silently. Weights that were
    rounded before (`quantization_config`) are listed as what they decode to.

    Raises:
        MissingTensorError: the index names a file that is absent or a tensor that its file lacks.
        HeaderError: a file or the index is malformed.
        AlreadyQuantizedError, TensorError: it was rounded in a way that moeq does not read.
        CheckpointError: there are no safetensors files, or they cannot be read.
    """
    stored = stored_headers(directory)
    try:
        config = read_config(directory / CONFIG_NAME)
    except CheckpointError:  # whoever needs the config will say so
        return stored
    if facts_of(config) is None:
        return stored
    if any(info.rounded is not None for info in stored.values()):
        return stored  # GGUF: listed as what it decodes to
    with Reader(directory, stored) as reader:
        return unrounded(config, stored, reader.tensor, directory / CONFIG_NAME)


def file_bytes(directory: Path, headers: Mapping[str, TensorInfo]) -> int:
    """Bytes of the files that hold these tensors of a checkpoint."""
    return sum((directory / file).stat().st_size for file in {info.file for info in headers.values()})


@final
class Reader:
    """Gives tensors of a checkpoint, one at a time; use it as a context manager.

    Threads may share a Reader. What it returns owns its memory: nothing stays resident once it is dropped.

    Args:
        directory: the checkpoint.
        headers: what `read_headers` returned for it, if already read.
    """

    def __init__(self, directory: Path, headers: Mapping[str, TensorInfo] | None = None) -> None:
        self._files: dict[str, int] = {}
        self._directory = directory
        self._headers = dict(headers) if headers is not None else read_headers(directory)
        self._lock = threading.Lock()
        self._closed = False

    def __reduce__(self) -> tuple[type["Reader"], tuple[Path, dict[str, TensorInfo]]]:
        """Another process opens the files again."""
        return Reader, (self._directory, self._headers)

    @property
    def headers(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint."""
        return self._headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """Those that another process opened are closed by nobody else."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def close(self) -> None:
        """Close all files; no thread may be reading any more."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor.

        Raises:
            MissingTensorError: there is none of that name.
        """
        try:
            return self._headers[name]
        except KeyError:
            raise MissingTensorError(
                "the checkpoint has no such tensor", file=self._directory, tensor=name, fix="download it again"
            ) from None

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in its own dtype and shape.

        Raises:
            MissingTensorError: there is none of that name.
            TensorError: torch has no such dtype.
            HeaderError: the file changed since its header was read.
            CheckpointError: the file cannot be read.
        """
        info = self.info(name)
        if info.rounded is not None:
            return self._decoded(name, info).to(TORCH_DTYPES[info.dtype])
        if info.dtype not in TORCH_DTYPES:
            raise TensorError(
                f"cannot compute with {info.dtype}", tensor=name, fix="convert the checkpoint to bfloat16"
            )
        return self._read(info, 0, info.stop - info.start).view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of a whole tensor, for verbatim copies; raises as `tensor` does, but knows every dtype."""
        info = self.info(name)
        if info.rounded is not None:
            return bytes_of(self.tensor(name))
        return self._read(info, 0, info.stop - info.start).numpy().data.toreadonly()

    def chunks(self, name: str, size: int = CHUNK_BYTES, *, check_nan: bool = False) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces of `size`, so that a copy never holds the tensor.

        Args:
            name: the tensor.
            size: bytes of a piece, a multiple of 8 if `check_nan`.
            check_nan: look for NaN in 16-bit floats and wider ones; infinity is let pass, masks may hold it.

        Raises:
            TensorError: there is a NaN.
            MissingTensorError, HeaderError, CheckpointError: as `raw`.
        """
        info = self.info(name)
        if info.rounded is not None:
            yield from self._decoded_chunks(name, info)
            return
        total = info.stop - info.start
        for start in range(0, total, size):
            piece = self._read(info, start, min(size, total - start))
            if check_nan and info.dtype in WEIGHT_DTYPES and has_nan(piece.view(TORCH_DTYPES[info.dtype])):
                raise TensorError(
                    "the weights hold NaN", file=self._directory / info.file, tensor=name, fix=_BAD_VALUES
                )
            yield piece.numpy().data.toreadonly()

    def matrix(self, source: MatrixSource, expert: int, shape: tuple[int, int], *, check_finite: bool = True) -> Tensor:
        """One expert's matrix, contiguous, in the dtype of the checkpoint; reads only what it needs.

        Args:
            source: where the layer's matrices lie.
            expert: index inside the layer.
            shape: the (N, K) expected.
            check_finite: look for NaN and infinity.

        Raises:
            TensorError: wrong dtype or shape, or a value is NaN or infinite.
            MissingTensorError: there is no such tensor.
            HeaderError: the file changed since its header was read.
            CheckpointError: the file cannot be read.
        """
        name = source.tensor(expert)
        info = self.info(name)
        rows, columns = _expert_shape(source, expert, shape, info, name)
        if info.rounded is not None:
            stored = self._decoded(name, info, expert + source.expert_offset if source.stacked else None)
            return self._checked(_chosen(stored, source, shape), info, name, source, expert, check_finite)
        dtype = TORCH_DTYPES[info.dtype]
        row_bytes = columns * DTYPE_BITS[info.dtype] // 8
        first, last = 0, rows
        step = source.start, source.start + source.step * (shape[0] - 1) + 1, source.step
        if not source.transposed:  # rows lie one after the other: read no more than the span they take
            first, last = step[0], step[1]
            step = 0, last - first, source.step
        slice_start = (expert + source.expert_offset) * rows if source.stacked else 0
        data = self._read(info, (slice_start + first) * row_bytes, (last - first) * row_bytes)
        stored = data.view(dtype).view(last - first, columns)
        w_NK = (stored.t() if source.transposed else stored)[slice(*step)].contiguous()
        return self._checked(w_NK, info, name, source, expert, check_finite)

    def _checked(
        self, w_NK: Tensor, info: TensorInfo, name: str, source: MatrixSource, expert: int, check_finite: bool
    ) -> Tensor:
        if check_finite and not is_finite(w_NK):
            where = f" of expert {expert}" if source.stacked else ""
            raise TensorError(
                f"the weights{where} hold NaN or infinity",
                file=self._directory / info.file,
                tensor=name,
                fix=_BAD_VALUES,
            )
        return w_NK

    def _decoded(self, name: str, info: TensorInfo, index: int | None = None) -> Tensor:
        """A tensor that was rounded, float32, or what it has at an index of its first dimension."""
        assert info.rounded is not None
        parts, whole = {}, index is None or len(info.shape) < 3
        for role, part in info.rounded.parts:
            first, count = 0, part.stop - part.start
            shape = part.shape
            if not whole and shape[:1] == info.shape[:1]:
                count //= shape[0]
                first, shape = count * (index or 0), shape[1:]
            parts[role] = self._read(part, first, count).view(TORCH_DTYPES[part.dtype]).view(shape)
        return decode(info.rounded, parts, info.shape if whole else info.shape[1:], name)

    def _decoded_chunks(self, name: str, info: TensorInfo) -> Iterator[memoryview]:
        """The bytes of a tensor that was rounded; a stack is never decoded at once."""
        stack = range(info.shape[0]) if len(info.shape) > 2 else (None,)
        for index in stack:
            values = self._decoded(name, info, index).to(TORCH_DTYPES[info.dtype])
            if not is_finite(values):
                raise TensorError(
                    "the weights hold NaN or infinity", file=self._directory / info.file, tensor=name, fix=_BAD_VALUES
                )
            yield bytes_of(values)

    def _read(self, info: TensorInfo, start: int, size: int) -> Tensor:
        """`size` bytes of a tensor from its byte `start` on, uint8."""
        data = torch.empty(size, dtype=torch.uint8)
        view = data.numpy().data
        position = info.start + start
        path = self._directory / info.file
        file = self._open(info.file)
        while view:
            try:
                count = os.preadv(file, [view[: 2**30]], position)
            except OSError as error:
                raise unreadable(path, error) from error
            if not count:
                raise HeaderError("the file became shorter while it was read", file=path, fix="leave the input alone")
            view = view[count:]
            position += count
        return data

    def _open(self, name: str) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError("the reader is closed", file=self._directory / name, fix="open a new Reader")
            if name not in self._files:
                try:
                    self._files[name] = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise unreadable(self._directory / name, error) from error
            return self._files[name]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data.toreadonly()


def _chosen(stored: Tensor, source: MatrixSource, shape: tuple[int, int]) -> Tensor:
    """The rows of a whole matrix that belong to a source."""
    stop = source.start + source.step * (shape[0] - 1) + 1
    return (stored.t() if source.transposed else stored)[source.start : stop : source.step].contiguous()


def is_finite(weights: Tensor) -> bool:
    """Whether no element is NaN or infinite; min and max carry both, in one pass without a mask."""
    if not weights.numel():
        return True
    low, high = torch.aminmax(weights)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def has_nan(weights: Tensor) -> bool:
    """Whether an element is NaN; min is, if any element is."""
    return bool(weights.numel()) and bool(torch.isnan(torch.aminmax(weights)[0]))


def _expert_shape(
    source: MatrixSource, expert: int, shape: tuple[int, int], info: TensorInfo, name: str
) -> tuple[int, int]:
    """Rows and columns of one expert as they are stored, after checking them."""

    def wrong(message: str, fix: str) -> TensorError:
        return TensorError(message, file=info.file, tensor=name, fix=fix)

    if info.dtype not in WEIGHT_DTYPES:
        raise wrong(
            f"an expert weight has dtype {info.dtype}, not one of {', '.join(WEIGHT_DTYPES)}",
            "start from a 16- or 32-bit checkpoint",
        )
    dims = info.shape
    if len(dims) != (3 if source.stacked else 2):
        raise wrong(f"shape {list(dims)} should have {3 if source.stacked else 2} dimensions", "check the model type")
    index = expert + source.expert_offset
    if source.stacked and not 0 <= index < dims[0]:
        raise wrong(f"expert {index} of {dims[0]} was asked for", "check the number of experts in config.json")
    rows, columns = dims[-2:]
    outputs, inputs = (columns, rows) if source.transposed else (rows, columns)
    if shape[0] < 1 or inputs != shape[1] or source.start + source.step * (shape[0] - 1) >= outputs:
        raise wrong(
            f"shape {list(dims)} cannot hold a {shape[0]} x {shape[1]} matrix per expert "
            f"(start {source.start}, step {source.step}, transposed {source.transposed})",
            "check that config.json belongs to these weights",
        )
    return rows, columns

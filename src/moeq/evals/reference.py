"""The model that another one is compared to: in memory, or its outputs in a file.

A reference file is a safetensors file, written as the batches come:

    logits.{window}   (P, V) in the reference's own dtype: exact, nothing is rounded or cut off
    routing.{window}  (layers, T, k) int16, the experts chosen, -1 where a layer has fewer than k

with metadata `kind`, `format_version`, `tokens` (hash of all windows) and `windows`. It takes
P * V * 2 bytes for a 16-bit model: 0.25 GB for 30 000 tokens of a 4096-word vocabulary, 9 GB for one
of 152 000. Keeping only the likeliest tokens would bias the KL, which is small and lives in the tail.

Legend: B sequences, T tokens, P = T - 1 predicted positions, V vocabulary, k experts per token.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moeq.calibration.tokens import token_hash
from moeq.errors import ArtifactError, OptionError, StorageError, VersionError
from moeq.evals.forward import Progress, batches, evaluating
from moeq.evals.observe import Observation, observe

KIND: Final = "moeq-reference"
VERSION: Final = "1"
DTYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

Consumer = Callable[[Observation, Observation, Tensor], None]
"""Called with what the reference did, what the subject did, and the ids (B, T)."""


class Reference(Protocol):
    """Where the reference's outputs come from."""

    def observe(self, start: int, ids_BT: Tensor) -> Observation:
        """The outputs for windows `start` .. `start` + B, whose ids are `ids_BT`."""
        ...


class LiveReference:
    """A model in memory."""

    def __init__(self, model: nn.Module, *, routing: bool) -> None:
        self._model = model
        self._routing = routing

    def observe(self, start: int, ids_BT: Tensor) -> Observation:
        """Run the model."""
        return observe(self._model, ids_BT, routing=self._routing)


class StoredReference:
    """A file written by `save_reference`; windows are read one batch at a time.

    Args:
        file: the open file.
        path: its path, for messages.
        windows: the windows that will be asked for.

    Raises:
        VersionError: a later format.
        ArtifactError: another kind of file, or made from other windows.
    """

    def __init__(self, file: Any, path: Path, windows: Sequence[Tensor]) -> None:
        self._file = file
        self._names = set(file.keys())
        metadata = file.metadata() or {}
        if metadata.get("kind") != KIND:
            raise ArtifactError("not a reference file", file=path, fix="write one with save_reference")
        if metadata.get("format_version") != VERSION:
            raise VersionError(
                f"the reference has format version {metadata.get('format_version')!r}, this moeq reads {VERSION}",
                file=path,
                fix="write it again",
            )
        if metadata.get("tokens") != token_hash(windows):
            raise ArtifactError(
                "the reference was made from other tokens",
                file=path,
                fix="use the same text, tokenizer and window length, or write the reference again",
            )

    def observe(self, start: int, ids_BT: Tensor) -> Observation:
        """Read the outputs."""
        indices = range(start, start + len(ids_BT))
        logits_BPV = torch.stack([self._file.get_tensor(f"logits.{index}") for index in indices])
        if f"routing.{start}" not in self._names:
            return Observation(logits_BPV=logits_BPV, routing=())
        layers_LBTk = torch.stack([self._file.get_tensor(f"routing.{index}") for index in indices], dim=1)
        return Observation(logits_BPV=logits_BPV, routing=layers_LBTk.unbind())


@contextmanager
def open_reference(source: nn.Module | Path, windows: Sequence[Tensor], *, routing: bool) -> Iterator[Reference]:
    """A reference from a model or from a file.

    Raises:
        ArtifactError: the file is absent, no reference, or made from other windows.
    """
    if isinstance(source, nn.Module):
        with evaluating(source):
            yield LiveReference(source, routing=routing)
        return
    try:
        handle = safe_open(source, framework="pt")
    except FileNotFoundError:
        raise ArtifactError("the file does not exist", file=source, fix="check the path") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"not a reference file: {error}", file=source, fix="write it again") from error
    with handle as file:
        yield StoredReference(file, source, windows)


def compare(
    model: nn.Module,
    reference: nn.Module | Path,
    windows: Sequence[Tensor],
    consumers: Sequence[Consumer],
    *,
    routing: bool,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> None:
    """Show the same batches to subject and reference, and both outputs to all `consumers`.

    At any time one batch of logits of each model exists. The reference may live on another device.

    Args:
        model: the subject.
        reference: a model with the same vocabulary, or a file of `save_reference`.
        windows: int64 ids, 1-D.
        consumers: called after each batch.
        routing: whether the consumers need the experts chosen.
        batch_size: windows per forward pass.
        progress: called with (windows done, windows).

    Raises:
        ArtifactError: the reference file does not fit.
        OptionError: subject and reference have different vocabularies.
    """

    def step(start: int, ids_BT: Tensor) -> None:
        # A function of its own, so that no logits outlive their batch.
        expected = opened.observe(start, ids_BT)
        actual = observe(model, ids_BT, routing=routing)
        sizes = expected.logits_BPV.shape[-1], actual.logits_BPV.shape[-1]
        if sizes[0] != sizes[1]:
            raise OptionError(
                f"the reference's vocabulary has {sizes[0]} tokens, the model's {sizes[1]}",
                option="reference",
                fix="compare with the model that this one was made from",
            )
        for consume in consumers:
            consume(expected, actual, ids_BT)

    with evaluating(model), open_reference(reference, windows, routing=routing) as opened:
        for start, ids_BT in batches(windows, batch_size):
            step(start, ids_BT)
            if progress is not None:
                progress(start + len(ids_BT), len(windows))


def save_reference(
    model: nn.Module,
    windows: Sequence[Tensor],
    path: Path,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write what `compare` needs of a reference, so that it need not be in memory together with the subject.

    The file appears under its name only when it is complete.

    Args:
        model: the reference.
        windows: the windows to run it on.
        path: the file to write; see the module docstring for its size.
        batch_size: windows per forward pass.
        progress: called with (windows done, windows).

    Raises:
        StorageError: the file cannot be written.
        CalibrationError: there is nothing to predict.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            _write_reference(model, windows, file, batch_size, progress)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"the reference cannot be written: {error.strerror}", file=path, fix="free space or choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_reference(
    model: nn.Module, windows: Sequence[Tensor], file: BinaryIO, batch_size: int, progress: Progress | None
) -> None:
    routing: list[Tensor] = []

    def step(start: int, ids_BT: Tensor) -> None:
        seen = observe(model, ids_BT, routing=True)
        if start == 0:
            file.write(_header(windows, seen))
        for logits_PV in seen.logits_BPV:
            file.write(_bytes(logits_PV))
        if seen.routing:
            routing.extend(_stack_layers(seen.routing))

    with evaluating(model):
        for start, ids_BT in batches(windows, batch_size):
            step(start, ids_BT)
            if progress is not None:
                progress(start + len(ids_BT), len(windows))
    # Routing is small; it comes last so that all logits stay aligned to their own size.
    for layers_LTk in routing:
        file.write(_bytes(layers_LTk))


def _header(windows: Sequence[Tensor], first: Observation) -> bytes:
    vocabulary = first.logits_BPV.shape[-1]
    dtype = first.logits_BPV.dtype
    shapes: dict[str, tuple[str, tuple[int, ...], int]] = {
        f"logits.{i}": (DTYPES[dtype], (len(window) - 1, vocabulary), dtype.itemsize)
        for i, window in enumerate(windows)
    }
    if first.routing:
        layers, top_k = len(first.routing), max(layer.shape[-1] for layer in first.routing)
        for i, window in enumerate(windows):
            shapes[f"routing.{i}"] = ("I16", (layers, len(window), top_k), torch.int16.itemsize)
    metadata = {
        "kind": KIND,
        "format_version": VERSION,
        "tokens": token_hash(windows),
        "windows": str(len(windows)),
    }
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (code, shape, itemsize) in shapes.items():
        size = math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stack_layers(layers: Sequence[Tensor]) -> Iterator[Tensor]:
    """(B, T, k) of each layer -> (layers, T, k) of each sequence, int16, -1 where a layer has a smaller k."""
    top_k = max(layer.shape[-1] for layer in layers)
    padded = [nn.functional.pad(layer.cpu(), (0, top_k - layer.shape[-1]), value=-1) for layer in layers]
    yield from torch.stack(padded, dim=1).to(torch.int16)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data

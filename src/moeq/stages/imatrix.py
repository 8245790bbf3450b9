"""`moeq imatrix`: an importance matrix for llama.cpp, from our calibration texts and by the original's own numbers.

What llama.cpp's quantizer wants to know of a matrix is the mean square of each of its inputs. Its own program measures
that by running a GGUF file of the whole model; this one runs the checkpoint block by block, so it needs the memory of
one block, takes the texts that everything else here takes, and fills up experts that few tokens are routed to with
tokens of their layer (docs/decisions/0009), for which llama.cpp's own files know nothing.

Legend: E experts, K input columns.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Inventory
from moeq.calibration.experts import survey
from moeq.calibration.opening import open_stream, read_source
from moeq.calibration.stream import Capture
from moeq.calibration.tap import Asked, Heard
from moeq.calibration.tokens import TokenBatch
from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.checkpoint.read import Reader
from moeq.progress import Progress
from moeq.recipe import Recipe
from moeq.runtime.load import pick_device
from moeq.version import __version__
from moeq.writing import gguf_facts, gguf_file
from moeq.writing.calibration_text import calibration_tokens
from moeq.writing.directory import one_file


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixReport:
    """What was written; field names are those of the JSON document (docs/json.md).

    Attributes:
        output: the file.
        architecture: the family's name in GGUF.
        tensors: matrices, or stacks of experts' matrices, that it knows.
        calibration: the texts.
        tokens: of them.
        fewest: tokens of the expert that the fewest were routed to.
    """

    output: str
    architecture: str
    tensors: int
    calibration: str
    tokens: int
    fewest: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sum:
    """Sums of squares of the inputs, and of how many: (E, K) and (E,), float64; E = 1 outside the experts."""

    square_EK: Tensor
    count_E: Tensor


def run(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    like: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> ImatrixReport:
    """Write an importance matrix of the original, for `llama-quantize --imatrix`.

    Args:
        model: local directory or hub id.
        out: the file to write.
        calibration: text file, jsonl, or dataset id, or several.
        nsamples: sequences.
        seqlen: tokens of a sequence.
        seed: of the order of the documents.
        like: a GGUF file of the same model, for families that are not written from scratch: it knows the names.
        device: where blocks run.
        progress: called as blocks are done.

    Raises:
        CheckpointError: the model cannot be read, or the package gguf is missing.
        OptionError: the family's names are not known.
        CalibrationError: the text is too short.
        OutputError, StorageError: `out` cannot be written.
    """
    begun = time.monotonic()
    source, out = open_source(model), Path(os.path.abspath(out))
    inventory, _ = read_inventory(source)
    config = read_config(source / CONFIG_NAME)
    config = config.get("text_config") or config
    arch = gguf_facts.architecture(config["model_type"]) if like is None else gguf_file.Like(Path(like)).architecture
    table = gguf_facts.names(arch, int(config["num_hidden_layers"]))
    recipe = Recipe(calibration=calibration, nsamples=nsamples, seqlen=seqlen, seed=seed)
    tokens, _ = calibration_tokens(source, recipe, "an importance matrix")
    assert tokens is not None
    with one_file(source, out, _size(inventory)) as unfinished:
        sums = _measured(source, inventory, tokens, pick_device(device), unfinished.parent, progress)
        named = dict(_named(sums, inventory, table))
        _write(unfinished, named, tokens)
    experts = [int(sums[layer.path, layer.projections[0]].count_E.min()) for layer in inventory.attached.layers]
    return ImatrixReport(
        output=str(out),
        architecture=arch,
        tensors=len(named),
        calibration=tokens.source,
        tokens=tokens.ids_NT.numel(),
        fewest=min(experts),
        seconds=time.monotonic() - begun,
    )


def _measured(
    source: Path,
    inventory: Inventory,
    tokens: TokenBatch,
    device: torch.device,
    scratch: Path,
    progress: Progress | None,
) -> dict[tuple[str, str], _Sum]:
    """(path of a layer or linear, projection or "") -> its sums."""
    found: dict[tuple[str, str], _Sum] = {}

    def add(path: str, projection: str, square_EK: Tensor, count_E: Tensor) -> None:
        square_EK, count_E = square_EK.double().cpu(), count_E.double().cpu()
        old = found.get((path, projection))
        if old is not None:
            square_EK, count_E = square_EK + old.square_EK, count_E + old.count_E
        found[path, projection] = _Sum(square_EK=square_EK, count_E=count_E)

    def hear(path: str, heard: Heard) -> None:
        square_K = heard.x_TK.float().square().sum(0)
        add(path, "", square_K.unsqueeze(0), torch.tensor([float(len(heard.x_TK))]))

    with Reader(source) as reader:

        def visit(layer: int, experts: nn.Module, asked: Asked) -> None:
            shape = inventory.attached.layers[layer]
            capture = Capture(
                x_TH=asked.x_TH, index_Tk=asked.index_Tk, weights_Tk=asked.weights_Tk, stats_Tk=asked.index_Tk
            )
            seen = survey(shape, partial(read_source, reader, shape), experts, capture, device)
            count_E = torch.tensor(seen.counts, dtype=torch.float64)
            for projection in shape.projections:
                # An expert that nobody asked has borrowed tokens: they count as one.
                add(shape.path, projection, seen.square[projection] * count_E.clamp(min=1).unsqueeze(1), count_E)

        linears = {linear.path: partial(hear, linear.path) for linear in inventory.dense if linear.block}
        with (
            tempfile.TemporaryDirectory(dir=scratch, prefix=".moeq-") as work,
            open_stream(source, inventory, device=device, scratch=Path(work), progress=progress) as stream,
        ):
            stream.run(tokens.ids_NT, visit, gradients=False, linears=linears)
    return found


def _named(sums: dict[tuple[str, str], _Sum], inventory: Inventory, table: Any) -> Iterator[tuple[str, _Sum]]:
    """Tensors as GGUF names them."""
    layers = {layer.path: layer for layer in inventory.attached.layers}
    for (path, projection), measured in sums.items():
        if path in layers:
            yield gguf_file.expert_names(path, list(layers[path].projections))[projection], measured
        else:
            yield next(iter(gguf_facts.tensor_names(iter([f"{path}.weight"]), table).values())), measured


def _write(path: Path, named: dict[str, _Sum], tokens: TokenBatch) -> None:
    gguf = gguf_facts.package()
    writer = gguf.GGUFWriter(path, "imatrix")
    try:
        writer.add_type("imatrix")
        writer.add_string("general.quantized_by", f"moeq {__version__}")
        writer.add_array("imatrix.datasets", [domain.name for domain in tokens.domains])
        writer.add_uint32("imatrix.chunk_count", len(tokens.ids_NT))
        writer.add_uint32("imatrix.chunk_size", int(tokens.ids_NT.shape[1]))
        for name, measured in sorted(named.items()):
            count_E = measured.count_E.clamp(min=1)
            writer.add_tensor(f"{name}.in_sum2", measured.square_EK.numpy().astype(np.float32))
            writer.add_tensor(f"{name}.counts", count_E.unsqueeze(1).numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _size(inventory: Inventory) -> int:
    """Bytes of the file, roughly."""
    experts = sum(4 * layer.num_experts * shape[1] for layer in inventory.layers for shape in layer.shapes.values())
    return experts + sum(4 * linear.shape[1] for linear in inventory.dense) + 2**20

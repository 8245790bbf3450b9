"""Opens a checkpoint, original or packed, for costs that look at the whole model block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.arch import hooks
from moeq.arch.keymap import KeyMap, build_keymap, load_prefix, unload_prefix
from moeq.arch.meta import build_meta_model
from moeq.artifacts import Inventory
from moeq.calibration.backprop import BATCH_BYTES, MICRO_BATCH_TOKENS, Backprop
from moeq.calibration.source_experts import ReadMatrix, SourceExperts
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import BlockLoader, compute_dtype
from moeq.checkpoint.read import Reader
from moeq.errors import CheckpointError, PackedError
from moeq.format.manifest import MANIFEST_NAME, Manifest
from moeq.layouts.serving import layout
from moeq.layouts.validate import validate_packed
from moeq.model_parts import MoeLayer
from moeq.progress import Progress
from moeq.runtime import attach, load

PRODUCT_VALUES: Final = 2**25
"""Values of what all matrices of a token's experts answer, of all tokens of a micro-batch."""
MAX_MICRO_BATCH_TOKENS: Final = 16_384


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _SourceBlocks:
    """Blocks of a skeleton, loaded when asked for; their experts are read matrix by matrix."""

    skeleton: PreTrainedModel
    keymap: KeyMap
    reader: Reader
    dtype: torch.dtype
    device: torch.device

    def __call__(self, block: str) -> nn.Module:
        load_prefix(self.skeleton, block, self.keymap, self.reader.tensor, self.dtype)
        return self.skeleton.get_submodule(block).to(self.device).eval()

    def unload(self, block: str) -> None:
        """Drop the block's weights."""
        unload_prefix(self.skeleton, block)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PackedBlocks:
    """Blocks of a packed model: they are small enough to stay."""

    blocks: dict[str, nn.Module]

    def __call__(self, block: str) -> nn.Module:
        return self.blocks[block]

    def unload(self, block: str) -> None:
        """Nothing was loaded."""


@contextmanager
def open_stream(
    directory: Path,
    inventory: Inventory,
    *,
    device: torch.device,
    scratch: Path,
    dtype: torch.dtype | None = None,
    micro_batch_tokens: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    progress: Progress | None = None,
) -> Iterator[Backprop]:
    """A checkpoint as something to run forward and backward, layers numbered as in `inventory`.

    Args:
        directory: the original checkpoint that `inventory` describes, or one packed from it.
        inventory: of the original.
        device: where blocks run.
        scratch: where activations go; must be on a disk, not in memory.
        dtype: compute dtype; None takes the checkpoint's, but float32 where a CPU is slow at it.
        micro_batch_tokens: tokens that one block sees at once; None takes as many as its experts' products allow.
        batch_bytes: what the activations of a batch of sequences may take in `scratch`.
        progress: called with ("blocks", done, all).

    Raises:
        CheckpointError: the blocks do not form one list, or the checkpoint cannot be read.
        PackedError: a packed checkpoint is broken, or was packed from another model.
    """
    report = None if progress is None else partial(progress, "blocks")
    prepare = _open_packed if (directory / MANIFEST_NAME).is_file() else _open_source
    with prepare(directory, inventory, device, dtype) as (driver, loader):
        _silence_balance_loss(driver)
        yield Backprop(
            driver=driver,
            blocks=block_paths(inventory, driver),
            loader=loader,
            layers=inventory.layers,
            pool=SpillPool(scratch),
            device=device,
            micro_batch_tokens=micro_batch_tokens or _micro_batch_tokens(inventory),
            batch_bytes=batch_bytes,
            progress=report,
        )


@contextmanager
def _open_source(
    directory: Path, inventory: Inventory, device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[PreTrainedModel, BlockLoader]]:
    driver, skeleton = build_meta_model(directory), build_meta_model(directory)
    wanted = dtype or compute_dtype(skeleton.dtype, device)
    with Reader(directory) as reader:
        for layer in inventory.layers:
            read = partial(read_source, reader, layer)
            hooks.attach_handler(hooks.strip_weights(skeleton, layer.path), SourceExperts(layer, read))
        keymap = build_keymap(driver, reader.headers)
        load_prefix(driver, "", keymap, reader.tensor, wanted, skip=block_paths(inventory, driver))
        yield driver, _SourceBlocks(skeleton=skeleton, keymap=keymap, reader=reader, dtype=wanted, device=device)


def read_source(reader: Reader, layer: MoeLayer, expert: int, projection: str) -> Tensor:
    """The source weights (N, K) of an expert's projection."""
    return reader.matrix(layer.sources[projection], expert, layer.shapes[projection])


@contextmanager
def _open_packed(
    directory: Path, inventory: Inventory, device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[PreTrainedModel, BlockLoader]]:
    _check_packed(validate_packed(directory), inventory, directory)
    model = load.load(directory, device=device, dtype="auto" if dtype is None else dtype, exact_activations=True)
    wanted = compute_dtype(model.dtype, device)
    if wanted != model.dtype:
        model = model.to(wanted)
    yield model, _PackedBlocks(blocks={path: model.get_submodule(path) for path in block_paths(inventory, model)})


def _check_packed(manifest: Manifest, inventory: Inventory, directory: Path) -> None:
    packed = [(layer.path, layer.num_experts, layer.shapes) for layer in manifest.layers if layer.attached]
    if manifest.model_hash != inventory.model_hash or packed != [
        (layer.path, layer.num_experts, layer.shapes) for layer in inventory.layers
    ]:
        raise PackedError(
            "this checkpoint was packed from another model",
            file=directory / MANIFEST_NAME,
            fix="give one that was packed from the model to be measured",
        )


def packed_matrices(directory: Path) -> Callable[[int], ReadMatrix]:
    """The decoded weights of a packed checkpoint: layer -> (expert, projection) -> (N, K) float32.

    The bytes are mapped; a matrix is decoded when it is read. Layers are numbered as in the original's inventory.

    Raises:
        PackedError: not a packed checkpoint, or one whose parts contradict each other.
    """
    manifest = validate_packed(directory)
    tensors = attach.map_packed(directory / name for name in manifest.files if name.endswith(".safetensors"))

    def layer(index: int) -> ReadMatrix:
        entry = manifest.layers[index]
        return layout(entry.layout).open(entry, tensors).dense

    return layer


def _micro_batch_tokens(inventory: Inventory) -> int:
    """Many tokens where experts are small: their weights are read again for every micro-batch."""
    values = max(layer.top_k * sum(rows for rows, _ in layer.shapes.values()) for layer in inventory.layers)
    return min(max(MICRO_BATCH_TOKENS, PRODUCT_VALUES // values), MAX_MICRO_BATCH_TOKENS)


def block_paths(inventory: Inventory, model: nn.Module) -> tuple[str, ...]:
    """Module paths of all decoder blocks, in order: the siblings of those that hold experts.

    Raises:
        CheckpointError: the experts' blocks are not all children of one list.
    """
    parents = {layer.block.rpartition(".")[0] for layer in inventory.layers}
    if len(parents) != 1:
        raise CheckpointError(
            f"experts lie under several lists of blocks: {', '.join(sorted(parents))}",
            tensor=inventory.layers[0].path,
            fix="use a cost and a quantizer that need no calibration text",
        )
    parent = parents.pop()
    return tuple(f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children())


def _silence_balance_loss(model: PreTrainedModel) -> None:
    """No router logits are collected: they only feed a loss that nobody asks for."""
    for config in (model.config, model.config.get_text_config()):
        if vars(config).get("output_router_logits"):
            config.output_router_logits = False

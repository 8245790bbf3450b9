"""The Inventory of a source checkpoint, from its config and headers; no weights are read but a few samples."""

import math
from collections.abc import Mapping
from pathlib import Path

from moeq.arch.discover import Discovery, discover
from moeq.arch.named_experts import brings_code, code_is_not_trusted, named_experts
from moeq.artifacts import Inventory
from moeq.checkpoint.identity import model_hash
from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.checkpoint.read import read_headers
from moeq.spec import TensorInfo

ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def read_inventory(directory: Path, *, trust_remote_code: bool = False) -> tuple[Inventory, dict[str, TensorInfo]]:
    """The Inventory of a checkpoint and the headers it was made from.

    Args:
        directory: the checkpoint.
        trust_remote_code: a family that transformers does not have may be loaded by the checkpoint's own code later; no
            code is run here.

    Raises:
        CheckpointError: broken, not an MoE, quantized already, or of an unknown family.
    """
    headers = read_headers(directory)
    if brings_code(read_config(directory / CONFIG_NAME)):
        if not trust_remote_code:
            raise code_is_not_trusted(directory)
        return _inventory(directory, headers, named_experts(directory, headers)), headers
    return inventory_of(directory, headers), headers


def inventory_of(directory: Path, headers: Mapping[str, TensorInfo]) -> Inventory:
    """The Inventory that `headers` describe, of a family that transformers has."""
    return _inventory(directory, headers, discover(directory, headers))


def _inventory(directory: Path, headers: Mapping[str, TensorInfo], found: Discovery) -> Inventory:
    first = found.layers[0]
    sample = headers[first.sources["down"].tensor(0)]
    inventory = Inventory(
        model_type=found.model_type,
        architecture=found.architecture,
        model_hash=model_hash(directory, headers),
        layers=found.layers,
        dense=found.dense,
        source_bytes=sum(part.stop - part.start for info in headers.values() for part in info.stored),
        parameters=sum(math.prod(info.shape) for info in headers.values()),
        element_bytes=ELEMENT_BYTES[sample.dtype],
    )
    inventory.validate()
    return inventory

"""What a source checkpoint holds, from its config and headers; no weights are read but a few samples."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.checkpoint.read import file_bytes, read_headers
from moeq.codec import read_json
from moeq.format.manifest import MANIFEST_NAME
from moeq.layouts.validate import SUFFIXES, validate_packed
from moeq.notebook import Shows, Table
from moeq.report.tables import human_bytes
from moeq.spec import TensorInfo
from moeq.writing import weight_families


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport(Shows):
    """What a checkpoint holds; field names are those of the JSON document (docs/json.md).

    Attributes:
        plan_hash: of the plan that made it, None if it is not packed.
    """

    model: str
    packed: bool
    model_type: str
    architecture: str
    model_hash: str
    layers: int
    experts_per_layer: int
    parameters: int
    expert_parameters: int
    stored_bytes: int
    expert_bytes: int
    expert_bits_per_weight: float
    families: dict[str, weight_families.Family]
    plan_hash: str | None
    method: str | None

    def tables(self) -> Iterator[Table]:
        """Sizes by family."""
        yield weight_families.table(f"{self.architecture}: {human_bytes(self.stored_bytes)}", self.families)


def run(model: str | Path) -> InspectReport:
    """Sizes of a packed or source checkpoint, by family.

    Raises:
        CheckpointError, PackedError: it is broken, or not an MoE.
    """
    directory = open_source(model)
    if (directory / MANIFEST_NAME).is_file():
        return _packed_report(directory)
    inventory, headers = read_inventory(directory, trust_remote_code=True)  # no code is run
    rows = weight_families.families(inventory, headers)
    return InspectReport(
        model=str(directory),
        packed=False,
        model_type=inventory.model_type,
        architecture=inventory.architecture,
        model_hash=inventory.model_hash,
        layers=len(inventory.layers),
        experts_per_layer=inventory.layers[0].num_experts,
        parameters=inventory.parameters,
        expert_parameters=inventory.expert_parameters,
        stored_bytes=file_bytes(directory, headers),
        expert_bytes=rows["experts"].bytes,
        expert_bits_per_weight=rows["experts"].bits_per_weight,
        families=rows,
        plan_hash=None,
        method=None,
    )


def _packed_report(directory: Path) -> InspectReport:
    manifest = validate_packed(directory)
    headers = read_headers(directory)
    config = read_json(directory / "config.json")
    weights = sum(
        layer.num_experts * rows * columns for layer in manifest.layers for rows, columns in layer.shapes.values()
    )
    size = sum(_pair_bytes(headers, layer.path) for layer in manifest.layers)
    families = {"experts": weight_families.family(weights, size)}
    dense = sum(rows * columns for linear in manifest.dense for rows, columns in [linear.shape])
    dense_size = sum(_pair_bytes(headers, linear.path) for linear in manifest.dense)
    if dense:
        families["packed linears"] = weight_families.family(dense, dense_size)
    rest = [info for name, info in headers.items() if not name.endswith(SUFFIXES)]
    other = sum(math.prod(info.shape) for info in rest)
    families["other"] = weight_families.family(other, sum(info.stop - info.start for info in rest))
    return InspectReport(
        model=str(directory),
        packed=True,
        model_type=config["model_type"],
        architecture=(config.get("architectures") or ["?"])[0],
        model_hash=manifest.model_hash,
        layers=len(manifest.layers),
        experts_per_layer=manifest.layers[0].num_experts,
        parameters=weights + dense + other,
        expert_parameters=weights,
        stored_bytes=file_bytes(directory, headers),
        expert_bytes=size,
        expert_bits_per_weight=8 * size / weights,
        families=families,
        plan_hash=manifest.plan_hash,
        method=manifest.method,
    )


def _pair_bytes(headers: Mapping[str, TensorInfo], path: str) -> int:
    infos = (headers[path + suffix] for suffix in SUFFIXES if path + suffix in headers)
    return sum(info.stop - info.start for info in infos)

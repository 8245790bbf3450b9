"""The measured costs of spectral components: what a CostTable is for matrices, in a binary file.

A model has tens of millions of components, and what they cost depends on the basis that was chosen, so the basis is
part of the file: `allocate` and `quantize` take it from here and nobody computes it twice. Costs are factored,
w_u D(b), or exact per component (BitsMoE, section 3).

The file is a safetensors file: a tensor `facts` of JSON, and per layer and projection the basis, the factors and the
curve. It is mapped, not read.

Legend: E experts, H hidden size = directions, I expert width, G groups, C candidates.
"""

import json
import shutil
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeq import codec
from moeq.artifacts import CostTable, Inventory
from moeq.checkpoint.header import read_header
from moeq.checkpoint.mapped import map_file
from moeq.checkpoint.write import ShardWriter, hash_file
from moeq.codec import Artifact
from moeq.errors import ArtifactError, CheckpointError
from moeq.format.records import dequantize
from moeq.layouts.spectral.shape import BASIS_BITS, basis_spec
from moeq.spec import ALIGN, QuantSpec, num_groups

FACTS: Final = "facts"
_AGAIN: Final = "measure again"


def decoded_basis(rows_HH: Tensor, scale_HG: Tensor | None, device: torch.device) -> Tensor:
    """A stored basis, directions in rows, (H, H) float32."""
    if scale_HG is None:
        return rows_HH.to(device).float()
    spec = basis_spec(8)
    assert spec is not None
    return dequantize(rows_HH, scale_HG, None, spec).to(device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProjectionCosts:
    """One projection of one layer.

    Attributes:
        rows: the basis, a direction in each row, (H, H): float16, or the uint8 codes of 8 bits.
        scale_HG: scales of the codes, float16; None for float16 rows.
        weight_EH: the factor w of each component, float32.
        energy_EH: its squared norm, float32.
        curve_C: D, the mean relative squared error at each candidate, float64.
        errors_EHC: exact squared errors times everything else in w, float32; None if costs are factored.
    """

    rows: Tensor
    scale_HG: Tensor | None
    weight_EH: Tensor
    energy_EH: Tensor
    curve_C: Tensor
    errors_EHC: Tensor | None = None

    @property
    def spread(self) -> float:
        """Standard deviation of ln w over components; those of no weight are left out."""
        logs = self.weight_EH[self.weight_EH > 0].double().log()
        return float(logs.std()) if len(logs) > 1 else 0.0

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors by name, those that it has."""
        for name in ("rows", "scale_HG", "weight_EH", "energy_EH", "curve_C", "errors_EHC"):
            value = getattr(self, name)
            if value is not None:
                yield name, value


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentFacts(Artifact):
    """What the numbers of a file are of, and what they depend on.

    Attributes:
        model_hash: the model measured.
        cost: name of the cost.
        provenance: what the numbers depend on (tokens hash, seed, versions, options).
        candidates: the specs above 0 bits that a component may get, by rising width.
        basis_bits: 8 or 16.
        joint: gate and up share one basis.
        exact: costs are exact, not factored.
        drop: harm of dropping a component in units of its factor, by layer: projection -> that.
        layers: (E, H, I) of each layer.
        spread: layer -> projection -> standard deviation of ln w over its components. Allocation gains by it.
        tokens: routed tokens of each expert, by layer.
    """

    KIND: ClassVar[str] = "component-costs"

    model_hash: str
    cost: str
    provenance: dict[str, Any]
    candidates: tuple[QuantSpec, ...]
    basis_bits: int
    joint: bool
    exact: bool
    drop: tuple[dict[str, float], ...]
    layers: tuple[tuple[int, int, int], ...]
    spread: tuple[dict[str, float], ...]
    tokens: tuple[tuple[int, ...], ...]

    def validate(self) -> None:
        """Raise ArtifactError if the parts contradict each other."""
        widths = [spec.bits for spec in self.candidates]
        if not widths or widths != sorted(set(widths)):
            raise ArtifactError("the candidates must be different widths, rising", fix=_AGAIN)
        if (
            not all(0 < harm < float("inf") for layer in self.drop for harm in layer.values())
            or not len(self.drop) == len(self.spread) == len(self.layers)
            or any(set(layer) != {"gate", "up", "down"} for layer in self.drop)
            or self.basis_bits not in BASIS_BITS
            or not self.layers
            or len(self.tokens) != len(self.layers)
        ):
            raise ArtifactError("the facts of a component table contradict each other", fix=_AGAIN)
        if any(len(counts) != shape[0] for counts, shape in zip(self.tokens, self.layers, strict=True)):
            raise ArtifactError("a layer has token counts of other experts", fix=_AGAIN)


class ComponentTable:
    """A file of component costs, open.

    Args:
        path: the file.
        home: a temporary directory around it, which goes with the table.

    Raises:
        ArtifactError: it is no such file, or its tensors are not what its facts say.
    """

    unit: ClassVar[str] = "component"

    def __init__(self, path: Path, home: Path | None = None) -> None:
        self.path = path
        if home is not None:
            weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)
        try:
            read_header(path)
            self._tensors = map_file(path, floats=True)
        except (CheckpointError, OSError) as error:
            raise ArtifactError("not a file of component costs", file=path, fix=_AGAIN) from error
        if FACTS not in self._tensors:
            raise ArtifactError("not a file of component costs", file=path, fix="make it with moeq measure")
        try:
            data = json.loads(bytes(self._tensors[FACTS].numpy()))
        except ValueError as error:
            raise ArtifactError("its facts are not JSON", file=path, fix=_AGAIN) from error
        self.facts = ComponentFacts.from_dict(data, file=path)
        self._check()

    def __reduce__(self) -> tuple[type["ComponentTable"], tuple[Path]]:
        """Another process opens the file again; it is not its to remove."""
        return ComponentTable, (self.path,)

    @property
    def hash(self) -> str:
        """sha256 of the file."""
        return hash_file(self.path).sha256

    def save(self, path: Path) -> None:
        """Copy the file."""
        shutil.copyfile(self.path, path)

    @property
    def model_hash(self) -> str:
        """The model measured."""
        return self.facts.model_hash

    @property
    def cost(self) -> str:
        """Name of the cost."""
        return self.facts.cost

    @property
    def candidates(self) -> tuple[QuantSpec, ...]:
        """The specs above 0 bits."""
        return self.facts.candidates

    @property
    def provenance(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return self.facts.provenance

    def layer(self, index: int, projection: str) -> ProjectionCosts:
        """One projection of one layer, as views of the file."""
        found = {name: self._tensors.get(f"{index}.{projection}.{name}") for name in _PARTS}
        if found["rows"] is None:
            found |= {name: self._tensors[f"{index}.gate.{name}"] for name in ("rows", "scale_HG") if self._has(name)}
        return ProjectionCosts(**found)  # type: ignore[arg-type]

    def weights(self, index: int, projection: str) -> NDArray[np.float32]:
        """The factors of one projection, (E, H)."""
        return self.layer(index, projection).weight_EH.numpy()

    def check_model(self, inventory: Inventory) -> None:
        """Raise ArtifactError unless this table was measured on exactly this model."""
        if self.model_hash != inventory.model_hash:
            raise ArtifactError(
                f"the costs are of model {self.model_hash[:12]}, this is {inventory.model_hash[:12]}",
                file=self.path,
                option="costs",
                fix="measure this model",
            )
        shapes = tuple((layer.num_experts, *layer.shapes["down"]) for layer in inventory.layers)
        if shapes != self.facts.layers:
            raise ArtifactError("the costs cover other layers than the model has", option="costs", fix=_AGAIN)

    def _has(self, name: str) -> bool:
        return name == "rows" or self.facts.basis_bits != 16

    def _check(self) -> None:
        """Names, dtypes and shapes are those that the facts imply; factors are finite and not negative."""
        wanted = {name: (dtype, shape) for name, dtype, shape in declared(self.facts)}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items() if name != FACTS}
        odd = sorted(name for name in set(wanted) | set(found) if wanted.get(name) != found.get(name))
        if odd:
            raise ArtifactError(f"tensor {odd[0]!r} is missing or malformed", file=self.path, fix=_AGAIN)
        for name, tensor in self._tensors.items():
            if name.rpartition(".")[2] in ("weight_EH", "energy_EH", "curve_C", "errors_EHC"):
                low, high = float(tensor.amin()), float(tensor.amax())
                if not (low >= 0 and high < float("inf")):
                    raise ArtifactError(f"tensor {name!r} is negative or not finite", file=self.path, fix=_AGAIN)


_PARTS: Final = ("rows", "scale_HG", "weight_EH", "energy_EH", "curve_C", "errors_EHC")
_NAMES: Final = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def declared(facts: ComponentFacts) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a file but the facts, in their order."""
    spec = basis_spec(facts.basis_bits)
    count = len(facts.candidates)
    for index, (experts, hidden, _) in enumerate(facts.layers):
        for projection in ("gate", "up", "down"):
            if not (facts.joint and projection == "up"):
                yield f"{index}.{projection}.rows", torch.float16 if spec is None else torch.uint8, (hidden, hidden)
                if spec is not None:
                    groups = num_groups(hidden, spec.group_size)
                    yield f"{index}.{projection}.scale_HG", torch.float16, (hidden, groups)
            yield f"{index}.{projection}.weight_EH", torch.float32, (experts, hidden)
            yield f"{index}.{projection}.energy_EH", torch.float32, (experts, hidden)
            yield f"{index}.{projection}.curve_C", torch.float64, (count,)
            if facts.exact:
                yield f"{index}.{projection}.errors_EHC", torch.float32, (experts, hidden, count)


def write_table(path: Path, facts: ComponentFacts, layers: Iterable[dict[str, ProjectionCosts]]) -> None:
    """Write a file of component costs; on any error there is none.

    Args:
        path: the file to make.
        facts: what it holds.
        layers: the numbers, in order, projection by projection.

    Raises:
        StorageError: the disk is full or refuses.
    """
    facts.validate()
    # Padded with spaces, so that what follows is aligned.
    text = codec.canonical(facts.to_dict())
    text += b" " * (-len(text) % ALIGN)
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors = [(name, _NAMES[dtype], shape) for name, dtype, shape in declared(facts)]
    names = {name for name, _, _ in tensors}
    writer = ShardWriter(path, [(FACTS, "U8", tuple(whole.shape)), *tensors])
    try:
        writer.write(FACTS, whole)
        for index, layer in enumerate(layers):
            for projection in ("gate", "up", "down"):
                for name, value in layer[projection].parts():
                    if f"{index}.{projection}.{name}" in names:
                        writer.write(f"{index}.{projection}.{name}", value.contiguous())
    except BaseException:
        writer.abort()
        raise
    writer.close()


Table = CostTable | ComponentTable


def load_table(path: Path) -> Table:
    """The costs in a file: JSON for matrices and experts, binary for components.

    Raises:
        ArtifactError: it is neither.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ArtifactError(
            f"cannot be read: {error.strerror}", file=path, option="costs", fix="make it with moeq measure"
        ) from error
    # A safetensors file starts with the length of its header, then the header's brace.
    return ComponentTable(path) if head[8:] == b"{" and b"\0" in head[:8] else CostTable.load(path)

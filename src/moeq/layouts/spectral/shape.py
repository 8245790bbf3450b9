"""The spectral layout in numbers: what widths of components mean, and what they cost in bytes. No torch here.

BitsMoE writes the experts of a layer in one basis per projection: W_e = P_e V^T for gate and up, W_e = U P_e for
down. A component is one basis direction of one expert's matrix: the I coefficients that multiply it. It gets a
width of its own, 0 included, which drops it (BitsMoE, sections 2 and 4).

A layer stores for each projection a basis, a map that says the width of every component, and one slab for each
width: the components of that width as the rows of a matrix record (`moeq.spec.sections`), expert after expert, each
expert's in the order of their directions. Directions that no expert keeps are not in the basis.

Legend: E experts, H hidden size, I expert width, R kept directions, n components.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from moeq.errors import ArtifactError
from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX, LayerChoice, LayerPlan, OutTensor, data_tensor, table_tensor
from moeq.spec import (
    BITS,
    SCALE_BYTES,
    WHOLE_ROW,
    ZERO_BYTES,
    QuantSpec,
    align,
    num_groups,
    plane_row_bytes,
    sections,
    stored_bytes,
)

Widths = NDArray[np.uint8]
"""Width of each component, (E, directions)."""

WIDTHS: Final = (0, *BITS)
"""What a component can get; the position in this tuple is its code in the map."""
SLAB_WIDTHS: Final = tuple(reversed(BITS))
"""Slabs lie in this order, widest first."""
BASIS_BITS: Final = (8, 16)
"""Widths of a basis: 16 is float16, 8 is symmetric integers with a scale for each group of 128 inputs."""
SLAB_COLUMNS: Final = ("offset", "bits", "group_size", "levels", "rows")
"""Columns of the table of a spectral layer: one int64 row for the basis, then one for each slab, per projection."""
_MAP: Final = QuantSpec(bits=3, group_size=WHOLE_ROW, levels="half", layout="spectral")
_CODES: Final = np.zeros(256, dtype=np.uint8)
_CODES[list(WIDTHS)] = np.arange(len(WIDTHS))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralShape:
    """The shape of a layer of gated experts.

    Attributes:
        projections: their names, in storage order.
        num_experts: E.
        hidden: H.
        inner: I.
    """

    projections: tuple[str, ...]
    num_experts: int
    hidden: int
    inner: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the layers of a model are stored, the same for all of them.

    Attributes:
        basis_bits: one of `BASIS_BITS`.
        joint: gate and up share one basis.
        slabs: width -> how its slab is stored.
    """

    basis_bits: int
    joint: bool
    slabs: Mapping[int, QuantSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPlan:
    """The widths of all components of a model.

    Attributes:
        basis_bits: one of `BASIS_BITS`.
        joint: gate and up share one basis.
        layers: layer -> projection -> widths of the components, (E, H), as the text of `widths_text`.
    """

    basis_bits: int
    joint: bool
    layers: tuple[dict[str, str], ...]

    def __post_init__(self) -> None:
        if self.basis_bits not in BASIS_BITS:
            raise ArtifactError(f"a basis cannot have {self.basis_bits} bits", fix="allocate again")


def widths_text(widths_EH: Widths) -> str:
    """Three bits for each component, as base64: as long for any widths."""
    codes = _CODES[widths_EH.reshape(-1)]
    bits = (codes[:, None] >> np.array([2, 1, 0], dtype=np.uint8)) & 1
    return base64.b64encode(np.packbits(bits.reshape(-1)).tobytes()).decode()


def parse_widths(text: str, shape: tuple[int, int]) -> Widths:
    """Inverse of `widths_text`, (E, H).

    Raises:
        ArtifactError: the text is not that of this many widths.
    """
    count = shape[0] * shape[1]
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != -(-3 * count // 8):
        raise ArtifactError(f"the widths of {count} components have another length", fix="allocate again")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))[: 3 * count].reshape(count, 3)
    return np.array(WIDTHS, dtype=np.uint8)[bits @ np.array([4, 2, 1], dtype=np.uint8)].reshape(shape)


def kept_directions(widths: Mapping[str, Widths], *, joint: bool) -> dict[str, NDArray[np.bool_]]:
    """projection -> the directions that some expert keeps, (H,); those of gate and up are one set if they are joint."""
    kept: dict[str, NDArray[np.bool_]] = {name: np.any(each_EH > 0, axis=0) for name, each_EH in widths.items()}
    if joint:
        kept["gate"] = kept["up"] = kept["gate"] | kept["up"]
    return kept


def basis_spec(bits: int) -> QuantSpec | None:
    """How a basis is stored; None for raw float16."""
    return None if bits == 16 else QuantSpec(bits=bits, levels="sym")


def basis_bytes(bits: int, rank: int, hidden: int) -> int:
    """Stored bytes of a basis (R, H); a direction is a row for every projection, so that any can be left out."""
    spec = basis_spec(bits)
    if not rank:
        return 0
    return align(2 * rank * hidden) if spec is None else stored_bytes(spec, (rank, hidden))


def map_spec() -> QuantSpec:
    """How a map's codes lie in planes; it has no scales."""
    return _MAP


def map_bytes(num_experts: int, rank: int) -> int:
    """Stored bytes of a map: three bits for each expert and kept direction, rows padded to bytes."""
    return sections(_MAP, (num_experts, rank)).scales[0] if rank else 0


def component_bytes(spec: QuantSpec, inner: int) -> int:
    """Bytes of one component in its slab: codes and scales. What a slab takes beside its components is padding."""
    planes = sum(plane_row_bytes(inner, width) for width, _, _ in sections(spec, (1, inner)).planes)
    return planes + (SCALE_BYTES + ZERO_BYTES[spec.levels]) * num_groups(inner, spec.group_size)


def slab_bytes(spec: QuantSpec, rows: int, inner: int) -> int:
    """Stored bytes of a slab."""
    return stored_bytes(spec, (rows, inner)) if rows else 0


def padding_limit(form: Form, projections: int, num_experts: int) -> int:
    """Bytes of padding that a layer has at most.

    Sections of slabs, bases and maps end at a multiple of 64, a map's rows at whole bytes.
    """
    slabs = sum(len(sections(spec, (1, 1)).planes) + 2 for spec in form.slabs.values())
    return projections * (63 * (slabs + 2 + 2) + 3 * num_experts)


def slab_rows(widths_EH: Widths) -> dict[int, int]:
    """Width -> components that have it, for the widths of slabs."""
    counts = np.bincount(widths_EH.reshape(-1), minlength=max(BITS) + 1)
    return {width: int(counts[width]) for width in SLAB_WIDTHS}


def spectral_table_bytes(projections: int) -> int:
    """Bytes of the int64 table stored beside a spectral layer's blob."""
    return projections * (1 + len(SLAB_WIDTHS)) * len(SLAB_COLUMNS) * 8


def blob_bytes(form: Form, widths: Mapping[str, Widths], hidden: int, inner: int) -> int:
    """Stored bytes of a layer without its table: bases, maps, slabs, padding."""
    kept = kept_directions(widths, joint=form.joint)
    total = 0
    for name, widths_EH in widths.items():
        rank = int(kept[name].sum())
        if not (form.joint and name == "up"):
            total += basis_bytes(form.basis_bits, rank, hidden)
        total += map_bytes(len(widths_EH), rank)
        total += sum(slab_bytes(form.slabs[width], rows, inner) for width, rows in slab_rows(widths_EH).items() if rows)
    return total


RECORDS: Final = "grouped"
"""The layout of the specs that matrices get: linears outside the experts, since experts have components."""
OPTIONS: Final = ()
"""Options of a recipe that mean something for this layout alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralPlan(LayerPlan):
    """Which width every component of a layer gets.

    Attributes:
        form: how components are stored.
        widths: projection -> widths, (E, H).
        hidden, inner: H and I.
    """

    layout: ClassVar[str] = "spectral"

    form: Form
    widths: Mapping[str, Widths]
    hidden: int
    inner: int

    def tensors(self, path: str) -> tuple[tuple[OutTensor, OutTensor], ...]:
        """The blob of bases, maps and slabs, and its table."""
        size = blob_bytes(self.form, self.widths, self.hidden, self.inner)
        grid = len(self.widths), 1 + len(SLAB_WIDTHS), len(SLAB_COLUMNS)
        return ((data_tensor(path + DATA_SUFFIX, size), table_tensor(path + TABLE_SUFFIX, grid)),)

    def widths_count(self) -> dict[int, int]:
        """Width, 0 included -> components."""
        counts: Counter[int] = Counter()
        for widths_EH in self.widths.values():
            counts.update(dict(enumerate(np.bincount(widths_EH.reshape(-1)).tolist())))
        return {width: count for width, count in sorted(counts.items()) if count}


def planned(choice: LayerChoice) -> SpectralPlan:
    """What a plan decides about a layer; `details` are form and widths."""
    form, widths = choice.details
    hidden, inner = choice.shapes["down"]
    return SpectralPlan(form=form, widths=widths, hidden=hidden, inner=inner)


def problem(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why experts of these shapes cannot have this layout, or None."""
    hidden, inner = shapes.get("down", (0, 0))
    gated = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return None if dict(shapes) == gated else "spectral layers have gated experts"

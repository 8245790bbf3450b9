"""Tiny layers with fixed bytes, of every layout: what compiled kernels compute before they are believed.

Any bytes are codes, so nothing is rounded here and no quantizer is needed. Together the layers have every width, level
set and group size, ragged rows, widths mixed in one layer, and groups of 128 alone, for which kernels are specialised.

Legend: T tokens, k experts per token, E experts, H hidden, I expert width, N output rows, K input columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn

from moeq.components import Form, Widths, basis_bytes, basis_spec, kept_directions, slab_rows
from moeq.format.spectral import SpectralShape, build_spectral_table, pack_basis, pack_map, parse_spectral_table
from moeq.format.tiled import TileEntry, build_tile_table, views
from moeq.kernels.packed import PackedLayer, PackedMatrix
from moeq.kernels.spectral import SpectralLayer, read_layer
from moeq.kernels.tiled import TiledLayer
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, VECTORS, WHOLE_ROW, QuantSpec, sections, stored_bytes
from moeq.tiling import FACTOR, INDEX_BYTES, TileForm, side_sections

HIDDEN: Final = 244
INNER: Final = 104
"""Both are ragged, with more than half a block of 128 behind the last whole one: vectors reach into it."""
ODD_WIDTHS: Final = (8, 32, 60, 72, 128, 264)
"""Inputs of linears beside `HIDDEN`: all lengths of what is left behind whole vectors, and none."""
TOKENS: Final = 33
"""So many that kernels choose another tile, or decode first, than for few."""
TOP_K: Final = 2
_LOUD: Final = 4.0
"""Length of rows that few others are added to, so that their part of an answer is not lost in its rounding."""

SpecOf = Callable[[int, int], QuantSpec]
"""(expert, position of the projection) -> how its matrix is stored."""


@final
class Gated(nn.Module):
    """A family's experts module with down(silu(gate) * up) and no weights."""

    has_bias = False
    has_post_expert_norm = False
    is_concatenated = True

    def _apply_gate(self, fused: Tensor) -> Tensor:
        gate, up = fused.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calls:
    """Inputs of a layer.

    Attributes:
        x_TH: float32 numbers that bfloat16 has too, so that inputs are the same in every dtype.
        index_Tk: the choices, int64; the second token's last is of an expert that does not exist.
        weights_Tk: their weights, float32.
    """

    x_TH: Tensor
    index_Tk: Tensor
    weights_Tk: Tensor


def calls(num_experts: int, width: int = HIDDEN) -> Calls:
    """Inputs of `TOKENS` tokens of a width, for a layer of this many experts."""
    generator = _generator(num_experts)
    # So large that gates lie where SiLU is curved.
    x_TH = (4 * torch.randn(TOKENS, width, generator=generator, dtype=torch.float32)).bfloat16().float()
    index_Tk = (torch.arange(TOKENS).unsqueeze(1) + torch.tensor([0, 1])) % num_experts
    index_Tk[1, 1] = num_experts
    weights_Tk = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float32) + 0.1
    return Calls(x_TH=x_TH, index_Tk=index_Tk, weights_Tk=weights_Tk)


def matrices() -> dict[str, PackedMatrix]:
    """Matrices of every width, level set and group size, and of many lengths of rows."""
    generator = _generator(1)
    found = {}
    for at, bits in enumerate(BITS):
        # Powers of two and the others meet all level sets and group sizes in turn.
        spec = QuantSpec(bits=bits, group_size=GROUP_SIZES[(at + 2) % 4], levels=SCALAR_LEVELS[at % 4])
        group = "whole rows" if spec.group_size == WHOLE_ROW else f"groups of {spec.group_size}"
        for columns in (HIDDEN, ODD_WIDTHS[at % len(ODD_WIDTHS)]):
            shape = 40, columns
            name = f"{bits} bits {spec.levels} in {group} of {columns} inputs"
            found[name] = PackedMatrix(record=_record(spec, shape, generator), spec=spec, shape=shape)
    return found


def codebook_matrices() -> dict[str, PackedMatrix]:
    """Matrices of every kind of codebook, one with more than one block down, and of many lengths of rows."""
    generator = _generator(2)
    found = {}
    for bits in VECTORS:
        spec = _codebook_spec(bits)
        for at, columns in enumerate((*ODD_WIDTHS, HIDDEN)):
            shape = 264 if at == len(ODD_WIDTHS) else 40, columns
            name = f"codebooks of {bits} bits of {columns} inputs"
            found[name] = PackedMatrix(record=_record(spec, shape, generator), spec=spec, shape=shape)
    return found


def grouped_layers() -> dict[str, PackedLayer]:
    """Everything mixed in one layer, and a layer with groups of 128 and whole rows alone."""
    return {"mixed groups": _grouped(7, _mixed, 3), "groups of 128": _grouped(3, _plain, 4)}


def codebook_layers() -> dict[str, PackedLayer]:
    """A layer of codebooks of every kind."""
    widths = tuple(VECTORS)
    return {"codebooks": _grouped(3, lambda e, p: _codebook_spec(widths[(e + p) % len(widths)]), 5)}


def spectral_layers() -> dict[str, SpectralLayer]:
    """A shared basis of 8 bits, and float16 bases of each projection's own."""
    return {"basis of 8 bits": _spectral(5, 8, joint=True), "basis of 16 bits": _spectral(3, 16, joint=False)}


def tiled_layers() -> dict[str, TiledLayer]:
    """Factors of gate and up alone, as they are by default; and everything that there can be."""
    layers = grouped_layers()
    usual = TileForm(rank=8, rows=2, columns=4)
    none = TileForm(rank=0, rows=2, columns=4)
    full = TileForm(rank=4, rows=2, columns=2, scales="expert", orders="tile", block=32, plain=HIDDEN % 32)
    inner = replace(full, plain=INNER % 32)
    return {
        "factors": _tiled(layers["mixed groups"], {"gate": usual, "up": usual, "down": none}),
        "factors and rotation": _tiled(layers["groups of 128"], {"gate": full, "up": full, "down": inner}),
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mixed(expert: int, position: int) -> QuantSpec:
    cycle = 3 * expert + position
    return QuantSpec(
        bits=BITS[cycle % len(BITS)], group_size=GROUP_SIZES[cycle % 4], levels=SCALAR_LEVELS[(cycle + expert) % 4]
    )


def _plain(expert: int, position: int) -> QuantSpec:
    cycle = 3 * expert + position
    group_size = WHOLE_ROW if cycle % 4 == 3 else 128
    return QuantSpec(bits=BITS[cycle % len(BITS)], group_size=group_size, levels=SCALAR_LEVELS[(cycle + expert) % 4])


def _codebook_spec(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=WHOLE_ROW, levels="vector")


def _record(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator, length: float = 0.5) -> Tensor:
    """Any codes, and scales and zeros that a checkpoint could have: rows come out about as long as `length`."""
    record = torch.randint(0, 256, (stored_bytes(spec, shape),), generator=generator, dtype=torch.int64).byte()
    where = sections(spec, shape)
    offset, size = where.scales
    top = 2**spec.bits if spec.codebooks is None else 80  # what codes, or entries of codebooks, are about as large as
    scale = (
        (torch.rand(size // 2, generator=generator, dtype=torch.float32) + 0.5) * 2 * length / (top * shape[1] ** 0.5)
    )
    record[offset : offset + size] = scale.half().view(torch.uint8)
    if spec.levels == "asym16":
        offset, size = where.zeros
        zero = torch.rand(size // 2, generator=generator, dtype=torch.float32) * 2**spec.bits
        record[offset : offset + size] = zero.half().view(torch.uint8)
    return record


def _grouped(num_experts: int, spec_of: SpecOf, seed: int) -> PackedLayer:
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    generator = _generator(seed)
    records, entries, offset = [], [], 0
    for expert in range(num_experts):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = spec_of(expert, position)
            records.append(_record(spec, shape, generator))
            row.append((offset, spec))
            offset += records[-1].numel()
        entries.append(tuple(row))
    return PackedLayer(data=torch.cat(records), entries=tuple(entries), shapes=shapes)


def _spectral(num_experts: int, basis_bits: int, *, joint: bool) -> SpectralLayer:
    generator = _generator(basis_bits)
    slabs = {
        bits: QuantSpec(
            bits=bits, group_size=GROUP_SIZES[at % 4], levels=("half", "asym", "sym")[at % 3], layout="spectral"
        )
        for at, bits in enumerate(BITS)
    }
    form = Form(basis_bits=basis_bits, joint=joint, slabs=slabs)
    shape = SpectralShape(projections=("gate", "up", "down"), num_experts=num_experts, hidden=HIDDEN, inner=INNER)
    # Of 40 directions, those of the width 0 are dropped, and no expert keeps the last one.
    choices = np.array([0, *BITS, 2, 3, 4], dtype=np.uint8)
    widths: dict[str, Widths] = {}
    for at, name in enumerate(shape.projections):
        widths[name] = np.zeros((num_experts, HIDDEN), dtype=np.uint8)
        for expert in range(num_experts):
            widths[name][expert, :39] = choices[(np.arange(39) * 3 + 5 * expert + at) % len(choices)]
    kept = kept_directions(widths, joint=joint)
    parts = []
    for name, widths_EH in widths.items():
        rank = int(kept[name].sum())
        if not (joint and name == "up"):
            parts.append(_basis(basis_bits, rank, generator))
        parts.append(pack_map(widths_EH[:, kept[name]]))
        for bits, rows in slab_rows(widths_EH).items():
            if rows:
                parts.append(_record(slabs[bits], (rows, INNER), generator, _LOUD))
    data, table = torch.cat(parts), build_spectral_table(form, widths, shape)
    return read_layer(data, parse_spectral_table(table, shape, data.numel()), shape, "self-test")


def _basis(bits: int, rank: int, generator: torch.Generator) -> Tensor:
    spec = basis_spec(bits)
    if spec is not None:
        return _record(spec, (rank, HIDDEN), generator)
    rows = torch.randn(rank, HIDDEN, generator=generator, dtype=torch.float32) * HIDDEN**-0.5
    record = pack_basis(rows, None, bits)
    assert record.numel() == basis_bytes(bits, rank, HIDDEN)
    return record


def _tiled(residual: PackedLayer, forms: Mapping[str, TileForm]) -> TiledLayer:
    num_experts = residual.num_experts
    generator = _generator(num_experts)
    parts, tiles, start = [], {}, 0
    for name, shape in residual.shapes.items():
        parts.append(_sides(forms[name], num_experts, shape, generator))
        tiles[name] = TileEntry(offset=start, form=forms[name])
        start += parts[-1].numel()
    blob = torch.cat(parts)
    return TiledLayer(
        residual=residual,
        sides=views(blob, tiles, num_experts, residual.shapes),
        side_data=blob,
        tiles=build_tile_table(forms, num_experts, residual.shapes),
    )


def _sides(form: TileForm, num_experts: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """The bytes of one projection's sides; every expert has a cell of its own."""
    outputs, inputs = shape
    where = side_sections(form, num_experts, shape)
    data = torch.zeros(where.total, dtype=torch.uint8)

    def put(place: tuple[int, int], part: Tensor) -> None:
        data[place[0] : place[0] + place[1]] = part

    if form.has_cells:
        places = torch.randperm(form.rows * form.columns, generator=generator)[:num_experts]
        put(where.cells, _indices(torch.stack([places // form.columns, places % form.columns], 1)))
    if form.rank:
        put(where.inputs, _record(FACTOR, (form.rows * form.rank, inputs), generator))
        put(where.outputs, _record(FACTOR, (form.columns * form.rank, outputs), generator, _LOUD))
    if form.scales == "expert":
        scales = torch.rand(num_experts * inputs, generator=generator, dtype=torch.float32) + 0.5
        put(where.scales, scales.half().view(torch.uint8))
    if form.orders != "none":
        owners = form.order_owners(num_experts)
        put(where.orders, _indices(torch.stack([torch.randperm(inputs, generator=generator) for _ in range(owners)])))
    return data


def _indices(values: Tensor) -> Tensor:
    """uint16 numbers as bytes."""
    assert INDEX_BYTES == 2
    flat = values.flatten()
    return torch.stack([flat % 256, flat // 256], dim=1).to(torch.uint8).flatten()


def on(layer: TiledLayer, device: torch.device) -> TiledLayer:
    """A tiled layer with its bytes on a device."""
    assert layer.side_data is not None
    blob = layer.side_data.to(device)
    tiles, start = {}, 0
    for name, sides in layer.sides.items():
        tiles[name] = TileEntry(offset=start, form=sides.form)
        start += sides.data.numel()
    residual = replace(layer.residual, data=layer.residual.data.to(device))
    return replace(
        layer, residual=residual, side_data=blob, sides=views(blob, tiles, residual.num_experts, residual.shapes)
    )

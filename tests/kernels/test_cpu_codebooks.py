"""The compiled kernels for codebooks against the torch reference: exactly with exact activations, else within 8 bits."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_help import mixtral, random_record
from torch import Tensor, nn

from moeq import native
from moeq.format.blob import table_of
from moeq.format.packing import decode_in_chunks, decode_matrix
from moeq.format.tiled import TileEntry, build_tile_table, pack_sides, views
from moeq.kernels import cpu, cpu_layouts, dispatch, reference, tiled
from moeq.kernels.packed import PackedLayer, PackedMatrix, current_facts
from moeq.kernels.tiled import TiledLayer
from moeq.spec import QuantSpec, align, sections, stored_bytes
from moeq.tiling import TileForm, side_sections

pytestmark = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
HIDDEN, INNER, EXPERTS = 264, 520, 5
SPECS = {bits: QuantSpec(bits=bits, group_size=-1, levels="vector") for bits in (2, 3)}
SCALARS = (QuantSpec(bits=1, levels="half"), QuantSpec(bits=4), QuantSpec(bits=8, levels="sym", group_size=-1))
SHAPES = ((1, 4), (3, 8), (300, 264), (17, 500), (257, 1024), (40, 4360), (16, 128))
"""(N, K), with whole and ragged blocks of rows and of columns, one wider than what is looked up at a time."""


def record_of(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random record; scales of codebooks are such that rows are about as long as those of scalar levels."""
    record = random_record(spec, shape, generator)
    if spec.codebooks is not None:
        offset, size = sections(spec, shape).scales
        scales = record[offset : offset + size].view(torch.float16)
        record[offset : offset + size] = (scales * (2**spec.bits / 80)).view(torch.uint8)
    return record


def rounded(x_SK: Tensor) -> Tensor:
    """What rounding activations to 8 bits in runs of 128 makes of them."""
    columns = x_SK.shape[-1]
    runs = nn.functional.pad(x_SK, (0, -columns % 128)).view(len(x_SK), -1, 128)
    top = runs.abs().amax(-1, keepdim=True)
    most = torch.full_like(top, 127)  # a division: 127 / top would be the product with a rounded inverse
    back = torch.where(top > 0, (runs * (most / top)).round() * (top / most), 0.0)
    return back.view(len(x_SK), -1)[:, :columns]


def worst(found: Tensor, wanted: Tensor, x_SK: Tensor, w_NK: Tensor) -> float:
    """The largest error, as a share of the lengths of vector and row."""
    return float(((found - wanted).abs() / (x_SK.norm(dim=1)[:, None] * w_NK.norm(dim=1)[None])).max())


def layer_of(seed: int = 0, *, exact: bool | None = None) -> PackedLayer:
    """Experts in codebooks of both widths and in scalar levels, mixed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    kinds = (SPECS[2], SPECS[3], SCALARS[seed % 3], SPECS[3], SPECS[2], SPECS[3], SCALARS[(seed + 1) % 3])
    records, entries, offset = [], [], 0
    for expert in range(EXPERTS):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = kinds[(3 * expert + position + seed) % len(kinds)]
            records.append(record_of(spec, shape, generator))
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
        entries.append(tuple(row))
    table = table_of(tuple(entries))
    return PackedLayer(data=torch.cat(records), entries=tuple(entries), shapes=shapes, table=table, exact=exact)


def tiled_layer(seed: int, form: TileForm, *, exact: bool | None = None) -> TiledLayer:
    """The same residuals, with sides of one form."""
    generator = torch.Generator().manual_seed(seed)
    residual = layer_of(seed, exact=exact)
    places = torch.randperm(form.rows * form.columns, generator=generator)[:EXPERTS]
    cells = torch.stack([places // form.columns, places % form.columns], 1)
    sides, tiles, start = [], {}, 0
    for name, shape in residual.shapes.items():
        orders = torch.randperm(shape[1], generator=generator)[None]
        a_MR, b_NR = (
            torch.randn(count * form.rank, width, generator=generator) / width**0.5
            for count, width in ((form.rows, shape[1]), (form.columns, shape[0]))
        )
        sides.append(pack_sides(form, shape, cells, (a_MR, b_NR), None, orders))
        tiles[name] = TileEntry(offset=start, form=form)
        start += side_sections(form, EXPERTS, shape).total
    blob = torch.cat(sides)
    return TiledLayer(
        residual=residual,
        sides=views(blob, tiles, EXPERTS, residual.shapes),
        side_data=blob,
        tiles=build_tile_table(dict.fromkeys(residual.shapes, form), EXPERTS, residual.shapes),
    )


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_Tk = torch.randint(0, EXPERTS, (tokens, 2), generator=generator)
    weight_Tk = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator), index_Tk, weight_Tk

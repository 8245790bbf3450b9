"""Packed layers and experts modules for the tests of kernels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq.format.records import pack_matrix
from moeq.kernels.facts import kernel_facts
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.layouts.spectral.facts import spectral_facts
from moeq.layouts.spectral.reference import SpectralLayer, read_layer
from moeq.layouts.spectral.shape import Form, SpectralShape, basis_spec, kept_directions, slab_rows
from moeq.layouts.spectral.stored import build_spectral_table, pack_basis, pack_map, parse_spectral_table
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.shape import FACTOR, TileForm, side_sections
from moeq.layouts.tiled.stored import TileEntry, build_tile_table, pack_sides, views
from moeq.quantizers.rtn import Rtn
from moeq.spec import QuantSpec, sections, stored_bytes

SpecOf = Callable[[int, int], QuantSpec]
"""(expert, position of the projection) -> how its matrix is stored."""


def random_record(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Any codes, scales and zeros that a checkpoint could have."""
    record = torch.randint(0, 256, (stored_bytes(spec, shape),), generator=generator).byte()
    where = sections(spec, shape)
    offset, size = where.scales
    # What codes, or entries of codebooks and trellises, are about as large as.
    top = 80 if spec.codebooks is not None else 50 if spec.history else 2**spec.bits
    scale = (torch.rand(size // 2, generator=generator) + 0.5) / (top * shape[1] ** 0.5)
    record[offset : offset + size] = scale.half().view(torch.uint8)
    if spec.levels == "asym16":
        offset, size = where.zeros
        zero = torch.rand(size // 2, generator=generator) * 2**spec.bits
        record[offset : offset + size] = zero.half().view(torch.uint8)
    return record


def packed(weights: Tensor, spec: QuantSpec) -> Tensor:
    rounded = Rtn().quantize(weights, spec, None)
    return pack_matrix(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)


def packed_matrix(shape: tuple[int, int], spec: QuantSpec, device: torch.device) -> PackedMatrix:
    """A random matrix."""
    record = packed(torch.randn(shape), spec).to(device)
    return PackedMatrix(record=record, spec=spec, shape=shape, facts=kernel_facts([[(0, spec)]], [shape], device))


def packed_layer(
    num_experts: int, hidden: int, inner: int, spec_of: SpecOf, device: torch.device, *, gated: bool = True
) -> PackedLayer:
    """A layer of random experts, with its facts."""
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not gated:
        del shapes["gate"]
    records, entries, offset = [], [], 0
    for expert in range(num_experts):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = spec_of(expert, position)
            records.append(packed(torch.randn(shape) * shape[1] ** -0.5, spec))
            row.append((offset, spec))
            offset += records[-1].numel()
        entries.append(tuple(row))
    facts = kernel_facts(entries, list(shapes.values()), device)
    data = torch.cat(records).to(device)
    return PackedLayer(data=data, entries=tuple(entries), shapes=shapes, facts=facts)


def spectral_layer(
    widths: dict[str, np.ndarray], form: Form, hidden: int, inner: int, device: torch.device
) -> SpectralLayer:
    """A layer of random components of these widths, (E, H), with its facts."""
    num_experts = len(widths["down"])
    shape = SpectralShape(projections=tuple(widths), num_experts=num_experts, hidden=hidden, inner=inner)
    kept = kept_directions(widths, joint=form.joint)
    parts = []
    for name, widths_EH in widths.items():
        rank = int(kept[name].sum())
        if not (form.joint and name == "up"):
            rows, spec = torch.randn(rank, hidden) * hidden**-0.5, basis_spec(form.basis_bits)
            parts.append(pack_basis(rows, None, 16) if spec is None or not rank else packed(rows, spec))
        parts.append(pack_map(widths_EH[:, kept[name]]))
        for width, count in slab_rows(widths_EH).items():
            if count:
                parts.append(packed(torch.randn(count, inner) * inner**-0.5, form.slabs[width]))
    data, table = torch.cat(parts), build_spectral_table(form, widths, shape)
    layer = read_layer(data.to(device), parse_spectral_table(table, shape, data.numel()), shape, "layer")
    facts = spectral_facts(layer.entries, layer.widths, layer.starts, shape, device)
    return replace(layer, facts=facts)


def tiled_layer_of(residual: PackedLayer, form: TileForm, generator: torch.Generator) -> TiledLayer:
    """A layer with random sides of one form."""
    num_experts = residual.num_experts
    sides, tiles, start = [], {}, 0
    for name, shape in residual.shapes.items():
        places = torch.randperm(form.rows * form.columns, generator=generator)[:num_experts]
        cells = torch.stack([places // form.columns, places % form.columns], 1)
        owners = form.order_owners(num_experts)
        orders = torch.stack([torch.randperm(shape[1], generator=generator) for _ in range(owners)]) if owners else None
        scales = torch.rand(num_experts, shape[1], generator=generator) + 0.5 if form.scales == "expert" else None
        where = side_sections(form, num_experts, shape)
        plain = replace(form, rank=0, scales="none") if form.rank else form
        data = torch.zeros(where.total, dtype=torch.uint8)
        packed = pack_sides(plain, shape, cells, None, None, orders)
        for section, mine in (("cells", where.cells), ("orders", where.orders)):
            at, count = getattr(side_sections(plain, num_experts, shape), section)
            if count:
                data[mine[0] : mine[0] + mine[1]] = packed[at : at + count]
        if form.rank:
            data[: where.cells[1]] = cells.flatten().to(torch.int16).view(torch.uint8)
            for place, count, width in ((where.inputs, form.rows, shape[1]), (where.outputs, form.columns, shape[0])):
                record = random_record(FACTOR, (count * form.rank, width), generator)
                data[place[0] : place[0] + place[1]] = record
        if scales is not None:
            data[where.scales[0] : where.scales[0] + where.scales[1]] = scales.half().view(torch.uint8).flatten()
        sides.append(data)
        tiles[name] = TileEntry(offset=start, form=form)
        start += where.total
    blob = torch.cat(sides)
    forms = dict.fromkeys(residual.shapes, form)
    return TiledLayer(
        residual=residual,
        sides=views(blob, tiles, num_experts, residual.shapes),
        side_data=blob,
        tiles=build_tile_table(forms, num_experts, residual.shapes),
    )


def mixtral(hidden: int, inner: int, num_experts: int, hidden_act: str = "silu") -> nn.Module:
    """A module with plain gating; its own weights are not looked at."""
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        hidden_act=hidden_act,
    )
    return MixtralExperts(config)


def rounded(x_SK: Tensor) -> Tensor:
    """What rounding activations to 8 bits in runs of 128 makes of them."""
    columns = x_SK.shape[-1]
    runs = nn.functional.pad(x_SK, (0, -columns % 128)).view(-1, (columns + 127) // 128, 128)
    top = runs.abs().amax(-1, keepdim=True)
    most = torch.full_like(top, 127)  # a division: 127 / top would be the product with a rounded inverse
    back = torch.where(top > 0, (runs * (most / top)).round() * (top / most), 0.0)
    return back.view(len(x_SK), -1)[:, :columns]


def worst(found: Tensor, wanted: Tensor, x_SK: Tensor, w_NK: Tensor) -> float:
    """The largest error, as a share of the lengths of vector and row, of which no code is worth less than 1."""
    lengths = x_SK.norm(dim=1)[:, None] * w_NK.norm(dim=1).clamp(min=1)[None]
    return float(((found - wanted).abs() / lengths).max())


def relative_error(answer: Tensor, wanted: Tensor) -> float:
    """|answer - wanted| / |wanted|, over all numbers."""
    return ((answer.float() - wanted.float()).norm() / wanted.float().norm()).item()

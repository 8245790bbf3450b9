"""Handlers of tiled experts with random residuals of several widths and random sides."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moeq.format.records import pack_matrix
from moeq.layouts.tiled.serving import TiledExperts
from moeq.layouts.tiled.shape import TileForm
from moeq.layouts.tiled.stored import build_tile_table, pack_sides, parse_tile_table
from moeq.layouts.tiled.writer import round_factor
from moeq.quantizers.rtn import Rtn
from moeq.quantizers.trellis import Trellis
from moeq.spec import TRELLISES, QuantSpec, stored_bytes
from moeq.transforms import placement

Shapes = Mapping[str, tuple[int, int]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sides_of(form: TileForm, shape: tuple[int, int], num_experts: int, seed: int) -> Tensor:
    """The bytes of one projection's sides."""
    grid = placement.at_random(num_experts, (form.rows, form.columns), seed)
    if form.rows == form.columns == num_experts:
        grid = placement.in_order(num_experts, (num_experts, num_experts))
    factors = None
    if form.rank:
        inputs = round_factor(0.1 * random(form.rows * form.rank, shape[1], seed=seed + 1))[0]
        factors = inputs, round_factor(random(form.columns * form.rank, shape[0], seed=seed + 2))[0]
    owners = form.order_owners(num_experts)
    orders = torch.stack([torch.randperm(shape[1]) for _ in range(owners)]) if owners else None
    scales = random(num_experts, shape[1], seed=seed + 3).exp() if form.scales == "expert" else None
    return pack_sides(form, shape, torch.tensor([grid.row_E, grid.column_E]).T, factors, scales, orders)


def tiled(forms: Mapping[str, TileForm], shapes: Shapes, num_experts: int, *, trellises: bool = False) -> TiledExperts:
    """A handler; `forms` has one for each projection."""
    torch.manual_seed(0)
    records, entries, offset = [], [], 0
    for expert in range(num_experts):
        row = []
        for name, shape in shapes.items():
            spec = QuantSpec(bits=(2, 3, 4, 8)[expert % 4], group_size=32)
            if trellises and spec.bits in TRELLISES:
                spec = replace(spec, levels="trellis")
            rounder = Trellis() if spec.history else Rtn()
            q = rounder.quantize(0.1 * random(*shape, seed=10 * expert + len(name)), spec, None)
            records.append(pack_matrix(q.codes_NK, q.scale_NG, q.zero_NG, spec))
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
        entries.append(tuple(row))
    sides = torch.cat(
        [sides_of(forms[name], shape, num_experts, 100 * i) for i, (name, shape) in enumerate(shapes.items())]
    )
    table = build_tile_table(forms, num_experts, shapes)
    tiles = parse_tile_table(table, num_experts, shapes, sides.numel())
    handler = TiledExperts(dict(shapes))
    handler.exact = True  # few tokens would be rounded to 8 bits on a CPU
    handler.bind(torch.cat(records), tuple(entries), sides, tiles, "layer")
    return handler

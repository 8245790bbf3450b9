"""What kernels for tiled layers are asked before they are believed (`moeq.layouts.known_answers`)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from moeq.layouts.grouped import known as grouped
from moeq.layouts.grouped.packed import PackedLayer
from moeq.layouts.grouped.reference import linear
from moeq.layouts.known_answers import (
    HIDDEN,
    INNER,
    LOUD,
    Case,
    Cases,
    Experts,
    Gated,
    calls,
    expert_cases,
    record_of,
    seeded,
    ways_of,
)
from moeq.layouts.tiled import cpu, gpu, reference
from moeq.layouts.tiled.facts import side_facts
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.shape import FACTOR, INDEX_BYTES, TileForm, side_sections
from moeq.layouts.tiled.stored import TileEntry, build_tile_table, views


def layers() -> dict[str, TiledLayer]:
    """Factors of gate and up alone, as they are by default; and everything that there can be."""
    plain = grouped.layers()
    usual = TileForm(rank=8, rows=2, columns=4)
    none = TileForm(rank=0, rows=2, columns=4)
    full = TileForm(rank=4, rows=2, columns=2, scales="expert", orders="tile", block=32, plain=HIDDEN % 32)
    inner = replace(full, plain=INNER % 32)
    return {
        "factors": _tiled(plain["mixed groups"], {"gate": usual, "up": usual, "down": none}),
        "factors and rotation": _tiled(plain["groups of 128"], {"gate": full, "up": full, "down": inner}),
    }


def _tiled(residual: PackedLayer, forms: Mapping[str, TileForm]) -> TiledLayer:
    num_experts = residual.num_experts
    generator = seeded(num_experts)
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
        put(where.inputs, record_of(FACTOR, (form.rows * form.rank, inputs), generator))
        put(where.outputs, record_of(FACTOR, (form.columns * form.rank, outputs), generator, LOUD))
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


def _tiled_cases(path: str, device: torch.device) -> Iterator[Case]:
    module = Gated()
    for position, (name, layer) in enumerate(layers().items()):
        call = calls(layer.residual.num_experts)
        inputs = call.x_TH.double(), call.index_Tk, call.weights_Tk
        there = on(layer, device)
        there = replace(there, residual=grouped.ready(path, there.residual, device))
        if path == "triton":
            there = replace(there, facts={side: side_facts(sides) for side, sides in there.sides.items()})

        def kernel(exact: bool | None, there: TiledLayer = there) -> Experts:
            run = gpu.run_experts if path == "triton" else cpu.experts
            return partial(run, module, replace(there, residual=replace(there.residual, exact=exact)))

        def wanted(
            rounds: bool, layer: TiledLayer = layer, inputs: tuple[Tensor, Tensor, Tensor] = inputs
        ) -> tuple[Tensor, bool]:
            # Inputs of the factors are rounded by the kernels, not by the reference.
            product = grouped.rounded_linear if rounds else linear
            return reference.experts(module, layer, *inputs, linear=product), not rounds

        yield from expert_cases(name, call, device, ways_of(path, position), kernel, wanted)


CASES: Final[Mapping[str, Cases]] = {"tiled": _tiled_cases}
LATE_CASES: Final[Mapping[str, Cases]] = {}
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {"tiled": ("decode", "linear", "grouped")}

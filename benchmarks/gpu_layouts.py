"""Layers of the layouts "spectral" and "tiled" beside grouped ones, for benchmarks/gpu.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from moeq.layouts.grouped import gpu
from moeq.layouts.grouped.packed import PackedLayer
from moeq.layouts.spectral import gpu as gpu_spectral
from moeq.layouts.spectral import reference as spectral
from moeq.layouts.spectral.facts import spectral_facts
from moeq.layouts.spectral.reference import SpectralLayer, read_layer
from moeq.layouts.spectral.shape import Form, Widths, blob_bytes
from moeq.layouts.spectral.stored import SpectralShape, basis_spec, build_spectral_table, pack_map, parse_spectral_table
from moeq.layouts.tiled import gpu as gpu_tiled
from moeq.layouts.tiled import reference as tiled
from moeq.layouts.tiled.facts import side_facts
from moeq.layouts.tiled.reference import TiledLayer
from moeq.layouts.tiled.shape import FACTOR, TileForm, grid_shape, side_sections
from moeq.layouts.tiled.stored import TileEntry, views
from moeq.spec import QuantSpec, sections

RANK = 32
"""Of the low-rank factors of gate and up; down has none, as by default."""
WIDTHS = (2, 3, 4)
Shape = tuple[int, int, int, int]
"""hidden, inner, experts, experts per token."""
Arguments = tuple[Tensor, Tensor, Tensor]
BYTES_TOLERANCE = 0.02
"""By which the bytes of two layouts may differ; small layers cannot come nearer."""


def set_scales(data: Tensor, start: int, spec: QuantSpec, shape: tuple[int, int], size: float) -> None:
    """Give a record of random bytes scales, such that its weights are about `size`."""
    at, length = sections(spec, shape).scales
    scales = data[start + at : start + at + length].view(torch.float16)
    scales.uniform_(0.5, 1.0).mul_(2 * size / 2**spec.bits)


def dropped(
    draws: dict[str, Widths], ranks: dict[str, np.ndarray], size: Callable[[dict[str, Widths]], int], budget: int
) -> dict[str, Widths]:
    """The widths with as many components dropped, those of lowest rank first, as it takes to fit `budget` bytes.

    Bisection keeps what fits: its last try may be the one that does not.
    """
    low, high = 0.0, 1.0
    best = {name: np.zeros_like(each) for name, each in draws.items()}
    for _ in range(24):
        share = (low + high) / 2
        widths = {name: np.where(ranks[name] < share, 0, draws[name]).astype(np.uint8) for name in draws}
        if size(widths) <= budget:
            best, high = widths, share
        else:
            low = share
    return best


def random_spectral(shape: Shape, budget: int, device: torch.device) -> SpectralLayer:
    """Components of 2, 3 and 4 bits in bases of 8; as many are dropped as it takes to store `budget` bytes."""
    hidden, inner, num_experts, _ = shape
    names = ("gate", "up", "down")
    slabs = {b: QuantSpec(bits=b, levels="half" if b <= 2 else "sym", layout="spectral") for b in WIDTHS}
    form = Form(basis_bits=8, joint=True, slabs=slabs)
    rng = np.random.default_rng(0)
    draws = {name: rng.choice(np.array(WIDTHS, dtype=np.uint8), (num_experts, hidden)) for name in names}
    ranks = {name: rng.random((num_experts, hidden)) for name in names}
    widths = dropped(draws, ranks, lambda widths: blob_bytes(form, widths, hidden, inner), budget)
    of = SpectralShape(projections=names, num_experts=num_experts, hidden=hidden, inner=inner)
    table = build_spectral_table(form, widths, of)
    data = torch.randint(0, 256, (blob_bytes(form, widths, hidden, inner),), dtype=torch.uint8, device=device)
    entries = parse_spectral_table(table, of, data.numel())
    for entry in entries:
        kept = widths[entry.projection].any(0)
        if entry.projection != "down":
            kept = widths["gate"].any(0) | widths["up"].any(0)
        packed_map = pack_map(widths[entry.projection][:, kept])
        data[entry.map : entry.map + packed_map.numel()] = packed_map.to(device)
        basis = basis_spec(entry.basis_bits)
        assert basis is not None
        set_scales(data, entry.basis, basis, (entry.rank, hidden), hidden**-0.5)
        for slab in entry.slabs:
            set_scales(data, slab.offset, slab.spec, (slab.rows, inner), inner**-0.5)
    layer = read_layer(data, entries, of, "random layer")
    return replace(layer, facts=spectral_facts(layer.entries, layer.widths, layer.starts, of, device))


def tile(layer: PackedLayer, shape: Shape) -> TiledLayer:
    """The layer as residuals, with random factors for gate and up."""
    hidden, inner, num_experts, _ = shape
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    entries, parts, offset = {}, [], 0
    for name, each in shapes.items():
        rows, columns = grid_shape("auto", num_experts, each, name)
        form = TileForm(rank=0 if name == "down" else RANK, rows=rows, columns=columns)
        where = side_sections(form, num_experts, each)
        data = torch.randint(0, 256, (where.total,), dtype=torch.uint8, device=layer.data.device)
        if form.rank:
            cells = [(expert // columns, expert % columns) for expert in range(num_experts)]
            stored = torch.tensor([(number % 256, number // 256) for cell in cells for number in cell])
            data[where.cells[0] : where.cells[0] + where.cells[1]] = stored.flatten().to(data)
            set_scales(data, where.inputs[0], FACTOR, (rows * RANK, hidden), hidden**-0.5)
            set_scales(data, where.outputs[0], FACTOR, (columns * RANK, inner), RANK**-0.5)
        entries[name] = TileEntry(offset=offset, form=form)
        parts.append(data)
        offset += where.total
    sides = views(torch.cat(parts), entries, num_experts, shapes)
    facts = {name: side_facts(side) for name, side in sides.items()}
    return TiledLayer(residual=layer, sides=sides, facts=facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trio:
    """Layers of one shape: grouped, spectral with as many bytes, and the grouped one with factors added."""

    grouped: PackedLayer
    spectral: SpectralLayer
    tiled: TiledLayer


def trio(shape: Shape, grouped: PackedLayer) -> Trio:
    budget = grouped.data.numel()
    found = Trio(
        grouped=grouped, spectral=random_spectral(shape, budget, grouped.data.device), tiled=tile(grouped, shape)
    )
    off = found.spectral.data.numel() / budget - 1
    print(f"spectral has {off:+.3%} of the bytes of grouped", flush=True)
    if abs(off) > BYTES_TOLERANCE:
        raise RuntimeError(f"not equal bytes: {found.spectral.data.numel()} for {budget}")
    return found


def errors(module: nn.Module, layers: Trio, arguments: Arguments) -> tuple[float, float]:
    """Relative errors of spectral and tiled against their torch references in float32, over at most 16 tokens."""
    x_TH, index_Tk, weights_Tk = (argument[:16] for argument in arguments)
    answers = (
        gpu_spectral.run_experts(module, layers.spectral, *arguments)[:16],
        gpu_tiled.run_experts(module, layers.tiled, *arguments)[:16],
    )
    wanted = (
        spectral.experts(module, layers.spectral, x_TH.float(), index_Tk, weights_Tk),
        tiled.experts(module, layers.tiled, x_TH.float(), index_Tk, weights_Tk),
    )
    first, second = (((a.float() - w).norm() / w.norm()).item() for a, w in zip(answers, wanted, strict=True))
    if not max(first, second) < 5e-2:  # bfloat16 between four products; the interpreter cuts off where a GPU rounds
        raise RuntimeError(f"wrong: relative error {first:.2g} spectral, {second:.2g} tiled")
    return first, second


def calls(module: nn.Module, layers: Trio, arguments: Arguments) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    return {
        "grouped": lambda: gpu.run_experts(module, layers.grouped, *arguments),
        "spectral": lambda: gpu_spectral.run_experts(module, layers.spectral, *arguments),
        "tiled": lambda: gpu_tiled.run_experts(module, layers.tiled, *arguments),
    }

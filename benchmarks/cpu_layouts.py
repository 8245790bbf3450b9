"""Decoding one token from layers of the layouts "spectral" and "tiled" against "grouped", at equal stored bytes.

    python benchmarks/cpu_layouts.py [--threads 1] [--windows 40] [--cpu-time]

As in cpu.py: all layouts take turns in this process, numbers are medians, every call takes the next experts of the next
layer of a buffer of 768 MiB, codes are random. A layer stores about 2.5 bits per weight in each layout. The last column
divides the ratio of times by that of bytes read: 1 means that the layout costs what it reads.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from cpu import BUFFER, CLOCKS, SHAPES, alternate, table_of
from torch import Tensor

from moeq import native
from moeq.layouts.spectral.shape import SLAB_WIDTHS, Form, basis_bytes, blob_bytes, component_bytes
from moeq.layouts.spectral.stored import SpectralShape, build_spectral_table
from moeq.layouts.tiled.shape import TileForm, grid_shape, side_sections, sides_bytes
from moeq.layouts.tiled.stored import build_tile_table
from moeq.report.tables import markdown_table
from moeq.spec import QuantSpec

EXPERTS = {"OLMoE": 64, "Qwen3-30B-A3B": 128}
NAMES = ("gate", "up", "down")


class Grouped:
    """Residuals of several widths, in turns."""

    def __init__(self, data: Tensor, num_experts: int, hidden: int, inner: int, top_k: int, bits: tuple[int, ...]):
        specs = [QuantSpec(bits=b, levels="half" if b < 3 else "asym") for b in bits]
        self.table, ends = table_of(specs, hidden, inner, num_experts)
        self.size, self.inner, self.top_k = ends[-1], inner, top_k
        self.layers = max(1, data.numel() // self.size)
        self.data, self.experts = data, num_experts
        self.stored, self.read = self.size, self.size * top_k / num_experts
        self.x, self.weight = torch.randn(1, hidden), torch.full((1, top_k), 1 / top_k)

    def chosen(self, window: int) -> tuple[Tensor, Tensor]:
        """The blob of a layer, and experts of it."""
        at = window % self.layers * self.size
        first = window // self.layers * self.top_k
        return self.data[at : at + self.size], (torch.arange(first, first + self.top_k) % self.experts).view(1, -1)

    def __call__(self, window: int) -> None:
        data, index = self.chosen(window)
        native.experts(data, self.table, self.inner, self.x, index, self.weight)


class Tiled(Grouped):
    """Residuals of 2 bits, factors of gate and up in what is left of the bytes."""

    def __init__(self, data: Tensor, num_experts: int, hidden: int, inner: int, top_k: int, stored: int):
        super().__init__(data, num_experts, hidden, inner, top_k, (2,))
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        rows, columns = grid_shape("auto", num_experts, shapes["up"], "up")
        forms = {}
        for rank in range(16, 4096, 16):
            more = {name: TileForm(rank=rank if name != "down" else 0, rows=rows, columns=columns) for name in NAMES}
            if self.size + sides_bytes(more, num_experts, shapes) > stored:
                break
            forms = more
        self.tiles = build_tile_table(forms, num_experts, shapes)
        self.sides = torch.randint(0, 0x3C, (sides_bytes(forms, num_experts, shapes),), dtype=torch.uint8)
        cells = torch.tensor([[e // columns, e % columns] for e in range(num_experts)], dtype=torch.int16)
        for name, offset in zip(NAMES[:2], self.tiles[:2, 0].tolist(), strict=True):
            start, size = side_sections(forms[name], num_experts, shapes[name]).cells
            self.sides[offset + start : offset + start + size] = cells.flatten().view(torch.uint8)
        self.rank = forms["up"].rank
        self.stored = self.size + self.sides.numel()
        used = cells[:top_k].long()
        grid = used[:, 0].unique().numel() * hidden + used[:, 1].unique().numel() * inner
        self.read += 2 * self.rank * grid

    def __call__(self, window: int) -> None:
        data, index = self.chosen(window)
        native.tiled_experts(data, self.table, self.sides, self.tiles, self.inner, self.x, index, self.weight)


class Spectral(Grouped):
    """Components of 0 to 4 bits, bases of 8 bits; gate and up share one if `joint`."""

    def __init__(self, data: Tensor, num_experts: int, hidden: int, inner: int, top_k: int, stored: int, joint: bool):
        super().__init__(data, num_experts, hidden, inner, top_k, (2,))
        shape = SpectralShape(projections=NAMES, num_experts=num_experts, hidden=hidden, inner=inner)
        slabs = {
            bits: QuantSpec(bits=bits, levels="half" if bits < 3 else "asym", layout="spectral") for bits in SLAB_WIDTHS
        }
        form = Form(basis_bits=8, joint=joint, slabs=slabs)
        numbers, widths, size = np.random.default_rng(0), {}, 0
        for kept in np.arange(1.0, 0.3, -0.02):  # fewer components until the bytes are those of the others
            chances = [1 - kept, 0.15 * kept, 0.35 * kept, 0.3 * kept, 0.2 * kept]
            widths = {
                name: numbers.choice(np.arange(5, dtype=np.uint8), (num_experts, hidden), p=chances) for name in NAMES
            }
            size = blob_bytes(form, widths, hidden, inner)
            if size <= stored:
                break
        self.table = build_spectral_table(form, widths, shape)
        self.size = self.stored = size
        self.layers = max(1, data.numel() // size)
        self.starts = torch.zeros(3, len(SLAB_WIDTHS), num_experts + 1, dtype=torch.int64)
        self.order = torch.zeros(3, num_experts, hidden, dtype=torch.int16)
        self.read = 0.0
        for at, name in enumerate(NAMES):
            for slab, bits in enumerate(SLAB_WIDTHS):
                counts = (widths[name] == bits).sum(1)
                self.starts[at, slab, 1:] = torch.from_numpy(counts.cumsum())
                self.read += float(counts.mean()) * top_k * component_bytes(slabs[bits], inner)
            falling = np.argsort(8 - widths[name], axis=1, kind="stable")
            self.order[at] = torch.from_numpy(falling.astype(np.int16))
            if not (joint and name == "up"):
                self.read += basis_bytes(8, int(self.table[at, 0, 4]), hidden)

    def __call__(self, window: int) -> None:
        data, index = self.chosen(window)
        native.spectral_experts(data, self.table, self.starts, self.order, self.inner, self.x, index, self.weight)


def layouts(data: Tensor, windows: int) -> str:
    rows = []
    for name, num_experts in EXPERTS.items():
        hidden, inner, top_k = SHAPES[name]
        sizes = data, num_experts, hidden, inner, top_k
        grouped = Grouped(*sizes, (2, 3))
        layers = {
            "grouped": grouped,
            "spectral": Spectral(*sizes, grouped.stored, joint=False),
            "spectral, joint": Spectral(*sizes, grouped.stored, joint=True),
            "tiled": Tiled(*sizes, grouped.stored),
        }
        jobs: dict[str, Callable[[int], object]] = dict(layers)
        found = alternate(jobs, windows)
        for layout, layer in layers.items():
            times, read = found[layout] / found["grouped"], layer.read / grouped.read
            rows.append(
                (
                    name,
                    layout,
                    f"{8 * layer.stored / (num_experts * 3 * hidden * inner):.2f}",
                    f"{layer.read / 1e6:.1f}",
                    f"{1e3 * found[layout]:.2f}",
                    f"{layer.read / found[layout] / 1e9:.1f}",
                    f"{times:.2f}",
                    f"{read:.2f}",
                    f"{times / read:.2f}",
                )
            )
            print(*rows[-1], file=sys.stderr)
    head = ("shape", "layout", "bits", "MB read", "ms", "GB/s", "time / grouped", "bytes / grouped", "time / bytes")
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--cpu-time", action="store_true", help="processor time / threads: for busy machines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        CLOCKS.append(lambda: time.process_time() / args.threads)
    torch.manual_seed(0)
    data = torch.randint(0, 0x3C, (BUFFER,), dtype=torch.uint8)
    print(f"{args.threads} threads, load average before {os.getloadavg()[0]:.1f}\n\n{layouts(data, args.windows)}")


if __name__ == "__main__":
    main()

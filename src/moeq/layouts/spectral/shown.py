"""What the spectral layout shows of a plan: how many bits the components along a basis got.

A row is one projection of a MoE layer, a cell a run of neighbouring basis directions, strongest first; it shows the
mean width of the components of all experts along them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from moeq.layouts.base import LayerPlan
from moeq.layouts.showing import Shown, mean_bits
from moeq.layouts.spectral.shape import SpectralPlan, kept_directions
from moeq.model_parts import MoeLayer
from moeq.report import svg

BINS = 32
"""Cells of a row; a basis of fewer directions has one cell for each."""
CELL, ROW, GAP = 20, 9, 5
"""Width of a cell, height of a row and space between layers, in pixels."""
LEFT, TOP, RIGHT = 104, 58, 76
FIXED_BYTES, LAYER_BYTES, CELL_BYTES = 6 * 1024, 256, 80
EMPTY = "#d8dee4"
"""Colour of components that were dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumMap:
    """The widths of all components.

    Attributes:
        means: layer -> projection -> mean width in each cell, 0 to 8.
        counts: width -> components of the model that have it, 0 included.
        kept: layer -> projection -> directions of the basis that are stored.
        stored: layer -> mean stored bits of its expert weights, bases, scales, maps and padding included.

    Raises:
        ValueError: parts whose lengths do not match.
    """

    means: tuple[Mapping[str, tuple[float, ...]], ...]
    counts: Mapping[int, int]
    kept: tuple[Mapping[str, int], ...]
    stored: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.means or not len(self.means) == len(self.kept) == len(self.stored):
            raise ValueError("a map needs layers, with directions and one mean of stored bits each")
        if any(not 0 <= mean <= 8 for layer in self.means for row in layer.values() for mean in row):
            raise ValueError("mean widths lie between 0 and 8")


def spectrum_text(spectrum: SpectrumMap) -> str:
    """The map for a terminal: a line per projection, a digit per cell."""
    lines = [f"{'layer':>5}  {'':<4}  {'strongest direction to weakest':<{BINS}}  directions  stored bits"]
    for index, (layer, stored) in enumerate(zip(spectrum.means, spectrum.stored, strict=True)):
        for position, (name, row) in enumerate(layer.items()):
            digits = "".join(str(int(mean + 0.5)) for mean in row)
            label, end = (str(index), f"  {stored:>11.2f}") if not position else ("", "")
            lines.append(f"{label:>5}  {name:<4}  {digits:<{BINS}}  {spectrum.kept[index][name]:>10}{end}".rstrip())
    total = sum(spectrum.counts.values())
    shares = ", ".join(f"{100 * count / total:.1f} % at {width}" for width, count in sorted(spectrum.counts.items()))
    return "\n".join([*lines, f"a digit is the mean bits of the components in it, rounded; components: {shares}"])


def spectrum_svg(spectrum: SpectrumMap, title: str) -> str:
    """The map as an SVG document; the same input gives the same text."""
    cells = max(len(row) for layer in spectrum.means for row in layer.values())
    heights = [ROW * len(layer) + GAP for layer in spectrum.means]
    width, height = LEFT + CELL * cells + RIGHT, TOP + sum(heights)
    body = [*_axes(spectrum, heights, width), *_cells(spectrum, heights), *_legend(spectrum, height + 16)]
    total = sum(spectrum.counts.values())
    words = ", ".join(f"{100 * count / total:.1f} % at {bits} bits" for bits, count in sorted(spectrum.counts.items()))
    return svg.document(width, height + 60, title, f"{len(spectrum.means)} MoE layers; components: {words}.", body)


def spectrum_limit(layers: int, projections: int, title: str) -> int:
    """Bytes that `spectrum_svg` takes at most, whatever the widths are."""
    text = 2 * len(svg.escape(title).encode())
    return FIXED_BYTES + layers * (LAYER_BYTES + projections * (LAYER_BYTES + BINS * CELL_BYTES)) + text


def _colour(mean: float) -> str:
    return svg.WIDTH_COLOURS.get(int(mean + 0.5), EMPTY)


def _cells(spectrum: SpectrumMap, heights: list[int]) -> Iterator[str]:
    top = TOP
    for layer, height in zip(spectrum.means, heights, strict=True):
        for position, row in enumerate(layer.values()):
            y = top + ROW * position
            for cell, mean in enumerate(row):
                x = LEFT + CELL * cell
                yield f'<rect x="{x}" y="{y}" width="{CELL}" height="{ROW - 1}" fill="{_colour(mean)}"/>'
        top += height


def _axes(spectrum: SpectrumMap, heights: list[int], width: int) -> Iterator[str]:
    yield svg.label(LEFT, TOP - 8, "basis directions, strongest first", style="m")
    yield svg.label(width - 12, TOP - 8, "stored bits", anchor="end", style="m")
    top = TOP
    for index, (layer, height, stored) in enumerate(zip(spectrum.means, heights, spectrum.stored, strict=True)):
        yield svg.label(24, top + ROW * len(layer) / 2 + 4, str(index), anchor="end", style="m")
        yield svg.label(width - 12, top + ROW * len(layer) / 2 + 4, f"{stored:.2f}", anchor="end")
        for position, name in enumerate(layer):
            yield svg.label(LEFT - 8, top + ROW * (position + 1) - 1, name, anchor="end", style="m")
        top += height


def _legend(spectrum: SpectrumMap, top: int) -> Iterator[str]:
    total = sum(spectrum.counts.values())
    for index, (bits, count) in enumerate(sorted(spectrum.counts.items())):
        x, y = LEFT + 110 * (index % 6), top + 18 * (index // 6)
        yield f'<rect x="{x}" y="{y}" width="11" height="11" fill="{_colour(bits)}"/>'
        yield svg.label(x + 17, y + 10, f"{bits} bits: {100 * count / total:.1f} %")


def spectrum_map(layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> SpectrumMap:
    """Plans of components as pictures show them."""
    means, kept = [], []
    counts: Counter[int] = Counter()
    for plan in plans:
        assert isinstance(plan, SpectralPlan)
        counts.update(plan.widths_count())
        cells = {n: np.array_split(each_EH.mean(0), min(BINS, each_EH.shape[1])) for n, each_EH in plan.widths.items()}
        means.append({name: tuple(float(cell.mean()) for cell in row) for name, row in cells.items()})
        directions = kept_directions(plan.widths, joint=plan.form.joint)
        kept.append({name: int(each_H.sum()) for name, each_H in directions.items()})
    return SpectrumMap(means=tuple(means), counts=counts, kept=tuple(kept), stored=mean_bits(layers, plans))


class SpectrumShown(Shown):
    """Shows the widths of components."""

    def is_mixed(self, plans: Sequence[LayerPlan]) -> bool:
        """Always: directions differ."""
        return True

    def svg(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan], title: str) -> str:
        """Projections x directions."""
        return spectrum_svg(spectrum_map(layers, plans), title)

    def svg_limit(self, layers: Sequence[MoeLayer], title: str) -> int:
        """As large as its cells make it."""
        return spectrum_limit(len(layers), max(len(layer.projections) for layer in layers), title)

    def widths(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> list[dict[str, list[float]]]:
        """Mean bits of the components of each matrix."""
        found = []
        for plan in plans:
            assert isinstance(plan, SpectralPlan)
            found.append({name: [float(mean) for mean in each_EH.mean(1)] for name, each_EH in plan.widths.items()})
        return found

    def text(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> str:
        """A line for each projection."""
        return spectrum_text(spectrum_map(layers, plans))


SHOWN: Final = SpectrumShown()

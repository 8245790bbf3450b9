"""Which expert got how many bits, as a picture and for terminals. Pure functions; no torch, no files.

A row is a MoE layer, a cell an expert. If the matrices of any expert differ in width, every cell of the model is
split into bands, one under the other, in storage order (gate, up, down).
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moeq.report import svg

LEFT, TOP, RIGHT = 64, 58, 76
"""Margins around the map, in pixels: layer numbers, title and expert numbers, stored bits."""
MAP_WIDTH = 720
CELL_WIDTHS = (2, 22)
"""Narrowest and widest cell; between them the widest layer fills `MAP_WIDTH`."""
BAND_HEIGHTS = {1: (18, 11), 2: (10, 6), 3: (7, 4)}
"""Bands in a cell -> pixels of one band, for models of up to `FEW_LAYERS` layers and for deeper ones."""
FEW_LAYERS = 36
ROW_GAP = 2
GRID_FROM = 5
"""Cells of at least this many pixels are set apart by lines."""
LEGEND_STEP, LEGEND_LINE = 150, 18
FIXED_BYTES, LAYER_BYTES, EXPERT_BYTES = 6 * 1024, 192, 20
"""Bound of what a picture holds beside its runs of cells: in all, per layer, per expert of the widest layer."""
CHUNK = 100
"""Experts in one line of a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationMap:
    """The widths of all expert matrices.

    Attributes:
        bits: layer -> expert -> projection -> code bits, 1 to 8; 0 where a layer lacks that projection.
        projections: their names, in storage order, at most three.
        stored: layer -> mean stored bits of its expert weights, scales, padding and tables included.

    Raises:
        ValueError: a width out of range, or parts whose lengths do not match.
    """

    bits: tuple[tuple[tuple[int, ...], ...], ...]
    projections: tuple[str, ...]
    stored: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.bits or not all(self.bits) or len(self.stored) != len(self.bits):
            raise ValueError("a map needs layers with experts, and one mean per layer")
        if len(self.projections) not in BAND_HEIGHTS:
            raise ValueError(f"{len(self.projections)} projections cannot be drawn")
        for expert in itertools.chain.from_iterable(self.bits):
            if len(expert) != len(self.projections) or not all(0 <= width <= 8 for width in expert) or not any(expert):
                raise ValueError(f"every expert needs {len(self.projections)} widths from 0 to 8, not {expert}")

    @property
    def counts(self) -> dict[int, int]:
        """Code bits -> matrices, in rising order."""
        flat = Counter(width for layer in self.bits for expert in layer for width in expert if width)
        return dict(sorted(flat.items()))

    @property
    def split(self) -> bool:
        """Whether matrices of one expert differ in width anywhere."""
        return any(len({width for width in expert if width}) > 1 for layer in self.bits for expert in layer)

    @property
    def widest(self) -> int:
        """Experts of the layer that has most."""
        return max(map(len, self.bits))


def allocation_svg(allocation: AllocationMap, title: str) -> str:
    """The heat map as an SVG document; the same input gives the same text.

    All cells of one width are one `<path class="w">`: horizontal strokes, one for each run of equal neighbours,
    in units of a cell across and of a pixel down. So the document grows with the number of runs.
    """
    bands = len(allocation.projections) if allocation.split else 1
    band_height = BAND_HEIGHTS[bands][len(allocation.bits) > FEW_LAYERS]
    pitch = bands * band_height + ROW_GAP
    cell = min(max(MAP_WIDTH // allocation.widest, CELL_WIDTHS[0]), CELL_WIDTHS[1])
    map_width, map_height = cell * allocation.widest, pitch * len(allocation.bits)
    width = max(LEFT + map_width + RIGHT, LEFT + 3 * LEGEND_STEP, 32 + 8 * len(title))
    legend, legend_height = _legend(allocation, width, TOP + map_height + 20)
    body = [
        *_axes(allocation, cell, pitch),
        f'<g transform="translate({LEFT} {svg.number(TOP + band_height / 2)}) scale({cell} 1)" fill="none" '
        f'stroke-width="{band_height}" shape-rendering="crispEdges">',
        *_cells(allocation, bands, band_height, pitch),
        "</g>",
        *_grid(allocation.widest, cell, map_height),
        *legend,
    ]
    return svg.document(width, TOP + map_height + 20 + legend_height, title, _describe(allocation), body)


def svg_limit(experts: tuple[int, ...], projections: int, title: str) -> int:
    """Bytes that `allocation_svg` takes at most, whatever the widths are: for budgets, before there is a plan.

    Args:
        experts: layer -> number of experts.
        projections: matrices of an expert.
        title: the title.
    """
    digits = len(str(max(experts)))
    run = len("m 0h") + 2 * digits
    first_run = len("M 000000h") + 2 * digits
    # In each band of each layer, every width present starts once and goes on in runs; at worst a run is one cell.
    starts = sum(min(count, len(svg.WIDTH_COLOURS)) for count in experts)
    cells = projections * (starts * first_run + (sum(experts) - starts) * run)
    text = 2 * len(svg.escape(title).encode())
    return FIXED_BYTES + LAYER_BYTES * len(experts) + EXPERT_BYTES * max(experts) + cells + text


def allocation_text(allocation: AllocationMap, chunk: int = CHUNK) -> str:
    """The map for a terminal: a line per layer, a character per expert, wrapped after `chunk` experts.

    The character is the width; where the matrices of an expert differ, their mean, rounded half up.
    """
    margin = max(len("layer"), len(str(len(allocation.bits) - 1)))
    ruler = "".join(f"{start:<10}" for start in range(0, min(chunk, allocation.widest), 10)).rstrip()
    body = max(len(ruler), min(chunk, allocation.widest))
    lines = [f"{'layer':>{margin}}  {ruler:<{body}}  stored bits"]
    for index, (layer, stored) in enumerate(zip(allocation.bits, allocation.stored, strict=True)):
        marks = "".join(map(_mark, layer))
        pieces = [marks[start : start + chunk] for start in range(0, len(marks), chunk)]
        lines.append(f"{index:>{margin}}  {pieces[0]:<{body}}  {stored:>11.2f}")
        lines += [f"{'':>{margin}}  {piece}" for piece in pieces[1:]]
    meaning = "a digit is an expert's bits per code"
    if allocation.split:
        meaning += f", the rounded mean of {', '.join(allocation.projections)} where they differ"
    counts = ", ".join(f"{count:,} x {_bits(width)}" for width, count in allocation.counts.items())
    return "\n".join([*lines, f"{meaning}; matrices: {counts}"])


def _bits(width: int) -> str:
    return f"{width} bit" if width == 1 else f"{width} bits"


def _mark(expert: tuple[int, ...]) -> str:
    widths = [width for width in expert if width]
    return str((2 * sum(widths) + len(widths)) // (2 * len(widths)))


def _runs(values: list[int]) -> Iterator[tuple[int, int, int]]:
    """(value, start, length) of each run of equal neighbours."""
    start = 0
    for value, run in itertools.groupby(values):
        length = sum(1 for _ in run)
        yield value, start, length
        start += length


def _cells(allocation: AllocationMap, bands: int, band_height: int, pitch: int) -> Iterator[str]:
    """One path for each width; it lies at the middle of its bands, a stroke paints their height."""
    steps: dict[int, list[str]] = {width: [] for width in allocation.counts}
    for row, layer in enumerate(allocation.bits):
        for band in range(bands):
            pens: dict[int, int] = {}
            values = [expert[band] if bands > 1 else max(expert) for expert in layer]
            for width, start, length in _runs(values):
                if not width:
                    continue
                gap = f"m{start - pens[width]} 0" if width in pens else f"M{start} {row * pitch + band * band_height}"
                steps[width].append(f"{gap}h{length}")
                pens[width] = start + length
    for width, count in allocation.counts.items():
        yield (
            f'<path class="w" stroke="{svg.WIDTH_COLOURS[width]}" d="{"".join(steps[width])}">'
            f"<title>{_bits(width)}: {count:,} matrices</title></path>"
        )


def _grid(widest: int, cell: int, height: int) -> Iterator[str]:
    """Lines between experts, in the colour of the surface."""
    if cell < GRID_FROM or widest < 2:
        return
    back = f"m{cell}-{height}v{height}" * (widest - 2)
    strokes = f"M{LEFT + cell} {TOP}v{height}{back}"
    yield f'<path class="c" stroke="{svg.SURFACE}" fill="none" stroke-width=".8" d="{strokes}"/>'


def _axes(allocation: AllocationMap, cell: int, pitch: int) -> Iterator[str]:
    """Names of the axes, numbers of layers and of some experts, and the mean stored bits of each layer."""
    map_width, map_height = cell * allocation.widest, pitch * len(allocation.bits)
    right = LEFT + map_width + RIGHT - 12
    middle = svg.number(TOP + map_height / 2)
    if len(allocation.bits) > 1:
        yield (
            f'<text class="m" fill="{svg.MUTED}" text-anchor="middle" '
            f'transform="translate(20 {middle}) rotate(-90)">{"MoE layer" if map_height >= 56 else "layer"}</text>'
        )
    yield svg.label(LEFT - 8, TOP - 8, "expert", anchor="end", style="m")
    yield svg.label(right, TOP - 8, "stored bits", anchor="end", style="m")
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2**30) if step * cell >= 30)
    for expert in range(0, allocation.widest, step):
        x = LEFT + cell * (expert + 0.5)
        if x < right - 90:
            yield svg.label(x, TOP - 8, str(expert), anchor="middle", style="m")
    for row, stored in enumerate(allocation.stored):
        y = TOP + pitch * row + (pitch - ROW_GAP) / 2 + 4
        yield svg.label(LEFT - 8, y, str(row), anchor="end", style="m")
        yield svg.label(right, y, f"{stored:.2f}", anchor="end")


def _legend(allocation: AllocationMap, width: int, top: int) -> tuple[list[str], int]:
    """Swatches with counts, and what bands mean; with the height they take."""
    counts = allocation.counts
    total = sum(counts.values())
    per_line = max(1, (width - LEFT) // LEGEND_STEP)
    body = []
    for index, (bits, count) in enumerate(counts.items()):
        x, y = LEFT + LEGEND_STEP * (index % per_line), top + LEGEND_LINE * (index // per_line)
        share = f"{100 * count / total:.0f} %"
        body.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{svg.WIDTH_COLOURS[bits]}"/>')
        body.append(svg.label(x + 17, y + 10, f"{_bits(bits)}: {count:,} ({share})"))
    height = LEGEND_LINE * -(-len(counts) // per_line)
    if allocation.split:
        note = f"Matrices by bits per code; bands of a cell from the top: {', '.join(allocation.projections)}."
    else:
        note = "Matrices by bits per code; those of an expert are alike."
    body.append(svg.label(LEFT, top + height + 10, note, style="m"))
    return body, height + 26


def _describe(allocation: AllocationMap) -> str:
    sizes = sorted({len(layer) for layer in allocation.bits})
    experts = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    counts = ", ".join(f"{count:,} matrices at {_bits(width)}" for width, count in allocation.counts.items())
    return f"{len(allocation.bits)} MoE layers of {experts} experts: {counts}."

"""Predicted cost against bytes, as a picture and for terminals. Pure functions; no torch, no files."""

import math
from collections.abc import Iterator, Mapping, Sequence

from moeq.report import svg
from moeq.report.tables import human_bytes, plain_table

Points = Sequence[tuple[int, float]]
"""(bytes, predicted cost), in any order."""

WIDTH, HEIGHT = 720, 420
LEFT, TOP, RIGHT, BOTTOM = 76, 44, 24, 56
LEGEND_LINE = 18
STEPS = (1, 2, 5)
EPSILON = 1e-9
BAR = 40
"""Characters of the longest bar in a terminal."""
MARKERS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-4-4h8v8h-8z",
    "m0-5l5 5-5 5-5-5z",
    "m0-5l5 9h-10z",
    "m0 5l5-9h-10z",
    "m-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",
)
"""A shape for each series beside its colour: circle, square, diamond, triangles, cross."""


def curve_svg(series: Mapping[str, Points], title: str) -> str:
    """Curves of cost (logarithmic axis) over bytes as an SVG document; the same input gives the same text.

    Costs of zero, which a logarithm does not have, lie on the bottom line, and the line says 0.

    Raises:
        ValueError: no points, or a cost that is negative or not finite.
    """
    points = _checked(series)
    xs = [size for curve in points.values() for size, _ in curve]
    low, high = _range([cost for curve in points.values() for _, cost in curve])
    first, last = _widened(min(xs), max(xs))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    scale_x = (right - LEFT) / (last - first)
    scale_y = (bottom - TOP) / (high - low)

    def place(size: float, cost: float) -> tuple[float, float]:
        height = math.log10(cost) - low if cost > 0 else 0.0
        return LEFT + (size - first) * scale_x, bottom - height * scale_y

    zero = any(cost == 0 for curve in points.values() for _, cost in curve)
    body = [*_cost_axis(low, high, zero, bottom, scale_y), *_size_axis(first, last, bottom, scale_x)]
    for index, (name, curve) in enumerate(points.items()):
        body += _curve(index, name, [place(*point) for point in curve], curve)
    per_line = 3
    for index, name in enumerate(points):
        x = LEFT + (right - LEFT) // per_line * (index % per_line)
        y = HEIGHT + LEGEND_LINE * (index // per_line)
        body.append(f'<path fill="{_colour(index)}" d="M{x + 5} {y - 4}{MARKERS[index % len(MARKERS)]}"/>')
        body.append(svg.label(x + 16, y, name))
    height = HEIGHT + LEGEND_LINE * -(-len(points) // per_line)
    described = "; ".join(
        f"{name}: from {curve[0][1]:.3g} at {human_bytes(curve[0][0])} to {curve[-1][1]:.3g} at "
        f"{human_bytes(curve[-1][0])}"
        for name, curve in points.items()
    )
    return svg.document(WIDTH, height, title, f"Predicted cost over bytes. {described}.", body)


def curve_text(series: Mapping[str, Points]) -> str:
    """The curves for a terminal: a line per point, with a bar on a logarithmic scale.

    The bar of the highest cost is full and a cost of zero has none; steps of equal length are equal factors.

    Raises:
        ValueError: no points, or a cost that is negative or not finite.
    """
    points = _checked(series)
    logs = [math.log10(cost) for curve in points.values() for _, cost in curve if cost > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    rows = []
    for name, curve in points.items():
        for size, cost in curve:
            share = 0.0 if cost == 0 else 1.0 if high == low else (math.log10(cost) - low) / (high - low)
            bar = "" if cost == 0 else "#" * max(1, round(BAR * share))
            rows.append((name, f"{size:,}", human_bytes(size), f"{cost:.4g}", bar))
    return plain_table(("series", "bytes", "size", "cost", "cost, logarithmic"), rows)


def _checked(series: Mapping[str, Points]) -> dict[str, list[tuple[int, float]]]:
    """The series that have points, each by rising size."""
    points = {name: sorted(curve) for name, curve in series.items() if curve}
    if not points:
        raise ValueError("there is no point to draw")
    for name, curve in points.items():
        for size, cost in curve:
            if not math.isfinite(cost) or cost < 0:
                raise ValueError(f"series {name!r} has cost {cost} at {size} bytes")
    return points


def _range(costs: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the round numbers below and above all costs; a decade more below when there are zeros."""
    logs = [math.log10(cost) for cost in costs if cost > 0] or [0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    marks = [decade + math.log10(step) for decade in range(low, high + 1) for step in STEPS]
    first = max(mark for mark in marks if mark <= min(logs) + EPSILON)
    last = min(mark for mark in marks if mark >= max(logs) - EPSILON and mark > first + EPSILON)
    return first - any(cost == 0 for cost in costs), last


def _widened(first: int, last: int) -> tuple[float, float]:
    """The range of sizes with some air on both sides; never empty."""
    air = 0.04 * (last - first) or max(0.04 * last, 1.0)
    return max(0.0, first - air), last + air


def _cost_axis(low: float, high: float, zero: bool, bottom: int, scale: float) -> Iterator[str]:
    """Rules at powers of ten, at 2 and 5 as well when there are few; numbers at the left."""
    steps = STEPS if high - low - zero <= 2 else (1,)
    stride = max(1, math.ceil((high - low) / 8))
    marks = [(step * 10.0**decade) for decade in range(math.floor(low), math.ceil(high) + 1, stride) for step in steps]
    shown = [mark for mark in marks if low + zero - EPSILON <= math.log10(mark) <= high + EPSILON]
    lines = [(f"{mark:.6g}", math.log10(mark) - low) for mark in shown]
    for text, height in [("0", 0.0), *lines] if zero else lines:
        y = bottom - height * scale
        yield f'<path class="r" stroke="{svg.RULE}" d="M{LEFT} {svg.number(y)}H{WIDTH - RIGHT}"/>'
        yield svg.label(LEFT - 8, y + 4, text, anchor="end", style="m")
    yield f'<path class="r" stroke="{svg.RULE}" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
    middle = svg.number((TOP + bottom) / 2)
    yield (
        f'<text class="m" fill="{svg.MUTED}" text-anchor="middle" '
        f'transform="translate(16 {middle}) rotate(-90)">predicted cost</text>'
    )


def _size_axis(first: float, last: float, bottom: int, scale: float) -> Iterator[str]:
    """Round sizes under the axis."""
    rough = (last - first) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    for index in range(math.ceil(first / step), math.floor(last / step) + 1):
        x = svg.number(LEFT + (index * step - first) * scale)
        yield f'<path class="r" stroke="{svg.RULE}" d="M{x} {bottom}v5"/>'
        yield svg.label(float(x), bottom + 18, human_bytes(round(index * step)), anchor="middle", style="m")
    yield svg.label((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "stored bytes", anchor="middle", style="m")


def _curve(index: int, name: str, places: Sequence[tuple[float, float]], curve: Points) -> Iterator[str]:
    line = "L".join(f"{svg.number(x)} {svg.number(y)}" for x, y in places)
    yield f'<path stroke="{_colour(index)}" stroke-width="2" fill="none" stroke-linejoin="round" d="M{line}"/>'
    for (x, y), (size, cost) in zip(places, curve, strict=True):
        yield (
            f'<path class="p" fill="{_colour(index)}" d="M{svg.number(x)} {svg.number(y)}'
            f'{MARKERS[index % len(MARKERS)]}"><title>{svg.escape(name)}: {cost:.4g} at {human_bytes(size)}'
            "</title></path>"
        )


def _colour(index: int) -> str:
    return svg.SERIES_COLOURS[index % len(svg.SERIES_COLOURS)]

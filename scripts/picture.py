"""Draws docs/picture.svg: what moeq does to the bundled model, from a plan that it made.

    python scripts/picture.py

Costs are measured on the bundled text; the picture is the same on every run.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import moeq
from moeq.artifacts import Plan
from moeq.report import svg
from moeq.report.tables import human_bytes
from moeq.stages import allocate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "demo-qwen3moe-4m"
TEXT = ROOT / "assets" / "text" / "calibration.txt"
OUT = ROOT / "docs" / "picture.svg"
BITS = 2.5
FULL = "#57606a"
"""Colour of 16 bits."""
CELL, BAND, TOP, LEFT, GAP = 17, 7, 70, 16, 150
"""Width of an expert, height of a matrix, first row, first column, room for the arrow; pixels."""


def cells(left: int, plan: Plan | None, layers: int, experts: int, projections: int) -> Iterator[str]:
    """A grid: layers x experts, a band for each matrix."""
    for layer in range(layers):
        for expert in range(experts):
            for band in range(projections):
                bits = None if plan is None else plan.specs[plan.experts[layer][expert][band]].bits
                colour = FULL if bits is None else svg.WIDTH_COLOURS[bits]
                x, y = left + CELL * expert, TOP + layer * (BAND * projections + 5) + BAND * band
                yield f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{BAND}" fill="{colour}"/>'


def main() -> int:
    """Make the plan and draw it."""
    common = {"method": "gemq", "unit": "matrix", "router": "none", "device": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        costs = Path(scratch) / "costs.json"
        moeq.measure(MODEL, calibration=str(TEXT), nsamples=64, seqlen=256, **common).save(costs)
        decision = allocate.run(MODEL, moeq.Recipe(**common, bits=BITS, costs=str(costs)))
    plan, inventory = decision.plan, decision.inventory
    layers, experts, projections = len(inventory.layers), inventory.layers[0].num_experts, 3
    width = CELL * experts
    right = LEFT + width + GAP
    body = [*cells(LEFT, None, layers, experts, projections), *cells(right, plan, layers, experts, projections)]
    source = inventory.expert_parameters * 2
    height = TOP + layers * (BAND * projections + 5)
    body.append(svg.label(LEFT, TOP - 12, f"before: 16 bits each, {human_bytes(source)}"))
    mean = 8 * plan.expert_bytes / inventory.expert_parameters
    body.append(svg.label(right, TOP - 12, f"after: {mean:.2f} bits on average, {human_bytes(plan.expert_bytes)}"))
    middle, y = LEFT + width + GAP // 2, (TOP + height) // 2
    body.append(svg.label(middle, y - 12, f"moeq --bits {BITS:g}", anchor="middle"))
    tip = right - 16
    body.append(
        f'<path d="M{LEFT + width + 14} {y}H{tip - 6}M{tip - 14} {y - 6}L{tip - 6} {y}L{tip - 14} {y + 6}" class="r" '
        f'fill="none" stroke="{svg.MUTED}" stroke-width="2"/>'
    )
    used = sorted({plan.specs[index].bits for layer in plan.experts for expert in layer for index in expert})
    for index, bits in enumerate(used):
        x = right + 70 * index
        body.append(f'<rect x="{x}" y="{height + 12}" width="11" height="11" fill="{svg.WIDTH_COLOURS[bits]}"/>')
        body.append(svg.label(x + 17, height + 22, f"{bits} bit{'s' if bits > 1 else ''}"))
    body.append(
        svg.label(LEFT, height + 22, f"rows: {layers} layers; cells: {experts} experts of gate, up, down", style="m")
    )
    title = "moeq gives every expert matrix the bits that it deserves"
    sizes = f"from {source} to {plan.expert_bytes} bytes"
    words = f"The bundled model: {layers} layers of {experts} experts before and after, {sizes}."
    OUT.write_text(svg.document(right + width + 16, height + 36, title, words, body), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

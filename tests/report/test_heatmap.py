"""The picture is read back: its paths decode to the allocation they were drawn from."""

import itertools
import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq.report import svg
from moeq.report.heatmap import FEW_LAYERS, ROW_GAP, AllocationMap, allocation_svg, allocation_text, svg_limit

NAMES = ("gate", "up", "down")
SVG = "{http://www.w3.org/2000/svg}"


def make(bits: object, projections: tuple[str, ...] = NAMES) -> AllocationMap:
    layers = tuple(tuple(tuple(expert) for expert in layer) for layer in bits)  # type: ignore[attr-defined]
    return AllocationMap(bits=layers, projections=projections, stored=tuple(2.25 + i for i in range(len(layers))))


def noise(layers: int, experts: int, widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> AllocationMap:
    dice = random.Random(0)
    return make([[dice.choices(widths, k=3) for _ in range(experts)] for _ in range(layers)])


@st.composite
def maps(draw: st.DrawFn) -> AllocationMap:
    """Layers of different sizes, one to three projections, missing projections, alike and mixed experts."""
    names = draw(st.sampled_from((NAMES, ("up", "down"), ("down",))))
    width = st.sampled_from(draw(st.sampled_from(((3,), (2, 3), (1, 2, 3, 4, 5, 6, 7, 8)))))
    if draw(st.booleans()):
        expert = width.map(lambda bits: (bits,) * len(names))
    else:
        lacks = draw(st.booleans()) and len(names) == 3
        parts = [st.just(0) if lacks and index == 0 else width for index in range(len(names))]
        expert = st.tuples(*parts)
    layers = draw(st.lists(st.lists(expert, min_size=1, max_size=40), min_size=1, max_size=6))
    return make(layers, names)


def decode(text: str) -> dict[tuple[int, float], int]:
    """(x in cells, y in pixels) -> width, for every cell that a path paints; painting twice is an error."""
    cells: dict[tuple[int, float], int] = {}
    colours = {colour: width for width, colour in svg.WIDTH_COLOURS.items()}
    for path in ET.fromstring(text).iter(f"{SVG}path"):
        if path.get("class") != "w":
            continue
        x = y = 0
        data = path.get("d", "")
        tokens = re.findall(r"([Mmh])(-?\d+)(?: (-?\d+))?", data)
        assert "".join(f"{letter}{a}" + (f" {b}" if b else "") for letter, a, b in tokens) == data
        for letter, first, second in tokens:
            if letter == "M":
                x, y = int(first), int(second)
            elif letter == "m":
                x, y = x + int(first), y + int(second)
            else:
                for step in range(int(first)):
                    assert (x + step, y) not in cells
                    cells[x + step, y] = colours[path.get("stroke", "")]
                x += int(first)
    return cells


def bands_of(text: str) -> int:
    """Pixels of a band."""
    return next(int(group.get("stroke-width", "")) for group in ET.fromstring(text).iter(f"{SVG}g"))


def texts(text: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(text).iter(f"{SVG}text")]


@settings(max_examples=100)
@given(maps())
def test_the_paths_are_the_allocation(allocation: AllocationMap) -> None:
    text = allocation_svg(allocation, "t")
    band = bands_of(text)
    bands = len(allocation.projections) if allocation.split else 1
    wanted = {}
    for row, layer in enumerate(allocation.bits):
        for x, expert in enumerate(layer):
            for index in range(bands):
                width = expert[index] if bands > 1 else max(expert)
                if width:
                    wanted[x, row * (bands * band + ROW_GAP) + index * band] = width
    assert decode(text) == wanted
    assert len(text.encode()) <= svg_limit(tuple(map(len, allocation.bits)), len(allocation.projections), "t")


def test_counts_are_told_in_legend_paths_and_description() -> None:
    allocation = make([[(2, 2, 4)] * 5, [(3, 3, 3)] * 2 + [(2, 2, 2)]])
    text = allocation_svg(allocation, "t")
    assert allocation.counts == {2: 13, 3: 6, 4: 5}
    assert Counter(decode(text).values()) == allocation.counts
    assert [label for label in texts(text) if " bits: " in label] == [
        "2 bits: 13 (54 %)", "3 bits: 6 (25 %)", "4 bits: 5 (21 %)",
    ]  # fmt: skip
    root = ET.fromstring(text)
    assert [path.findtext(f"{SVG}title") for path in root.iter(f"{SVG}path") if path.get("class") == "w"] == [
        "2 bits: 13 matrices", "3 bits: 6 matrices", "4 bits: 5 matrices",
    ]  # fmt: skip
    assert "2 MoE layers of 3 to 5 experts: 13 matrices at 2 bits" in str(root.findtext(f"{SVG}desc"))
    assert "bands of a cell from the top: gate, up, down." in " ".join(texts(text))


def test_layers_experts_and_stored_bits_are_labelled() -> None:
    labels = texts(allocation_svg(make([[(2,) * 3] * 16, [(3,) * 3] * 16]), "t"))
    assert {"MoE layer", "layer"} & set(labels)
    for label in ("expert", "stored bits", "0", "1", "14", "2.25", "3.25"):
        assert label in labels
    assert "those of an expert are alike." in " ".join(labels)


def test_screen_readers_are_told() -> None:
    root = ET.fromstring(allocation_svg(make([[(2,) * 3]]), "A & B"))
    assert root.get("role") == "img"
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert [key for key in str(root.get("aria-labelledby")).split() if key not in named] == []
    assert named["t"] == "A & B"
    assert "1 MoE layers of 1 experts" in str(named["d"])


def test_everything_lies_inside_the_picture() -> None:
    for allocation in (noise(1, 1), noise(2, 300), noise(FEW_LAYERS + 1, 8), noise(3, 400), make([[(4,) * 3]])):
        root = ET.fromstring(allocation_svg(allocation, "a title of some length, as models have"))
        _, _, width, height = map(float, str(root.get("viewBox")).split())
        for element in root.iter(f"{SVG}text"):
            if element.get("x") is not None:
                x, length = float(str(element.get("x"))), 6.2 * len(element.text or "")
                left = {"end": x - length, "middle": x - length / 2}.get(str(element.get("text-anchor")), x)
                assert left >= 0
                assert left + length <= width
                assert 0 < float(str(element.get("y"))) < height
        scale = next(str(group.get("transform")) for group in root.iter(f"{SVG}g"))
        left, cell = (float(part) for part in re.findall(r"translate\((\d+) .*scale\((\d+) 1\)", scale)[0])
        assert left + cell * allocation.widest < width


@pytest.mark.parametrize(("layers", "experts"), [(94, 128), (48, 128), (61, 256), (4, 16), (1, 1), (200, 2)])
def test_the_largest_models_stay_small(layers: int, experts: int) -> None:
    text = allocation_svg(noise(layers, experts), "Qwen3MoeForCausalLM: bits of the routed experts")
    assert len(decode(text)) == 3 * layers * experts
    assert len(text) < 300_000
    assert len(text) <= svg_limit((experts,) * layers, 3, "Qwen3MoeForCausalLM: bits of the routed experts")
    assert len(allocation_svg(make([[(3,) * 3] * experts] * layers), "t")) < 6_000 + 250 * layers + 10 * experts


def test_the_limit_holds_for_long_titles_and_large_numbers() -> None:
    title = "é&<>\"'" * 40
    allocation = replace(noise(40, 500), stored=(12345.67,) * 40)
    assert len(allocation_svg(allocation, title).encode()) <= svg_limit((500,) * 40, 3, title)


def test_same_input_same_text() -> None:
    allocation = noise(5, 20)
    assert allocation_svg(allocation, "t") == allocation_svg(replace(allocation), "t")


@pytest.mark.parametrize("title", ["</title><script>", 'a" onload="x', "a\x00\x1b\ud800b\ufffe", "日本 &amp;", "a\nb"])
def test_titles_cannot_break_out(title: str) -> None:
    text = allocation_svg(make([[(2,) * 3]]), title)
    root = ET.fromstring(text.encode())
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "rect", "text", "g", "path",
    }  # fmt: skip
    assert not any(key.startswith("on") for element in root.iter() for key in element.attrib)


@pytest.mark.parametrize(
    ("bits", "projections"),
    [
        ([], NAMES),
        ([[]], NAMES),
        ([[(2, 2)]], NAMES),
        ([[(2, 2, 9)]], NAMES),
        ([[(0, 0, 0)]], NAMES),
        ([[(2, 2, -1)]], NAMES),
        ([[(2, 2, 2, 2)]], (*NAMES, "more")),
    ],
)
def test_what_cannot_be_drawn_is_refused(bits: object, projections: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"widths|layers|projections"):
        make(bits, projections)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_widths_differ_in_lightness_alone() -> None:
    """What survives every colour blindness: each width is clearly darker than the one below it."""
    colours = [svg.WIDTH_COLOURS[width] for width in range(1, 9)]
    for light, dark in itertools.pairwise(colours):
        assert luminance(light) > luminance(dark)
        assert contrast(light, dark) > 1.25
    for colour in colours:
        assert contrast(colour, "#ffffff") > 1.2
        assert contrast(colour, "#0d1117") > 1.2


def test_text_is_readable_in_both_modes() -> None:
    """Ink and muted ink on their surfaces, and series on both."""
    dark = dict(re.findall(r"\.(\w)\{(?:fill|stroke):(#\w+)\}", svg.DARK))
    for ink, surface in (
        (svg.INK, svg.SURFACE),
        (svg.MUTED, svg.SURFACE),
        (dark["i"], dark["s"]),
        (dark["m"], dark["s"]),
    ):
        assert contrast(ink, surface) >= 4.5
    for colour in svg.SERIES_COLOURS:
        assert contrast(colour, svg.SURFACE) >= 3
        assert contrast(colour, dark["s"]) >= 3


def test_text_has_a_digit_per_expert() -> None:
    lines = allocation_text(make([[(2,) * 3, (3,) * 3, (2, 3, 3)], [(8, 8, 7)]])).splitlines()
    assert lines == [
        "layer  0    stored bits",
        "    0  233         2.25",
        "    1  8           3.25",
        "a digit is an expert's bits per code, the rounded mean of gate, up, down where they differ; "
        "matrices: 4 x 2 bits, 5 x 3 bits, 1 x 7 bits, 2 x 8 bits",
    ]


def test_means_are_rounded_half_up() -> None:
    lines = allocation_text(make([[(2, 3), (3, 4), (1, 2), (1, 1)]], ("up", "down"))).splitlines()
    assert lines[1].split()[1] == "3421"
    assert "1 bit," in lines[-1]


@pytest.mark.parametrize("experts", [99, 100, 101, 256])
def test_long_layers_wrap(experts: int) -> None:
    allocation = noise(3, experts)
    lines = allocation_text(allocation).splitlines()
    per_layer = -(-experts // 100)
    assert len(lines) == 2 + 3 * per_layer
    assert max(map(len, lines[:-1])) <= 120
    body = lines[1:-1]
    for layer in range(3):
        mine = body[layer * per_layer : (layer + 1) * per_layer]
        digits = "".join(line[7:107].split(" ")[0] for line in mine)
        assert len(digits) == experts
        assert digits == "".join(str(int(sum(expert) / 3 + 0.5)) for expert in allocation.bits[layer])
        assert mine[0].split()[0] == str(layer)

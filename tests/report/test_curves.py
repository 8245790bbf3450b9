"""Points are where their numbers say: on a logarithmic axis equal factors are equal distances."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq.report.curves import BAR, BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve_svg, curve_text

SVG = "{http://www.w3.org/2000/svg}"
SERIES = {"uniform": [(3_000_000, 0.5), (1_000_000, 8.0), (2_000_000, 2.0)], "gemq": [(2_000_000, 1.0)]}

POINTS = st.lists(st.tuples(st.integers(1, 10**12), st.just(0.0) | st.floats(1e-12, 1e12)), min_size=1, max_size=12)


def places(text: str) -> list[tuple[float, float]]:
    """Centres of all markers on the curves."""
    paths = [path for path in ET.fromstring(text).iter(f"{SVG}path") if path.get("class") == "p"]
    starts = [re.match(r"M(-?[\d.]+) (-?[\d.]+)m", str(path.get("d"))) for path in paths]
    return [(float(start[1]), float(start[2])) for start in starts if start]


def test_points_lie_where_their_numbers_say() -> None:
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = places(curve_svg(SERIES, "t"))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert x4 == x2
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2), "8 to 2 is the same factor as 2 to 0.5"
    assert y4 - y2 == pytest.approx((y3 - y2) / 2, abs=0.2)
    assert y1 < y2 < y3, "less cost lies lower"


def test_axes_are_labelled() -> None:
    labels = [element.text for element in ET.fromstring(curve_svg(SERIES, "Cost & bytes")).iter(f"{SVG}text")]
    for label in ("Cost & bytes", "predicted cost", "stored bytes", "uniform", "gemq", "2.00 MB", "1", "0.5", "5"):
        assert label in labels


@given(st.dictionaries(st.text(max_size=8), POINTS, min_size=1, max_size=8))
def test_any_points_stay_inside(series: dict[str, list[tuple[int, float]]]) -> None:
    text = curve_svg(series, "t")
    assert text == curve_svg({name: sorted(curve, reverse=True) for name, curve in series.items()}, "t")
    found = places(text)
    assert len(found) == sum(map(len, series.values()))
    for x, y in found:
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
    labels = [element for element in ET.fromstring(text).iter(f"{SVG}text") if element.get("x") == str(LEFT - 8)]
    assert 1 <= len(labels) <= 12
    heights = sorted(float(str(label.get("y"))) for label in labels)
    assert all(below - above > 9 for above, below in itertools.pairwise(heights)), "labels do not overlap"


def test_zero_lies_on_the_bottom_line() -> None:
    text = curve_svg({"a": [(10, 0.0), (20, 3.0)]}, "t")
    assert places(text)[0][1] == HEIGHT - BOTTOM
    assert places(text)[1][1] < HEIGHT - BOTTOM - 50
    zero = [e for e in ET.fromstring(text).iter(f"{SVG}text") if e.text == "0"]
    assert [e.get("y") for e in zero] == [str(HEIGHT - BOTTOM + 4)]


def test_every_series_has_its_own_marker() -> None:
    text = curve_svg({str(index): [(index + 1, 1.0)] for index in range(6)}, "t")
    paths = [path for path in ET.fromstring(text).iter(f"{SVG}path") if path.get("class") == "p"]
    assert len({(path.get("fill")) for path in paths}) == 6
    assert len({str(path.get("d")).split("m", 1)[1] for path in paths}) == 6


def test_text_is_a_table_with_bars() -> None:
    lines = curve_text({**SERIES, "free": [(9, 0.0)]}).splitlines()
    assert lines[0].split() == ["series", "bytes", "size", "cost", "cost,", "logarithmic"]
    cells = [line.split() for line in lines[1:]]
    assert [cell[1] for cell in cells] == ["1,000,000", "2,000,000", "3,000,000", "2,000,000", "9"]
    bars = [line.count("#") for line in lines[1:]]
    assert bars == [BAR, BAR // 2, 1, BAR // 4, 0]


@pytest.mark.parametrize("draw", [lambda series: curve_svg(series, "t"), curve_text])
@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, -1.0)]}, {"a": [(1, float("nan"))]}])
def test_what_cannot_be_drawn_is_refused(draw, series) -> None:
    with pytest.raises(ValueError, match=r"no point|cost"):
        draw(series)

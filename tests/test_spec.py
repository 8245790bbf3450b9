import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq.errors import OptionError
from moeq.spec import (
    ALIGN,
    BITS,
    GROUP_SIZES,
    LEVELS,
    PLANES,
    SCALAR_LEVELS,
    SCALE_BYTES,
    WHOLE_ROW,
    ZERO_BYTES,
    QuantSpec,
    Unit,
    num_groups,
    sections,
    stored_bytes,
    table_bytes,
)

SPECS = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    levels=st.sampled_from(SCALAR_LEVELS),
)
SHAPES = st.tuples(st.integers(1, 400), st.integers(1, 1000))


@given(SPECS, SHAPES)
def test_sections_lie_aligned_in_order_and_fill_the_record(spec: QuantSpec, shape: tuple[int, int]) -> None:
    found = sections(spec, shape)
    assert [width for width, _, _ in found.planes] == list(PLANES[spec.bits])
    end = 0
    for offset, size in [*((offset, size) for _, offset, size in found.planes), found.scales, found.zeros]:
        assert offset == end
        assert offset % ALIGN == 0
        end = -(-(offset + size) // ALIGN) * ALIGN
    assert found.total == end == stored_bytes(spec, shape)


@given(SPECS, SHAPES)
def test_stored_bytes_by_an_independent_count(spec: QuantSpec, shape: tuple[int, int]) -> None:
    rows, columns = shape
    codes = math.ceil(columns / 8) * 8 * rows * spec.bits / 8  # a row is padded to 8 codes
    groups = rows * (1 if spec.group_size == WHOLE_ROW else math.ceil(columns / spec.group_size))
    least = codes + groups * (SCALE_BYTES + ZERO_BYTES[spec.levels])
    parts = len(PLANES[spec.bits]) + 2
    assert least <= stored_bytes(spec, shape) < least + parts * ALIGN


@given(SPECS, SHAPES)
def test_more_bits_never_take_less_space_but_for_padding(spec: QuantSpec, shape: tuple[int, int]) -> None:
    for bits in BITS[BITS.index(spec.bits) + 1 :]:
        wider = QuantSpec(bits=bits, group_size=spec.group_size, levels=spec.levels)
        padding = ALIGN * max(0, len(PLANES[spec.bits]) - len(PLANES[bits]))  # of a matrix of a few bytes
        assert stored_bytes(spec, shape) <= stored_bytes(wider, shape) + padding


@pytest.mark.parametrize(
    ("bits", "levels", "group_size", "wanted"),
    [
        (4, "asym", 128, 128 * 64 + 256 + 128),
        (4, "asym16", 128, 128 * 64 + 256 + 256),
        (3, "sym", 128, 128 * 48 + 256),
        (2, "half", 32, 128 * 32 + 4 * 256),
        (8, "sym", WHOLE_ROW, 128 * 128 + 256),
    ],
)
def test_a_square_matrix(bits: int, levels: str, group_size: int, wanted: int) -> None:
    assert stored_bytes(QuantSpec(bits=bits, levels=levels, group_size=group_size), (128, 128)) == wanted


def test_planes_add_up_to_the_width() -> None:
    assert set(PLANES) == set(BITS)
    for bits, planes in PLANES.items():
        assert sum(planes) == bits
        assert list(planes) == sorted(planes, reverse=True)
        assert all(8 % width == 0 for width in planes)


def test_groups() -> None:
    assert [num_groups(columns, 32) for columns in (1, 32, 33, 64)] == [1, 1, 2, 2]
    assert num_groups(1000, WHOLE_ROW) == 1


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 0}, "bits"),
        ({"group_size": 16}, "group-size"),
        ({"group_size": 0}, "group-size"),
        ({"levels": "golden"}, "levels"),
        ({"layout": "spiral"}, "layout"),
    ],
)
def test_illegal_specs_name_the_option_and_the_choices(changes: dict[str, object], option: str) -> None:
    with pytest.raises(OptionError, match="choose one of") as caught:
        QuantSpec(**{"bits": 4, **changes})
    assert caught.value.option == option


def test_specs_and_units_are_values() -> None:
    assert QuantSpec(bits=4) == QuantSpec(bits=4, group_size=128, levels="asym", layout="grouped")
    assert len({QuantSpec(bits=4), QuantSpec(bits=4), QuantSpec(bits=3)}) == 2
    assert QuantSpec(**QuantSpec(bits=3, levels="half").to_dict()) == QuantSpec(bits=3, levels="half")
    assert str(Unit(layer=1, expert=20, projection="down")) == "1.20.down"
    assert sorted([Unit(layer=1, expert=0, projection="up"), Unit(layer=0, expert=9, projection="up")])[0].layer == 0


def test_ids_on_disk_never_change() -> None:
    assert LEVELS == ("asym", "asym16", "sym", "half", "vector", "trellis", "ggml")
    assert table_bytes(16, 3) == 16 * 3 * 4 * 8

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq.errors import PackedError
from moeq.layouts.grouped.stored import build_table, parse_table, record, validate_table
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec, stored_bytes, table_bytes

SHAPES = ((30, 40), (30, 40), (50, 24))
SPECS = (
    (QuantSpec(bits=2), QuantSpec(bits=3, group_size=32), QuantSpec(bits=8, group_size=-1, levels="sym")),
    (QuantSpec(bits=1, levels="half"), QuantSpec(bits=4, levels="asym16"), QuantSpec(bits=5)),
)
SIZE = sum(stored_bytes(spec, shape) for expert in SPECS for spec, shape in zip(expert, SHAPES, strict=True))

specs = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    levels=st.sampled_from(SCALAR_LEVELS),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 300))
layers = st.integers(1, 3).flatmap(
    lambda num: st.tuples(
        st.lists(st.tuples(*[specs] * num), min_size=1, max_size=4), st.lists(shapes, min_size=num, max_size=num)
    )
)


@settings(deadline=None)
@given(layers)
def test_round_trip(layer):
    experts, sizes = layer
    total = sum(stored_bytes(spec, shape) for expert in experts for spec, shape in zip(expert, sizes, strict=True))
    table = build_table(experts, sizes)
    assert table.dtype == torch.int64
    assert table.nbytes == table_bytes(len(experts), len(sizes))
    entries = parse_table(table, sizes, total)
    assert tuple(tuple(spec for _, spec in expert) for expert in entries) == tuple(experts)
    assert all(offset % 64 == 0 for expert in entries for offset, _ in expert)


def test_records_are_views_back_to_back():
    data = torch.arange(SIZE, dtype=torch.int64).to(torch.uint8)
    entries = parse_table(build_table(SPECS, SHAPES), SHAPES, SIZE)
    parts = [
        record(data, offset, spec, shape)
        for expert in entries
        for (offset, spec), shape in zip(expert, SHAPES, strict=True)
    ]
    assert torch.equal(torch.cat(parts), data)
    assert parts[2].data_ptr() == data.data_ptr() + entries[0][2][0]


@pytest.mark.parametrize("offset", [-64, 64, 2**62])
def test_a_record_outside_the_blob(offset):
    size = stored_bytes(SPECS[0][0], SHAPES[0])
    with pytest.raises(PackedError, match="outside"):
        record(torch.zeros(size, dtype=torch.uint8), offset, SPECS[0][0], SHAPES[0])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ((0, 0, 0), 64, "matrix 0 of expert 0 is said to start at byte 64, it must start at 0"),
        ((1, 2, 0), 0, "matrix 2 of expert 1"),
        ((1, 2, 0), -64, "start at byte -64"),
        ((0, 0, 1), 7, "expert 0 has an illegal spec.*bits"),
        ((0, 0, 1), 4, "matrix 1 of expert 0 is said to start"),
        ((1, 2, 1), 8, "records take"),
        ((0, 1, 2), 0, "illegal spec.*group-size"),
        ((0, 1, 2), 2**62, "illegal spec.*group-size"),
        ((1, 0, 3), 7, "expert 1 has an illegal spec.*level set 7"),
        ((1, 0, 3), 4, "expert 1 has an illegal spec.*codebooks"),
        ((1, 0, 3), -1, "level set -1"),
    ],
)
def test_a_table_that_lies(at, value, message):
    table = build_table(SPECS, SHAPES)
    table[at] = value
    with pytest.raises(PackedError, match=message) as caught:
        parse_table(table, SHAPES, SIZE, tensor="x.moeq_table")
    assert caught.value.tensor == "x.moeq_table"
    assert caught.value.fix


@pytest.mark.parametrize("num_bytes", [0, SIZE - 64, SIZE + 1])
def test_data_of_another_size(num_bytes):
    with pytest.raises(PackedError, match=f"the data has {num_bytes}"):
        parse_table(build_table(SPECS, SHAPES), SHAPES, num_bytes)


@pytest.mark.parametrize(
    "table",
    [
        build_table(SPECS, SHAPES).int(),
        build_table(SPECS, SHAPES)[0],
        build_table(SPECS, SHAPES)[:, :2],
        build_table(SPECS, SHAPES)[:, :, :3],
    ],
)
def test_a_table_of_another_shape(table):
    with pytest.raises(PackedError, match=r"not int64 \[experts, 3, 4\]"):
        parse_table(table, SHAPES, SIZE)


def test_no_experts():
    with pytest.raises(PackedError, match="no experts"):
        parse_table(build_table(SPECS, SHAPES)[:0], SHAPES, 0)
    with pytest.raises(PackedError, match="no experts"):
        build_table((), SHAPES)


@pytest.mark.parametrize("experts", [(SPECS[0], SPECS[1][:2]), ((*SPECS[0], SPECS[0][0]),)])
def test_the_writer_is_held_to_the_same_rules(experts):
    entries = tuple(tuple((0, spec) for spec in expert) for expert in experts[-1:])
    with pytest.raises(PackedError, match="matrices, not 3"):
        validate_table(entries, SHAPES, SIZE)
    with pytest.raises(PackedError, match="matrices, not 3"):
        build_table(experts, SHAPES)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq.checkpoint.write import ShardWriter
from moeq.format.records import (
    decode_matrix,
    dequantize,
    pack_matrix,
    pack_plane,
    real_zeros,
    unpack_codes,
    unpack_plane,
    unpack_scales,
)
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec, num_groups, plane_row_bytes, sections, stored_bytes

specs = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    levels=st.sampled_from(SCALAR_LEVELS),
)
matrices = st.tuples(st.integers(1, 5), st.one_of(st.integers(1, 40), st.integers(100, 300)))


def random_matrix(spec, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = shape[0], num_groups(shape[1], spec.group_size)
    codes = torch.randint(0, 2**spec.bits, shape, generator=generator).byte()
    scale = torch.randn(grid, generator=generator).half()
    zero = {
        "asym": torch.randint(0, 256, grid, generator=generator).byte(),
        "asym16": (torch.randn(grid, generator=generator) * 3).half(),
    }.get(spec.levels)
    return codes, scale, zero


@settings(deadline=None, max_examples=150)
@given(specs, matrices, st.integers(0, 2**32))
def test_pack_and_unpack_are_inverse(spec, shape, seed):
    codes, scale, zero = random_matrix(spec, shape, seed)
    record = pack_matrix(codes, scale, zero, spec)
    assert record.dtype == torch.uint8
    assert record.shape == (stored_bytes(spec, shape),)
    assert torch.equal(unpack_codes(record, spec, shape), codes)
    got_scale, got_zero = unpack_scales(record, spec, shape)
    assert torch.equal(got_scale, scale)
    assert got_zero is zero is None or torch.equal(got_zero, zero)


@settings(deadline=None, max_examples=100)
@given(specs, matrices, st.integers(0, 2**32))
def test_weights_are_scale_times_code_minus_zero(spec, shape, seed):
    codes, scale, zero = random_matrix(spec, shape, seed)
    w = decode_matrix(pack_matrix(codes, scale, zero, spec), spec, shape)
    assert w.shape == shape
    assert w.dtype == torch.float32
    for row in (0, shape[0] - 1):
        for column in {0, shape[1] // 2, shape[1] - 1}:
            group = 0 if spec.group_size == -1 else column // spec.group_size
            middle = {
                "asym": lambda at: float(zero[at]) * (2**spec.bits - 1) / 255,
                "asym16": lambda at: float(zero[at]),
                "sym": lambda at: 2 ** (spec.bits - 1),
                "half": lambda at: (2**spec.bits - 1) / 2,
            }[spec.levels]((row, group))
            wanted = float(scale[row, group]) * (int(codes[row, column]) - middle)
            assert float(w[row, column]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 127, 128, 129, 256, 300])
def test_planes(width, columns):
    codes = torch.randint(0, 2**width, (3, columns)).byte()
    packed = pack_plane(codes, width)
    assert packed.shape == (3, plane_row_bytes(columns, width))
    assert packed.is_contiguous()
    assert torch.equal(unpack_plane(packed, width, columns), codes)


def test_byte_j_holds_every_sixteenth_code_of_a_block():
    """One block of 1-bit codes is 16 bytes; field s of byte j is code 16 s + j."""
    for code in (0, 15, 16, 17, 127):
        codes = torch.zeros(1, 128, dtype=torch.uint8)
        codes[0, code] = 1
        packed = pack_plane(codes, 1)[0]
        assert packed.nonzero().tolist() == [[code % 16]]
        assert int(packed[code % 16]) == 1 << (code // 16)


def test_three_bits_are_a_plane_of_two_and_one_of_one():
    spec = QuantSpec(bits=3, levels="sym")
    codes = torch.full((1, 128), 0b110, dtype=torch.uint8)
    record = pack_matrix(codes, torch.ones(1, 1).half(), None, spec)
    (two, start2, size2), (one, start1, size1) = sections(spec, (1, 128)).planes
    assert (two, size2, one, size1) == (2, 32, 1, 16)
    assert set(record[start2 : start2 + size2].tolist()) == {0b11111111}
    assert set(record[start1 : start1 + size1].tolist()) == {0}


@given(specs, matrices)
def test_sections_are_aligned_disjoint_and_complete(spec, shape):
    where = sections(spec, shape)
    parts = [(offset, size) for _, offset, size in where.planes] + [where.scales, where.zeros]
    end = 0
    for offset, size in parts:
        assert offset % 64 == 0
        assert end <= offset < end + 64
        end = offset + size
    assert end <= where.total < end + 64
    assert where.total % 64 == 0


@given(specs, matrices)
def test_padding_is_zero(spec, shape):
    codes, scale, zero = random_matrix(spec, shape)
    record = pack_matrix(codes, scale, zero, spec)
    where = sections(spec, shape)
    for offset, size in [(offset, size) for _, offset, size in where.planes] + [where.scales, where.zeros]:
        record[offset : offset + size] = 0
    assert not record.any()


def test_codes_cost_their_bits_and_nothing_more():
    shape = (64, 1024)
    for bits in BITS:
        spec = QuantSpec(bits=bits, levels="asym")
        assert stored_bytes(spec, shape) == math.prod(shape) * bits // 8 + 64 * 8 * (2 + 1)


def test_stored_bytes_are_the_bytes_on_disk(tmp_path):
    shape = (5, 200)
    for bits in BITS:
        for levels in SCALAR_LEVELS:
            spec = QuantSpec(bits=bits, group_size=64, levels=levels)
            size = stored_bytes(spec, shape)
            with ShardWriter(tmp_path / "x", [("w.moeq_data", "U8", (size,))]) as writer:
                header = (tmp_path / ".x.partial").stat().st_size
                writer.write("w.moeq_data", pack_matrix(*random_matrix(spec, shape), spec))
            assert (tmp_path / "x").stat().st_size - header == size


def test_dtypes_of_decoded_weights_round_once():
    spec = QuantSpec(bits=4, levels="asym16")
    codes, scale, zero = random_matrix(spec, (4, 256))
    exact = dequantize(codes, scale, zero, spec)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(codes, scale, zero, spec, dtype), exact.to(dtype))


def test_zero_points():
    assert real_zeros(None, QuantSpec(bits=3, levels="sym")) == 4.0
    assert real_zeros(None, QuantSpec(bits=3, levels="half")) == 3.5
    stored = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert real_zeros(stored, QuantSpec(bits=3, levels="asym")).tolist() == [[0.0, 7.0]]

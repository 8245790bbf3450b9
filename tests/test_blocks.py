"""Blocks of ggml against the package gguf, and as records of a matrix."""

import gguf
import pytest
import torch
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st

from moeq import blocks
from moeq.blocks import Blocks
from moeq.errors import OptionError
from moeq.format.records import decode_matrix, dequantize, pack_matrix
from moeq.spec import BLOCK_TYPES, BlockType, QuantSpec, block_type, stored_bytes


def any_blocks(kind: BlockType, rows: int, count: int, seed: int) -> Blocks:
    """Any codes and factors, with units that are numbers."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (rows, count * kind.size), generator=generator, dtype=torch.uint8)
    parts = blocks.unpack(stored, kind)
    return parts._replace(unit_NB=(torch.rand(parts.unit_NB.shape, generator=generator) - 0.5).half())


@given(kind=st.sampled_from(BLOCK_TYPES), rows=st.integers(1, 5), count=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_bytes_are_those_of_ggml(kind: BlockType, rows: int, count: int, seed: int) -> None:
    parts = any_blocks(kind, rows, count, seed)
    stored = blocks.pack(parts, kind)
    assert stored.shape == (rows, count * kind.size)
    back = blocks.unpack(stored, kind)
    for name in Blocks._fields:
        first, second = getattr(parts, name), getattr(back, name)
        assert (first is None and second is None) or torch.equal(first, second), name
    wanted = torch.from_numpy(quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType(kind.number)).copy())
    assert torch.equal(blocks.dequantize(parts, kind), wanted)


def test_the_table_of_types_is_that_of_ggml() -> None:
    for kind in BLOCK_TYPES:
        assert gguf.GGMLQuantizationType(kind.number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.number)] == (kind.weights, kind.size)
    assert [kind.bits for kind in BLOCK_TYPES] == sorted(kind.bits for kind in BLOCK_TYPES)


@pytest.mark.parametrize("columns", [256, 384])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_records(bits: int, columns: int) -> None:
    spec = QuantSpec(bits=bits, group_size=-1, levels="ggml")
    kind = block_type(bits, columns)
    parts = any_blocks(kind, 3, columns // kind.weights, bits)
    record = pack_matrix(*parts, spec)
    assert record.numel() == stored_bytes(spec, (3, columns)) >= 3 * columns // kind.weights * kind.size
    wanted = dequantize(*parts, spec)
    assert torch.equal(decode_matrix(record, spec, (3, columns)), wanted)
    assert torch.equal(decode_matrix(record, spec, (3, columns), rows=(1, 2)), wanted[1:2])
    assert decode_matrix(record, spec, (3, columns), torch.bfloat16).dtype == torch.bfloat16


def test_the_narrowest_type_that_fits() -> None:
    assert [block_type(bits, 512).name for bits in (1, 2, 3, 4, 5, 6, 8)] == [
        "Q2_K", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
    ]  # fmt: skip
    assert [block_type(bits, 1408).name for bits in (2, 4, 5, 6, 8)] == ["IQ4_NL", "IQ4_NL", "Q5_0", "Q8_0", "Q8_0"]
    with pytest.raises(OptionError, match="no whole blocks of 32"):
        block_type(4, 40)


def test_blocks_have_groups_of_their_own() -> None:
    with pytest.raises(OptionError, match="groups of their own"):
        QuantSpec(bits=4, group_size=32, levels="ggml")

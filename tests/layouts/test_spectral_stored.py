"""Spectral layers: sizes, round trips, and tables that contradict themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeq.errors import ArtifactError, PackedError
from moeq.layouts.spectral.shape import (
    WIDTHS,
    Form,
    blob_bytes,
    component_bytes,
    map_bytes,
    padding_limit,
    parse_widths,
    slab_rows,
    widths_text,
)
from moeq.layouts.spectral.stored import (
    SpectralShape,
    build_spectral_table,
    decode_basis,
    decode_map,
    pack_basis,
    pack_map,
    packed_order,
    parse_spectral_table,
)
from moeq.spec import BITS, QuantSpec

SHAPE = SpectralShape(projections=("gate", "up", "down"), num_experts=3, hidden=37, inner=72)
SLABS = {bits: QuantSpec(bits=bits, group_size=32, levels="half", layout="spectral") for bits in BITS}


def random_widths(seed: int, shape: tuple[int, int] = (3, 37)) -> np.ndarray:
    generator = np.random.default_rng(seed)
    widths = generator.choice(np.array(WIDTHS, dtype=np.uint8), shape)
    widths[:, generator.random(shape[1]) < 0.3] = 0
    return widths


def layer(seed: int) -> dict[str, np.ndarray]:
    return {name: random_widths(3 * seed + i) for i, name in enumerate(SHAPE.projections)}


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 50))
def test_widths_survive_plans_and_maps(seed: int, experts: int, directions: int) -> None:
    widths = random_widths(seed, (experts, directions))
    text = widths_text(widths)
    assert len(text) == 4 * math.ceil(math.ceil(3 * widths.size / 8) / 3)
    assert np.array_equal(parse_widths(text, widths.shape), widths)
    record = pack_map(widths)
    assert record.numel() == map_bytes(experts, directions)
    assert np.array_equal(decode_map(record, experts, directions), widths)


def test_texts_of_another_length_are_refused() -> None:
    with pytest.raises(ArtifactError, match="another length"):
        parse_widths(widths_text(random_widths(0)), (3, 40))
    with pytest.raises(ArtifactError, match="another length"):
        parse_widths("no base64!", (3, 37))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("basis_bits", [8, 16])
@pytest.mark.parametrize("seed", range(5))
def test_tables_say_what_sizes_say(seed: int, basis_bits: int, joint: bool) -> None:
    form = Form(basis_bits=basis_bits, joint=joint, slabs=SLABS)
    widths = layer(seed)
    size = blob_bytes(form, widths, SHAPE.hidden, SHAPE.inner)
    table = build_spectral_table(form, widths, SHAPE)
    entries = parse_spectral_table(table, SHAPE, size)
    for entry in entries:
        rows = {slab.spec.bits: slab.rows for slab in entry.slabs}
        assert rows == {width: count for width, count in slab_rows(widths[entry.projection]).items() if count}
    content = sum(
        component_bytes(SLABS[width], SHAPE.inner) * count
        for each in widths.values()
        for width, count in slab_rows(each).items()
    )
    assert content < size
    bases = sum(entry.rank for entry in entries if not (joint and entry.projection == "up"))
    assert size - content - bases * (37 * basis_bits // 8 + 2) <= padding_limit(form, 3, 3) + 3 * 3 * 37
    for row, column in ((0, 0), (1, 0), (3, 4), (0, 1), (2, 3)):
        broken = table.clone()
        broken[1, row, column] += 64
        with pytest.raises(PackedError):
            parse_spectral_table(broken, SHAPE, size)
    with pytest.raises(PackedError):
        parse_spectral_table(table, SHAPE, size + 64)
    with pytest.raises(PackedError):
        parse_spectral_table(table[:2], SHAPE, size)


def test_bases_of_16_bits_survive() -> None:
    rows = torch.randn(5, 37).half()
    assert torch.equal(decode_basis(pack_basis(rows, None, 16), 16, (5, 37)), rows.float())
    assert decode_basis(pack_basis(rows[:0], None, 16), 16, (0, 37)).shape == (0, 37)


def test_components_lie_by_falling_width_then_direction() -> None:
    assert packed_order(np.array([2, 0, 8, 2, 1, 8], dtype=np.uint8)).tolist() == [2, 5, 0, 3, 4]

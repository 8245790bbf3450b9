"""Sizes of the tiled layout follow from shapes (TileQ notes, section 7 and T4)."""

import pytest

from moeq.errors import OptionError
from moeq.layouts.tiled.shape import (
    FACTOR,
    TileForm,
    grid_shape,
    mixed_block,
    parse_grid,
    side_sections,
    sides_bytes,
    tile_form,
    tile_options,
)

MODELS = [
    (60, 2048, 1408, (8, 8), 0.041, 0.307, 0.147),
    (8, 4096, 14336, (4, 2), 0.028, 0.080, 0.052),
    (128, 2048, 768, (8, 16), 0.041, 0.458, 0.197),
    (64, 2048, 1408, (8, 8), 0.038, 0.307, 0.147),
]


@pytest.mark.parametrize(("experts", "hidden", "inner", "paper", "tile", "private", "shared"), MODELS)
def test_the_papers_extra_bits(
    experts: int, hidden: int, inner: int, paper: tuple[int, int], tile: float, private: float, shared: float
) -> None:
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    weights = 3 * experts * hidden * inner
    for (rows, columns), expected in (
        (paper, tile),
        ((experts, experts), private),
        ((1, experts), shared),
    ):
        forms = {name: TileForm(rank=32, rows=rows, columns=columns) for name in shapes}
        # Factors alone: what is stored has scales, cells and padding besides.
        codes = sum(32 * (form.rows * shapes[name][1] + form.columns * shapes[name][0]) for name, form in forms.items())
        assert 8 * codes / weights == pytest.approx(expected, abs=1e-3)
        stored = 8 * sides_bytes(forms, experts, shapes) / weights
        assert 8 * codes / weights < stored < 8 * codes / weights * 1.005 + 1e-3


def test_every_part_is_itemized_and_aligned() -> None:
    form = TileForm(rank=3, rows=2, columns=4, scales="expert", orders="tile", block=8, plain=8)
    where = side_sections(form, 7, (10, 40))
    assert where.cells == (0, 28)
    assert where.inputs == (64, 256 + 64)  # 6 rows of 40 codes are 240 bytes, 6 scales are 12; both padded
    assert where.orders[1] == 2 * 40 * 2
    assert where.scales[1] == 7 * 40 * 2
    assert all(start % 64 == 0 for start, _ in (where.cells, where.inputs, where.outputs, where.scales, where.orders))
    assert where.total % 64 == 0
    assert FACTOR.bits == 8


def test_the_grid_of_fewest_bytes() -> None:
    assert grid_shape("auto", 16, (256, 256), "gate") == (4, 4)
    for experts, shape in ((128, (768, 2048)), (60, (2048, 1408)), (8, (4096, 14336)), (7, (5, 9))):
        rows, columns = grid_shape("auto", experts, shape, "up")
        best = min(m * shape[1] + -(-experts // m) * shape[0] for m in range(1, experts + 1))
        assert rows * columns >= experts
        assert rows * shape[1] + columns * shape[0] == best
    # Transposed for down: Mixtral's 2x4 takes fewer bytes than 4x2.
    assert grid_shape("auto", 8, (4096, 14336), "down") == (2, 4)
    assert grid_shape("hidden", 8, (4, 6), "gate") == (1, 8)
    assert grid_shape("hidden", 8, (6, 4), "down") == (8, 1)
    assert grid_shape("paper", 60, (4, 6), "gate") == (8, 8)
    assert grid_shape("paper", 8, (4, 6), "gate") == (4, 2)
    assert grid_shape("2x5", 8, (4, 6), "gate") == (2, 5)
    for grid in ("2x3", "9x1"):
        with pytest.raises(OptionError, match="do not fit"):
            grid_shape(grid, 8, (4, 6), "gate")
    assert parse_grid("0x3") is parse_grid("axb") is parse_grid("12") is None


@pytest.mark.parametrize(
    ("inputs", "most", "block"), [(256, 256, 128), (768, 256, 256), (1408, 256, 128), (45, 256, 1)]
)
def test_blocks_divide_the_inputs(inputs: int, most: int, block: int) -> None:
    assert mixed_block(inputs, most) == block


@pytest.mark.parametrize(
    "options",
    [
        {"grid": "wide"},
        {"grid": 3},
        {"down": 1},
        {"alpha": -1},
        {"alpha": True},
        {"rotation": "always"},
        {"block": 12},
        {"swaps": -1},
        {"placement": "best"},
        {"factors": "qr"},
        {"scales": "expert"},  # goes with refits=0
        {"scales": "tile"},
        {"refits": 1.5},
        {"frequency": "yes"},
        {"rank": 3},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="tile-options"):
        tile_options(options)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": -1},
        {"rank": 1 << 20},
        {"rows": 0},
        {"rows": 17},
        {"columns": 3},
        {"scales": "tile"},
        {"scales": "expert", "rank": 0},
        {"orders": "none"},
        {"block": 3},
        {"block": 0},
        {"plain": 65},
        {"plain": 60},
    ],
)
def test_forms_that_contradict_themselves_have_a_problem(changes: dict[str, object]) -> None:
    good = {"rank": 4, "rows": 4, "columns": 4, "orders": "tile", "block": 8, "plain": 8}
    assert TileForm(**good).problem(16, (32, 64)) is None  # type: ignore[arg-type]
    assert TileForm(**{**good, **changes}).problem(16, (32, 64)) is not None  # type: ignore[arg-type]


def test_down_can_be_left_alone() -> None:
    options = tile_options({"down": False})
    assert tile_form(options, 8, "down", 16, (64, 64)).rank == 0
    assert tile_form(options, 8, "up", 16, (64, 64)).rank == 8

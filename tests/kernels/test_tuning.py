"""Tiles of the Triton kernels."""

from pathlib import Path

import pytest

from moeq.errors import ArtifactError
from moeq.kernels import tuning

SHAPE = (768, 2048)
GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def fresh_table() -> None:
    tuning._table.cache_clear()


@pytest.mark.parametrize("kind", tuning.KINDS)
@pytest.mark.parametrize("rows", [1, 3, 16, 100, 4096, 32768])
def test_tiles_depend_on_powers_of_two_only(kind: str, rows: int) -> None:
    up = tuning.power_of_two(rows)
    assert up // 2 < rows <= up
    for num_experts in (1, 8, 128):
        tile = tuning.packed_tile(GPU, kind, SHAPE, rows, num_experts)
        assert tile == tuning.packed_tile(GPU, kind, SHAPE, up, num_experts)
        assert kind != "gated" or tile.splits == 1  # silu does not split


def test_rows_of_layers_split_in_few_ways() -> None:
    """Every number of splits is compiled, and largest groups differ from layer to layer."""
    tiles = [tuning.combined_tile(768, 8, 128, group_rows) for group_rows in range(2049)]
    assert {tile.splits for tile in tiles} <= {1, 2, 4, 8, 16}
    assert tiles[0].splits == 1 < tiles[2048].splits


def test_one_token_fills_the_gpu() -> None:
    tile = tuning.rule("plain", (4096, 14336), 2, 8)
    assert 2 * 4096 // tile.outputs * tile.splits >= tuning.PROGRAMS


def test_the_fastest_tile_is_kept_and_read_again(tmp_path: Path) -> None:
    call = "plain", SHAPE, 64, 8
    wanted = tuning.candidates(*call)[7]
    assert wanted != tuning.rule(*call)
    best = tuning.tune(GPU, *call, lambda: 1.0 if tuning.packed_tile(GPU, *call) == wanted else 2.0)
    assert best == wanted == tuning.packed_tile(GPU, "plain", SHAPE, 33, 8)
    tuning.save(tmp_path / "tiles.json", {tuning.key(GPU, *call): best})
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    tuning._table.cache_clear()
    assert tuning.packed_tile(GPU, *call) != wanted
    tuning.use(tmp_path / "tiles.json")
    assert tuning.packed_tile(GPU, *call) == wanted
    assert tuning.packed_tile("another GPU", *call) == tuning.rule(*call)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"rows": 17}}', '{"a": {}}'])
def test_a_damaged_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a table of tiles"):
        tuning.use(tmp_path / "tiles.json")


def test_an_impossible_tile_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot be a tile"):
        tuning.Tile(rows=24, outputs=32, splits=1, warps=4, stages=3)

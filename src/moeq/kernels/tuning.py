"""How the Triton kernels cut their products into tiles: a rule, a shipped table of measured exceptions, and yours.

`benchmarks/gpu.py --tune FILE` times the candidates on a GPU and writes a table; `use` reads one. A tile is chosen by
GPU, kind of product, shape and rows, rounded up to a power of two, so that no number of tokens costs a search.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Final

from moeq.checkpoint.write import write_file_atomic
from moeq.errors import ArtifactError
from moeq.spec import BLOCK

KINDS: Final = ("gated", "plain", "linear")
"""Gate and up with their activation; one projection of the experts; a linear outside the experts."""
PROGRAMS: Final = 264
"""Programs that keep a large GPU busy: two for each of an H100's 132 processors."""
DECODE_FROM: Final = 512
"""Rows per expert from which experts are decoded once instead of in every tile."""
DECODED_BYTES: Final = 128
"""Of a row of x or of decoded weights that one step multiplies: 64 numbers of 16 bits; more of 32 would not fit."""
SCRATCH_BYTES: Final = 1 << 29
"""Memory for decoded experts."""
SHIPPED: Final = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one product is cut into programs.

    Attributes:
        rows: rows of x in a tile, a power of two, at least 16.
        outputs: rows of W in a tile, a power of two, at least 16.
        splits: programs that share the inputs of one tile; 1 for "gated".
        warps, stages: as Triton counts them.
    """

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        powers = all(side >= 16 and side == power_of_two(side) for side in (self.rows, self.outputs))
        if not powers or self.splits < 1 or self.warps not in (1, 2, 4, 8, 16) or not 1 <= self.stages <= 8:
            raise ArtifactError(f"{self} cannot be a tile", fix="measure again: benchmarks/gpu.py --tune FILE")


def packed_tile(gpu: str, kind: str, shape: tuple[int, int], rows: int, num_experts: int) -> Tile:
    """The tile of a product with packed weights: the table's, else the rule's.

    Args:
        gpu: its name; what was measured on one model is not used on another.
        kind: one of `KINDS`.
        shape: (N, K).
        rows: rows of the result.
        num_experts: E.
    """
    found = _table().get(key(gpu, kind, shape, rows, num_experts))
    return found or rule(kind, shape, rows, num_experts)


def rule(kind: str, shape: tuple[int, int], rows: int, num_experts: int) -> Tile:
    """A tile without measurement: as many rows as an expert gets, and enough programs; arguments as `packed_tile`."""
    bucket = power_of_two(rows)
    side = rows_in_tile(rows, num_experts)
    tiles = min(bucket, num_experts) * -(-bucket // (num_experts * side))
    most = 1 if kind == "gated" else max(1, min(8, shape[1] // 512))
    sizes = (128, 64) if side == 64 else (64, 32, 16)
    outputs = next((size for size in sizes if tiles * shape[0] * most >= size * PROGRAMS), sizes[-1])
    programs = tiles * -(-shape[0] // outputs)
    splits = min(most, power_of_two(-(-PROGRAMS // programs)))
    # 16 rows of W for each warp: with more warps than that, two of them unpack the same codes.
    return Tile(rows=side, outputs=outputs, splits=splits, warps=outputs // 16, stages=4 if side == 16 else 3)


def rows_in_tile(rows: int, num_groups: int) -> int:
    """Rows of x in a tile of a product with rows of groups: as many as a group gets, from 16 to 64."""
    return max(16, min(64, power_of_two(-(-power_of_two(rows) // num_groups))))


def combined_tile(columns: int, rows: int, num_groups: int, group_rows: int) -> Tile:
    """The tile of a sum of packed rows, by rule alone: `outputs` are the rows that are added in one step.

    Args:
        columns: numbers in a row.
        rows: rows of the result.
        num_groups: groups that rows belong to.
        group_rows: rows of the largest group.
    """
    side, step = rows_in_tile(rows, num_groups), 32
    bucket = power_of_two(rows)
    programs = min(bucket, num_groups) * -(-bucket // (num_groups * side)) * -(-columns // BLOCK)
    # A power of two: largest groups differ from layer to layer, and every number of splits is compiled.
    most = 1 << max(1, group_rows // (2 * step)).bit_length() - 1
    splits = min(16, power_of_two(-(-PROGRAMS // programs)), most)
    return Tile(rows=side, outputs=step, splits=splits, warps=4, stages=3)


def candidates(kind: str, shape: tuple[int, int], rows: int, num_experts: int) -> tuple[Tile, ...]:
    """What is worth timing, the rule's first; arguments as `packed_tile`."""
    first = rule(kind, shape, rows, num_experts)
    sides = (16,) if first.rows == 16 else (first.rows, 128)
    others = (
        Tile(rows=side, outputs=outputs, splits=splits, warps=warps, stages=stages)
        for side in sides
        for outputs in (16, 32, 64, 128)
        for splits in ((1,) if kind == "gated" else (1, 2, 4, 8))
        for warps in {outputs // 16, max(1, outputs // 32)}
        for stages in (3, 5)
        if side * outputs <= 128 * 128
    )
    return tuple(dict.fromkeys((first, *others)))


def tune(
    gpu: str, kind: str, shape: tuple[int, int], rows: int, num_experts: int, seconds: Callable[[], float]
) -> Tile:
    """Time the candidates, keep the fastest for this process and return it.

    Args:
        gpu, kind, shape, rows, num_experts: as `packed_tile`.
        seconds: the time of a call that looks the tile up; infinity for a tile that does not fit the GPU.
    """
    name = key(gpu, kind, shape, rows, num_experts)
    times = {}
    for tile in candidates(kind, shape, rows, num_experts):
        _table()[name] = tile
        times[tile] = seconds()
    best = min(times, key=lambda tile: times[tile])
    _table()[name] = best
    return best


def key(gpu: str, kind: str, shape: tuple[int, int], rows: int, num_experts: int) -> str:
    """The name of a tile in a table."""
    return f"{gpu}: {kind} {shape[0]}x{shape[1]} {num_experts} experts {power_of_two(rows)} rows"


def use(path: str | Path) -> None:
    """Add a table for this process; of its tiles, those of other GPUs are never looked up.

    Raises:
        ArtifactError: it is not a table of tiles.
    """
    _table().update(_read(Path(path)))


def save(path: str | Path, tiles: Mapping[str, Tile]) -> None:
    """Write a table for `use`; whatever happens, the file is never half a table."""
    text = json.dumps({name: asdict(tile) for name, tile in sorted(tiles.items())}, indent=1)
    write_file_atomic(Path(path), text.encode() + b"\n")


def decoded_tile(*, gated: bool) -> Tile:
    """The tile of a product with weights that were decoded first, in steps of `DECODED_BYTES` of a row."""
    return Tile(rows=128, outputs=64 if gated else 128, splits=1, warps=8, stages=3)


def experts_at_once(expert_bytes: int) -> int:
    """How many experts to decode at a time.

    Args:
        expert_bytes: of what is decoded of one expert.
    """
    return max(1, SCRATCH_BYTES // max(1, expert_bytes))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


@cache
def _table() -> dict[str, Tile]:
    return _read(SHIPPED)


def _read(path: Path) -> dict[str, Tile]:
    try:
        return {name: Tile(**tile) for name, tile in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"not a table of tiles: {error}", file=path, fix="measure again: benchmarks/gpu.py --tune FILE"
        ) from error

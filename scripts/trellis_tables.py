"""Trains the tables of the level set "trellis" and writes them as constants.

    python scripts/trellis_tables.py [--check]        src/moeq/trellis/tables.py, csrc/trellis_tables.h
    python scripts/trellis_tables.py --taps 2 6 200   the best taps of 200 for 2 bits and a memory of 6 rows

The lowest bit of a code and those of the codes above it make parities, which choose a subset of the levels; the upper
bits of the code choose a level of the subset (docs/format.md, "Trellis"). That is Ungerboeck's construction of a
trellis code by a convolutional code, as Marcellin and Fischer use it for sources (1990), with two or three times as
many more levels as theirs. The last parity has the newest and the oldest bit and no other has either, so that what
leaves a state, or meets in one, are subsets half a table apart.

A table starts as levels of equal shares of a Gaussian and is trained on Gaussian numbers: the best path by Viterbi's
search, then every level the mean of what came to it. Of several starts the best is kept. Levels are stored as integers
of the size that products of 8-bit numbers without overflow allow.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

from moeq.spec import TRELLISES

ROOT = Path(__file__).parent.parent
PYTHON, HEADER = ROOT / "src" / "moeq" / "trellis" / "tables.py", ROOT / "csrc" / "trellis_tables.h"
TAPS = {1: (10, 4, 6, 41), 2: (36, 10, 81), 3: (4, 18, 35), 4: (18, 37)}
"""Code width -> for each parity, what it is of: bit k for the lowest bit of the code k rows above."""
LARGEST = {1: 31, 2: 31, 3: 63, 4: 127}
"""Code width -> the largest integer."""
ROUNDS = 30
RUN = 512
COLUMNS = 512
HELD_OUT = 2048
"""Rows of a column, and columns to train and to measure on."""


def indices(bits: int, history: int, taps: tuple[int, ...]) -> Tensor:
    """Index of the level, (states, 2^bits)."""
    window = torch.arange(1 << history)[:, None] << 1 | torch.arange(1 << bits) & 1
    index = torch.arange(1 << bits) >> 1 << len(taps) | torch.zeros_like(window)
    for at, tap in enumerate(taps):
        index |= sum((window & tap) >> k & 1 for k in range(history + 1)) % 2 << at
    return index


def paths(x_RC: Tensor, levels: Tensor, index: Tensor) -> tuple[Tensor, float]:
    """Indices on the path of least squared error down each column, (R, C), and the mean squared error."""
    states, codes = index.shape
    branch = torch.arange(states * codes)
    leads_to = (branch // codes << 1 | branch & 1) % states
    order = torch.argsort(leads_to, stable=True).view(states, -1)
    flat, comes_from = index.flatten(), order // codes
    cost = torch.full((x_RC.shape[1], states), float("inf"))
    cost[:, 0] = 0
    back = []
    for x_C in x_RC:
        off = (x_C[:, None] - levels).square()
        cost, chosen = (cost[:, comes_from] + off[:, flat[order]]).min(2)
        back.append(chosen)
    best_C, state_C = cost.min(1)
    found = []
    for chosen in reversed(back):
        branch_C = order[state_C, chosen.gather(1, state_C[:, None])[:, 0]]
        found.append(flat[branch_C])
        state_C = branch_C // codes
    return torch.stack(found[::-1]), float(best_C.sum() / x_RC.numel())


def gaussian(columns: int, seed: int) -> Tensor:
    """(RUN, C)."""
    return torch.randn(RUN, columns, generator=torch.Generator().manual_seed(seed))


def train(index: Tensor, levels: Tensor, x_RC: Tensor, rounds: int) -> tuple[Tensor, float]:
    """Levels, and their error before the last round."""
    error = float("inf")
    for _ in range(rounds):
        at_RC, error = paths(x_RC, levels, index)
        count = torch.bincount(at_RC.flatten(), minlength=len(levels))
        total = torch.zeros_like(levels).index_add(0, at_RC.flatten(), x_RC.flatten())
        levels = torch.where(count > 0, total / count.clamp(min=1), levels)
    return levels, error


def start(index: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Middles of equal shares."""
    count = int(index.max()) + 1
    levels = torch.erfinv(2 * (torch.arange(count) + 0.5) / count - 1) * 2**0.5
    return levels + noise * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def best(bits: int) -> tuple[list[int], float, float]:
    """The best table of several starts: integers, how many of them make a standard deviation, and its error."""
    index = indices(bits, TRELLISES[bits], TAPS[bits])
    found = []
    for seed, noise in enumerate((0.0, 0.02, 0.05)):
        levels, _ = train(index, start(index, noise, seed), gaussian(COLUMNS, seed), ROUNDS)
        unit = LARGEST[bits] / float(levels.abs().max())
        stored = (levels * unit).round()
        found.append((stored, unit, paths(gaussian(HELD_OUT, 10_000), stored / unit, index)[1]))
    table, unit, error = min(found, key=lambda each: each[2])
    print(f"{bits} bits, {len(index)} states: {error:.4f}", file=sys.stderr, flush=True)
    return [int(value) for value in table], unit, error


def search(bits: int, history: int, tries: int) -> None:
    """Print the best of some random taps of few bits: every one of them is an operation when weights are read."""
    chosen = random.Random(0)
    middle = list(range(2, 1 << history, 2))
    pairs = [tap for tap in middle if tap.bit_count() <= 2]
    found = {}
    x_RC = gaussian(50, 1)
    for _ in range(tries):
        ends = 1 | 1 << history | chosen.choice([0, *(tap for tap in middle if tap.bit_count() == 1)])
        taps = (*chosen.sample(pairs, len(TAPS[bits]) - 1), ends)
        index = indices(bits, history, taps)
        found[taps] = train(index, start(index), x_RC, 5)[1]
    for taps in sorted(found, key=lambda each: found[each])[:5]:
        index = indices(bits, history, taps)
        print(taps, f"{train(index, start(index), gaussian(COLUMNS, 2), ROUNDS)[1]:.5f}", flush=True)


def python_file(tables: dict[int, tuple[list[int], float, float]]) -> str:
    """src/moeq/trellis/tables.py."""
    lines = [
        '"""Tables of the level set "trellis", made by scripts/trellis_tables.py."""',
        "",
        "from typing import Final",
        "",
        "# fmt: off",
        "TABLES: Final[dict[int, tuple[int, ...]]] = {",
    ]
    for bits, (table, _, _) in tables.items():
        rows = [f"        {', '.join(map(str, table[at : at + 16]))}," for at in range(0, len(table), 16)]
        lines += [f"    {bits}: (", *rows, "    ),"]
    lines += ["}", "# fmt: on", '"""Code width -> entries."""', ""]
    lines += [f"TAPS: Final[dict[int, tuple[int, ...]]] = {TAPS}"]
    lines += ['"""Code width -> parities, from the lowest bit of an index on: bit k for the code k rows above."""', ""]
    units = ", ".join(f"{bits}: {unit:.2f}" for bits, (_, unit, _) in tables.items())
    lines += [f"UNITS: Final = {{{units}}}", '"""Code width -> what a standard deviation is in entries."""', ""]
    errors = ", ".join(f"{bits}: {error:.4f}" for bits, (_, _, error) in tables.items())
    lines += [f"ERRORS: Final = {{{errors}}}"]
    lines += ['"""Code width -> mean squared error on Gaussian numbers of variance 1."""', ""]
    return "\n".join(lines)


def header_file(tables: dict[int, tuple[list[int], float, float]]) -> str:
    """csrc/trellis_tables.h."""

    def inner(values: list[str]) -> str:
        return ", ".join(["0", *values])

    taps = ["{" + ", ".join(map(str, tap)) + "}" for tap in TAPS.values()]
    lines = [
        '// Tables of the level set "trellis", made by scripts/trellis_tables.py; see src/moeq/trellis/tables.py.',
        "#pragma once\n\n#include <cstdint>\n\nnamespace moeq {\n",
        "// By code width: codes above that matter, parities, and the bits that each of them is of.",
        f"constexpr int kHistory[5] = {{{inner([str(history) for history in TRELLISES.values()])}}};",
        f"constexpr int kParities[5] = {{{inner([str(len(tap)) for tap in TAPS.values()])}}};",
        f"constexpr int kTaps[5][4] = {{{{}}, {', '.join(taps)}}};",
        f"constexpr int kLargest[5] = {{{inner([str(largest) for largest in LARGEST.values()])}}};  // of its entries",
        "constexpr int8_t kTrellis[5][32] = {\n    {},",
    ]
    for table, _, _ in tables.values():
        rows = [", ".join(map(str, table[at : at + 16])) for at in range(0, len(table), 16)]
        lines.append("    {" + ",\n     ".join(rows) + "},")
    return "\n".join([*lines, "};\n\n}  // namespace moeq", ""])


def main() -> int:
    """Train all; with --check say whether the files are what training gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--taps", nargs=3, type=int, metavar=("BITS", "ROWS", "TRIES"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.taps:
        search(*args.taps)
        return 0
    tables = {bits: best(bits) for bits in TRELLISES}
    files = {PYTHON: python_file(tables), HEADER: header_file(tables)}
    if args.check:
        return 0 if all(path.read_text(encoding="utf-8") == text for path, text in files.items()) else 1
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

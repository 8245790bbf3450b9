"""Trains the tables of the level set "trellis" and writes them as constants.

    python scripts/trellis_tables.py [--check]        src/moeq/trellis/tables.py, csrc/trellis_tables.h

A weight is table[history * 2^b + code], where the history is the lowest bits of the last k codes above it in its
column, newest last, and starts at zero every RESTART rows (docs/format.md, "Trellis"). Only one bit of a code goes into
the history, so that with 2^k states errors depend on k rows instead of k / b: that is Ungerboeck's form of a trellis
code, as Marcellin and Fischer use it for sources (1990). A table starts as levels of one bit more, cut into subsets
that codes and history choose, and is trained on Gaussian numbers: the best path by Viterbi's search, then every entry
the mean of what came to it. Of several starts the best is kept; entries are stored in 32nds of a standard deviation.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from moeq.spec import RESTART, TRELLISES

ROOT = Path(__file__).parent.parent
PYTHON, HEADER = ROOT / "src" / "moeq" / "trellis" / "tables.py", ROOT / "csrc" / "trellis_tables.h"
UNIT = 32
ROUNDS = 30
COLUMNS = 2048
HELD_OUT = 16384


def order_of(bits: int, history: int) -> tuple[Tensor, Tensor]:
    """Entries by the history that they lead to, (states, 2^bits), and the history that each comes from."""
    entry = torch.arange(1 << (bits + history))
    leads_to = ((entry >> bits) << 1 | (entry & 1)) & ((1 << history) - 1)
    order = torch.argsort(leads_to, stable=True).view(1 << history, -1)
    return order, order >> bits


def paths(x_RC: Tensor, table: Tensor, bits: int, history: int) -> tuple[Tensor, float]:
    """Entries of the path of least squared error down each column, (R, C), and the mean squared error."""
    order, comes_from = order_of(bits, history)
    cost = torch.full((x_RC.shape[1], 1 << history), float("inf"))
    cost[:, 0] = 0
    back = []
    for x_C in x_RC:
        tried = cost[:, comes_from] + (x_C[:, None, None] - table[order]).square()
        cost, chosen = tried.min(2)
        back.append(chosen)
    best_C, state_C = cost.min(1)
    found = []
    for chosen in reversed(back):
        entry_C = order[state_C, chosen.gather(1, state_C[:, None])[:, 0]]
        found.append(entry_C)
        state_C = entry_C >> bits
    return torch.stack(found[::-1]), float(best_C.sum() / x_RC.numel())


def scalar_levels(bits: int) -> Tensor:
    """Levels of least squared error for Gaussian numbers, by Lloyd's algorithm."""
    x = torch.erfinv(2 * (torch.arange(200_000) + 0.5) / 200_000 - 1) * 2**0.5
    levels = x[torch.arange(1 << bits) * len(x) // (1 << bits) + len(x) // (2 << bits)]
    for _ in range(300):
        at = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        levels = torch.zeros_like(levels).index_add(0, at, x) / torch.bincount(at, minlength=len(levels))
    return levels


def start(bits: int, history: int, taps: int, noise: float, generator: torch.Generator) -> Tensor:
    """Levels of one bit more: four subsets, of which a history (its parity over `taps`) offers two."""
    levels = scalar_levels(bits + 1)
    entry = torch.arange(1 << (bits + history))
    state, code = entry >> bits, entry & ((1 << bits) - 1)
    parity = sum(((state >> at) & 1) * ((taps >> at) & 1) for at in range(history)) % 2
    index = (code >> 1) * 4 + (code & 1) * 2 + parity
    return levels[index] + noise * torch.randn(len(entry), generator=generator)


def train(bits: int, history: int, taps: int, noise: float, seed: int) -> tuple[Tensor, float]:
    """A table in 32nds, and its error on numbers that it was not trained on."""
    generator = torch.Generator().manual_seed(seed)
    table = start(bits, history, taps, noise, generator)
    x_RC = torch.randn(RESTART, COLUMNS, generator=generator)
    for _ in range(ROUNDS):
        entry_RC, _ = paths(x_RC, table, bits, history)
        count = torch.bincount(entry_RC.flatten(), minlength=len(table))
        total = torch.zeros_like(table).index_add(0, entry_RC.flatten(), x_RC.flatten())
        table = torch.where(count > 0, total / count.clamp(min=1), table)
    stored = (table * UNIT).round().clamp(-127, 127)
    held_out = torch.randn(RESTART, HELD_OUT, generator=torch.Generator().manual_seed(10_000))
    return stored, paths(held_out, stored / UNIT, bits, history)[1]


def best(bits: int, history: int) -> tuple[list[int], float]:
    """The best of several starts."""
    top = 1 << (history - 1)
    found = []
    for taps in sorted({top, top | 1, top | 2, (1 << history) - 1}):
        if taps < 1 << history:
            found += [train(bits, history, taps, noise, seed) for seed, noise in enumerate((0.0, 0.05, 0.15))]
    table, error = min(found, key=lambda each: each[1])
    print(f"{bits} bits, {1 << history} states: {error:.4f} of {len(found)}", file=sys.stderr, flush=True)
    return [int(value) for value in table], error


def python_file(tables: dict[int, tuple[list[int], float]]) -> str:
    """src/moeq/trellis/tables.py."""
    lines = [
        '"""Tables of the level set "trellis", made by scripts/trellis_tables.py."""',
        "",
        "from typing import Final",
    ]
    lines += ["", "# fmt: off", "TABLES: Final[dict[int, tuple[int, ...]]] = {"]
    for bits, (table, _) in tables.items():
        lines += [
            f"    {bits}: (",
            *(f"        {', '.join(map(str, table[at : at + 16]))}," for at in range(0, 64, 16)),
        ]
        lines.append("    ),")
    lines += ["}", "# fmt: on", f'"""Code width -> entries, in {UNIT}nds of a standard deviation."""', ""]
    errors = ", ".join(f"{bits}: {error:.4f}" for bits, (_, error) in tables.items())
    lines += [f"UNIT: Final = {UNIT}", "", f"ERRORS: Final = {{{errors}}}"]
    lines += ['"""Code width -> mean squared error on Gaussian numbers of variance 1, restarts included."""', ""]
    return "\n".join(lines)


def header_file(tables: dict[int, tuple[list[int], float]]) -> str:
    """csrc/trellis_tables.h."""
    histories = ", ".join(str(history) for history in TRELLISES.values())
    lines = [
        '// Tables of the level set "trellis", made by scripts/trellis_tables.py; see src/moeq/trellis/tables.py.',
        "#pragma once\n\n#include <cstdint>\n\nnamespace moeq {\n",
        f"constexpr int64_t kRestart = {RESTART};  // rows after which the history is zero again",
        f"constexpr int kHistory[5] = {{0, {histories}}};  // bits of it, by code width",
        "constexpr int8_t kTrellis[5][64] = {\n    {},",
    ]
    for table, _ in tables.values():
        rows = [", ".join(map(str, table[at : at + 16])) for at in range(0, 64, 16)]
        lines.append("    {" + ",\n     ".join(rows) + "},")
    return "\n".join([*lines, "};\n\n}  // namespace moeq", ""])


def main() -> int:
    """Train all; with --check say whether the files are what training gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = {bits: best(bits, history) for bits, history in TRELLISES.items()}
    files = {PYTHON: python_file(tables), HEADER: header_file(tables)}
    if args.check:
        return 0 if all(path.read_text(encoding="utf-8") == text for path, text in files.items()) else 1
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Seconds, proven gap and peak memory of the solvers on large problems.

    python benchmarks/solver.py --output benchmarks/solver.md

Every row is a process of its own. Costs are log-normal over about five decades, times 4^-bits or, in rows
called "non-convex", times the relative errors .36/.25/.046/.010/.0025 of plain rounding, with 5 % of noise.
Peak RSS is the kernel's: the interpreter, torch (moeq's package imports it, the solvers do not) and the
problem itself are in it.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from moeq.report.tables import markdown_table
from moeq.solvers.problem import Problem, Share
from moeq.solvers.registry import make_solver
from moeq.solvers.shares import parse_shares, shares_for

GIB = 2**30
ROUNDING = (0.36, 0.25, 0.046, 0.010, 0.0025, 0.0006, 0.00015, 0.00004)
CASES: dict[str, dict[str, object]] = {
    "48 x 128 x 3 units, 5 candidates": {"units": 18432},
    "same, non-convex": {"units": 18432, "convex": False},
    "same, sizes in bytes": {"units": 18432, "stored": True},
    "same, bytes, non-convex": {"units": 18432, "stored": True, "convex": False},
    "same, c2c3": {"units": 18432, "shares": "c2c3", "group": 384},
    "same, bytes, c2c3 in groups of 64": {
        "units": 18432,
        "shares": "c2c3",
        "group": 64,
        "stored": True,
        "convex": False,
    },
    "same, 3+:40%,2:10%": {"units": 18432, "shares": "3+:40%,2:10%", "group": 384, "mean": 2.7},
    "same, non-convex, 3+:40%,2:10%": {
        "units": 18432,
        "shares": "3+:40%,2:10%",
        "group": 384,
        "mean": 2.5,
        "convex": False,
    },
    "milp: 48 x 128 x 3 units, 5 candidates": {"units": 18432, "solver": "milp"},
    "dp: 48 x 128 units, 3 candidates, c2c3": {
        "units": 6144,
        "candidates": 3,
        "mean": 2.0,
        "shares": "c2c3",
        "group": 128,
        "solver": "dp",
    },
    "dp: 48 x 128 x 3 units, 5 candidates": {"units": 18432, "solver": "dp"},
    "2 million units, 8 candidates": {"units": 2_000_000, "candidates": 8, "mean": 3.3},
    "40 million units, 8 candidates": {"units": 40_000_000, "candidates": 8, "mean": 3.3},
    "same, one row of 32-bit sizes per unit": {"units": 40_000_000, "candidates": 8, "mean": 3.3, "own_sizes": True},
}


def costs(units: int, candidates: int, convex: bool) -> NDArray[np.float32]:
    """Costs (U, C), made in blocks so that making them is not what takes the memory."""
    made = np.empty((units, candidates), np.float32)
    relative = 4.0 ** -np.arange(1, candidates + 1) if convex else np.array(ROUNDING[:candidates])
    for block, start in enumerate(range(0, units, 1 << 20)):
        generator = np.random.default_rng(block)
        rows = min(1 << 20, units - start)
        weight = np.exp(2.5 * generator.standard_normal(rows, np.float32)) * 1e-6
        noise = np.exp(0.05 * generator.standard_normal((rows, candidates), np.float32))
        made[start : start + rows] = weight[:, None] * relative * noise
    return made


def make(
    units: int,
    candidates: int = 5,
    mean: float = 2.5,
    convex: bool = True,
    stored: bool = False,
    own_sizes: bool = False,
    shares: str = "none",
    group: int = 0,
    solver: str = "",
) -> Problem:
    """The problem of one row; `solver` is not part of it."""
    bits = np.arange(1, candidates + 1, dtype=np.int64)
    sizes, limit = bits[None], math.floor(mean * units)
    if stored:
        # 2048 x 1408 in groups of 128, 16-bit scales, 8-bit zeros from two bits on; the last 200 are larger.
        codes, groups = 2048 * 1408 // 8, 2048 * 11
        times = np.ones(units, np.int64)
        times[-200:] = np.random.default_rng(0).integers(1, 9, 200)
        sizes = times[:, None] * (codes * bits + groups * np.where(bits > 1, 3, 2))
        limit = math.floor(mean * codes * int(times.sum())) + 2 * groups * units
    if own_sizes:
        sizes = np.repeat(sizes.astype(np.int32), units, axis=0)
    groups_of = [np.arange(start, start + group) for start in range(0, units, group)] if group else []
    made: tuple[Share, ...] = shares_for(parse_shares(shares), bits.tolist(), groups_of)
    return Problem(costs_UC=costs(units, candidates, convex), sizes_UC=sizes, limit=limit, shares=made)


def measure(name: str) -> None:
    """Solve one problem and print what it took, as JSON."""
    options = CASES[name]
    problem = make(**options)  # type: ignore[arg-type]
    wall, cpu = time.perf_counter(), time.process_time()
    solution = make_solver(str(options.get("solver", "auto"))).solve(problem)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "gap": solution.gap, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="markdown file to write; else the table is printed")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    rows = []
    for name in CASES:
        if options.only not in name:
            continue
        run = subprocess.run(
            [sys.executable, __file__, "--measure", name], check=True, capture_output=True, text=True, env=os.environ
        )
        seen = json.loads(run.stdout)
        rows.append(
            [name, f"{seen['wall']:.1f}", f"{seen['cpu']:.1f}", f"{seen['gap']:.1e}", f"{seen['peak'] / GIB:.2f}"]
        )
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    table = markdown_table(["problem", "seconds", "CPU seconds", "proven gap", "peak RSS (GiB)"], rows)
    text = (
        "# Solvers on large problems\n\n`python benchmarks/solver.py`, solver `auto` where none is named; "
        f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}. "
        "The script says what the costs are.\n\n" + table + "\n"
    )
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()

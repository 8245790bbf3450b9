"""Decoding beside other programs: how much slower is a packed model when processors are taken?

    python benchmarks/busy.py PACKED [--threads 2] [--busy 0,1,2] [--rounds 3]

`moeq bench` in a process of its own, beside 0, 1, 2 processes that do nothing but compute; the cases take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

from moeq.report.tables import markdown_table

BENCH = "import sys; from moeq_cli import main; sys.exit(main(sys.argv[1:]))"


def measure(packed: str, threads: int, busy: int) -> tuple[float, float]:
    """Tokens a second of a prompt and of decoding, beside `busy` others."""
    words = ["bench", packed, "--json", "--quiet", "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with ExitStack() as stack:
        for _ in range(busy):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(other.kill)
        command = [sys.executable, "-c", BENCH, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    return found["prefill_tokens_per_second"], found["decode_tokens_per_second"]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cases = [int(word) for word in args.busy.split(",")]
    found: dict[int, list[tuple[float, float]]] = {busy: [] for busy in cases}
    for _ in range(args.rounds):
        for busy in cases:
            found[busy].append(measure(args.packed, args.threads, busy))
    lines = []
    for busy in cases:
        prefill, decode = (statistics.median(side) for side in zip(*found[busy], strict=True))
        alone = statistics.median(rate for _, rate in found[cases[0]])
        lines.append((str(busy), f"{prefill:.0f}", f"{decode:.1f}", f"{alone / decode:.2f}"))
    print(markdown_table(("others", "prompt, tokens/s", "decoding, tokens/s", "times slower"), lines))


if __name__ == "__main__":
    main()

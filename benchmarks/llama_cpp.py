"""The race against llama.cpp: the same model, prompts and answers, one and two threads, alternating in one run.

    python benchmarks/llama_cpp.py --llama-cpp DIR --packed PACKED --gguf FILE [--gguf FILE ...] [--rounds 3]

DIR is a checkout of llama.cpp with llama-bench in build/bin. Prefill of 512 tokens and decoding of 64, tokens a second,
medians over the rounds; ours by `moeq bench`, which also reads memory as fast as it can, between llama-bench's turns.
Memory is the most that a program had resident at the first token of a prompt of one, and the seconds are those from its
start to that token: what a user waits who calls it once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moeq.report.tables import markdown_table

PROMPT, NEW = 512, 64


def theirs(programs: Path, file: Path, threads: int) -> dict[str, float]:
    """One turn of llama-bench; it decodes behind a prompt as long as ours."""
    found = {}
    for name, what in (("prefill", ("-p", PROMPT, "-n", 0)), ("decode", ("-p", 0, "-n", NEW, "-d", PROMPT))):
        words = [programs / "llama-bench", "-m", file, *what, "-t", threads, "-r", 1, "-o", "json"]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
        lines: list[dict[str, Any]] = json.loads(done.stdout)
        found[name] = lines[0]["avg_ts"]
    start = first_token(programs / "llama-bench", "-m", file, "-p", 1, "-n", 0, "-t", threads, "-r", 1, "--no-warmup")
    return found | dict(zip(("start", "memory"), start, strict=True))


def first_token(*words: object, environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Seconds from a program's start to its end, and GiB it had resident at most."""
    started = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([str(word) for word in words], env=environment, **quiet) as program:
        _, status, used = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
    if program.returncode:
        raise SystemExit(f"{words[0]} ended with {program.returncode}")
    return time.perf_counter() - started, used.ru_maxrss / 2**20


def ours(packed: Path, threads: int) -> dict[str, float]:
    """One turn of `moeq bench`."""
    words = ["bench", packed, "--json", "--quiet", "--prompt-tokens", PROMPT, "--new-tokens", NEW, "--threads", threads]
    program = sys.executable, "-c", "import sys; from moeq_cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    start = first_token(
        *program, "generate", packed, "a", "--max-new-tokens", 1, "--device", "cpu", environment=environment
    )
    return dict(zip(("start", "memory"), start, strict=True)) | {
        "prefill": found["prefill_tokens_per_second"],
        "decode": found["decode_tokens_per_second"],
        "roofline": found["roofline_share"],
    }


def main() -> None:
    """Alternate, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--packed", type=Path, action="append", required=True)
    parser.add_argument("--gguf", type=Path, action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    counts = [int(count) for count in args.threads.split(",")]
    for _ in range(args.rounds):
        for threads in counts:
            for file in args.gguf:
                turn = theirs(args.llama_cpp / "build" / "bin", file, threads)
                found.setdefault((str(file), threads), []).append(turn)
            for packed in args.packed:
                found.setdefault((str(packed), threads), []).append(ours(packed, threads))
            print({f"{Path(key[0]).name} {key[1]}": turns[-1] for key, turns in found.items()}, file=sys.stderr)
    lines = []
    for (path, threads), turns in sorted(found.items(), key=lambda each: (each[0][1], each[0][0])):
        size = sum(f.stat().st_size for f in Path(path).glob("*.safetensors")) or Path(path).stat().st_size
        row = [Path(path).name, f"{size / 2**20:.0f}", str(threads)]
        keys = "prefill", "decode", "start", "memory"
        row += [f"{statistics.median(turn[key] for turn in turns):.1f}" for key in keys]
        shares = [turn["roofline"] for turn in turns if "roofline" in turn]
        lines.append((*row, f"{statistics.median(shares):.2f}" if shares else ""))
    header = (
        "model",
        "MiB",
        "threads",
        f"prefill of {PROMPT}",
        f"decoding {NEW}",
        "s to a token",
        "GiB",
        "of the roofline",
    )
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()

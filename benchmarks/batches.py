"""Several sequences at once: tokens a second of a step that gives each of them one token, ours and llama.cpp's.

    python benchmarks/batches.py --packed PACKED [--llama-cpp DIR --gguf FILE] [--threads 1] [--rounds 3]

DIR is a checkout of llama.cpp with llama-batched-bench in build/bin. Every sequence has a prompt of 64 random tokens,
so that they ask different experts; 16 steps, both take turns, medians over the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import moeq
from moeq.report.tables import markdown_table
from moeq.runtime.growing import growing_cache

PROMPT, STEPS = 64, 16
BATCHES = (1, 2, 4, 8, 16, 32)


@torch.inference_mode()
def ours(model: Any, batch: int) -> float:
    """Tokens a second."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    cache = growing_cache(model)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    took = []
    for _ in range(STEPS):
        token = out.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        took.append(time.perf_counter() - started)
    return batch / statistics.median(took)


def theirs(programs: Path, file: Path, threads: int) -> dict[int, float]:
    """Batch -> tokens a second."""
    words = [programs / "llama-batched-bench", "-m", file, "-c", (PROMPT + STEPS) * sum(BATCHES), "-t", threads]
    words += ["-npp", PROMPT, "-ntg", STEPS, "-npl", ",".join(map(str, BATCHES)), "--output-format", "jsonl"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {int(line["pl"]): float(line["speed_tg"]) for line in lines}


def main() -> None:
    """Alternate, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = moeq.load(args.packed)
    mine: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    other: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(args.rounds):
        for batch in BATCHES:
            mine[batch].append(ours(model, batch))
        if args.gguf is not None:
            for batch, speed in theirs(args.llama_cpp / "build" / "bin", args.gguf, args.threads).items():
                other[batch].append(speed)
        print(mine, other, file=sys.stderr)
    lines = []
    for batch in BATCHES:
        speed = statistics.median(mine[batch])
        line = [str(batch), f"{speed:.1f}", f"{speed / statistics.median(mine[1]):.2f}"]
        if other[batch]:
            line += [f"{statistics.median(other[batch]):.1f}", f"{speed / statistics.median(other[batch]):.2f}"]
        lines.append(tuple(line))
    header = ("sequences", "tokens/s", "of one sequence", *(("llama.cpp", "ratio") if args.gguf is not None else ()))
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()

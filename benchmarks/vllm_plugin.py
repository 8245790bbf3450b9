"""Packed checkpoints in vLLM by moeq's plugin against the original in bfloat16, alternating in one run.

    .venv-vllm/bin/python benchmarks/vllm_plugin.py --packed DIR --original MODEL [--rounds 3]

`make test-vllm` makes the environment. Every turn is a process of its own: seconds until the engine is ready, its
memory, and tokens a second of `--requests` answers at once, each a prompt of 128 tokens and 64 new ones; then of one
answer alone. Figures are medians over the rounds, ratios are those of the medians.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PROMPT, NEW = 128, 64


def turn(model: str, requests: int) -> dict[str, float]:
    """One engine, from nothing to its figures."""
    from vllm import LLM, SamplingParams

    begun = time.monotonic()
    llm = LLM(
        model, dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=requests, seed=0,
        distributed_executor_backend="uni", enable_prefix_caching=False,
    )  # fmt: skip
    found = {"ready": time.monotonic() - begun}
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def speed(count: int, new: int, shift: int) -> float:
        ask = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        prompts = [
            {"prompt_token_ids": [(shift + 7 * at + at * at + 31 * row) % (vocabulary - 8) for at in range(PROMPT)]}
            for row in range(count)
        ]
        start = time.monotonic()
        llm.generate(prompts, ask, use_tqdm=False)
        return time.monotonic() - start

    speed(2, 4, 1)
    first, whole = speed(requests, 1, 2), speed(requests, NEW, 3)
    found["prompt tokens/s"] = requests * PROMPT / first
    found["new tokens/s"] = requests * (NEW - 1) / max(1e-9, whole - first)
    first, whole = speed(1, 1, 4), speed(1, NEW, 5)
    found["new tokens/s, one alone"] = (NEW - 1) / max(1e-9, whole - first)
    found["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def main() -> None:
    """Alternate, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print("FOUND " + json.dumps(turn(args.turn, args.requests)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for path in (args.original, args.packed):
            words = [sys.executable, __file__, "--turn", str(path), "--requests", str(args.requests)]
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | QUIET)
            lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            if not lines:
                raise SystemExit(done.stderr[-3000:])
            found.setdefault(str(path), []).append(json.loads(lines[0].removeprefix("FOUND ")))
            print(path.name, found[str(path)][-1], file=sys.stderr, flush=True)
    print(f"| | {args.original.name}, bfloat16 | {args.packed.name} | ratio |\n|---|---:|---:|---:|")
    for key in found[str(args.packed)][0]:
        first, second = (statistics.median(each[key] for each in found[str(p)]) for p in (args.original, args.packed))
        print(f"| {key} | {first:.2f} | {second:.2f} | {second / first:.2f} |")


if __name__ == "__main__":
    main()

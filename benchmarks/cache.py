"""Decoding with transformers' cache and with the one that grows in place, in turn.

    OMP_NUM_THREADS=1 python benchmarks/cache.py DIR [--contexts 512,2048,4096] [--rounds 5]

DIR is a packed checkpoint. Each round decodes the same tokens behind the same prompt with both; the figure is the
median over rounds of the ratio of their median steps.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from moeq.report.tables import markdown_table
from moeq.runtime.growing import growing_cache
from moeq.runtime.load import load, set_exact

STEPS = 24


@torch.inference_mode()
def step_seconds(model: PreTrainedModel, cache: DynamicCache, prompt: torch.Tensor) -> float:
    """The median step behind a prompt."""
    token = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    steps = []
    for _ in range(STEPS):
        started = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        steps.append(time.perf_counter() - started)
    return statistics.median(steps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--contexts", default="512,2048,4096")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = load(args.directory, device="cpu")
    set_exact(model, None)
    lines = []
    for context in map(int, args.contexts.split(",")):
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(3, model.get_input_embeddings().num_embeddings, (1, context), generator=generator)
        ratios = []
        for _ in range(args.rounds):
            theirs = step_seconds(model, DynamicCache(config=model.config), prompt)
            ours = step_seconds(model, growing_cache(model), prompt)
            ratios.append(theirs / ours)
        lines.append((str(context), f"{statistics.median(ratios):.2f}"))
        print(lines[-1], flush=True)
    print(markdown_table(("context", "transformers' cache / ours"), lines))


if __name__ == "__main__":
    main()

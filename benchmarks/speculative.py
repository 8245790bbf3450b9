"""Speculative decoding of packed models by transformers' own `generate`: prompt lookup, and an assistant model.

    python benchmarks/speculative.py PACKED [--assistant DIR] [--data DIR] [--threads 1] [--rounds 3]

Greedy, 64 tokens after 256, several prompts of each kind; the ways of decoding take turns. "Repeating" prompts hold a
passage twice, the second time cut in the middle, as when a document is quoted or code is edited. Tokens per step are
those that one run of the packed model yields; "same" is the share of prompts that gave the very same tokens.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import moeq
from moeq.calibration.tokens import read_text
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_any, load_tokenizer

LENGTH, NEW, PROMPTS = 256, 64, 4
TEXTS = {"wikitext2": "wikitext2/test.txt", "mixture": "mixture/heldout.jsonl"}


def prompts(packed: Path, data: Path) -> dict[str, list[torch.Tensor]]:
    """Kind -> prompts of `LENGTH` tokens, (1, LENGTH)."""
    tokenizer = load_tokenizer(packed)
    found = {}
    for name, file in TEXTS.items():
        ids = tokenizer(read_text(data / file), return_tensors="pt")["input_ids"][0]
        starts = [len(ids) * at // (PROMPTS + 1) for at in range(1, PROMPTS + 1)]
        found[name] = [ids[start : start + LENGTH][None] for start in starts]
        passage = LENGTH * 2 // 3
        parts = [ids[start : start + passage] for start in starts]
        found[f"{name}, repeating"] = [torch.cat([part, part[: LENGTH - passage]])[None] for part in parts]
    return found


def decode(model: Any, prompt: torch.Tensor, steps: list[int], **options: Any) -> tuple[list[int], float]:
    """New tokens, and seconds."""
    steps.append(0)
    started = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    return out[0, prompt.shape[1] :].tolist(), time.perf_counter() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--assistant", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = moeq.load(args.packed, device="cpu")
    ways: dict[str, dict[str, Any]] = {"one by one": {}, "prompt lookup, 3": {"prompt_lookup_num_tokens": 3}}
    ways["prompt lookup, 10"] = {"prompt_lookup_num_tokens": 10}
    if args.assistant is not None:
        ways[f"assistant {args.assistant.name}"] = {"assistant_model": load_any(args.assistant, "cpu", model.dtype)}
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.__setitem__(-1, steps[-1] + 1))
    lines = []
    for kind, some in prompts(args.packed, args.data).items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        tokens: dict[str, list[list[int]]] = {way: [] for way in ways}
        counts: dict[str, list[int]] = {way: [] for way in ways}
        for round_ in range(args.rounds):
            for way, options in ways.items():
                answers = [decode(model, prompt, steps, **options) for prompt in some]
                seconds[way].append(sum(took for _, took in answers))
                if not round_:
                    tokens[way], counts[way] = [found for found, _ in answers], steps[-PROMPTS:]
        plain = statistics.median(seconds["one by one"])
        for way in ways:
            same = sum(a == b for a, b in zip(tokens[way], tokens["one by one"], strict=True)) / PROMPTS
            per_step = NEW * PROMPTS / sum(counts[way])
            took = statistics.median(seconds[way])
            lines.append((kind, way, f"{per_step:.2f}", f"{plain / took:.2f}", f"{100 * same:.0f} %"))
    print(markdown_table(("prompts", "decoding", "tokens per step", "times as fast", "same"), lines))


if __name__ == "__main__":
    main()

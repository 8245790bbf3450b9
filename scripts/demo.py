"""Quantizes the bundled MoE to 8, 4, 3 and 2 bits and prints what that costs and what it keeps.

Run it through `make demo`. The table is also written to OUTPUT/table.md.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

import moeq
from moeq.report.tables import human_bytes, markdown_table
from moeq.stages import generate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "demo-qwen3moe-4m"
CALIBRATION = ROOT / "assets" / "text" / "calibration.txt"
EVALUATION = ROOT / "assets" / "text" / "eval.txt"
PROMPT = "The old man looked at the sea and"
WIDTHS = (8, 4, 3, 2)
"""Bits of every expert's codes; the table says what they take with scales and padding."""
MAX_TOKENS = 8192
SEQLEN = 256

HEADER = ("model", "stored", "bits/expert weight", "perplexity", "KL", "top-1", "router", "continuation")


def measure(model: Path) -> moeq.EvalResult:
    return moeq.evaluate(
        model, EVALUATION, reference=MODEL, seqlen=SEQLEN, max_tokens=MAX_TOKENS, batch_size=8, device="cpu"
    )


def continuation(model: Path) -> str:
    added = generate.run(model, PROMPT, max_new_tokens=16, device="cpu").continuation
    return " ".join(added.split()).replace("|", "/")


def row(name: str, stored: int, bits: float, result: moeq.EvalResult, text: str) -> tuple[str, ...]:
    metrics = result.metrics
    return (
        name,
        human_bytes(stored),
        f"{bits:.3f}",
        f"{metrics['perplexity']:.1f}",
        f"{metrics['kl']:.4f}",
        f"{100 * metrics['top1_agreement']:.1f} %",
        f"{100 * metrics['router_overlap']:.1f} %",
        text,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory to make")
    output = parser.parse_args().output
    logging.disable_progress_bar()
    torch.manual_seed(0)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    started = time.perf_counter()
    print("measuring the original ...", file=sys.stderr)
    inventory = moeq.inspect(MODEL)
    rows = [row("bf16 (original)", inventory.source_bytes, 16, measure(MODEL), continuation(MODEL))]
    for bits in WIDTHS:
        print(f"quantizing to codes of {bits} bits ...", file=sys.stderr)
        packed = output / f"demo-{bits}bit"
        options = {"method": "uniform", "bits": bits, "accounting": "codes", "calibration": str(CALIBRATION)}
        report = moeq.quantize(MODEL, packed, nsamples=64, seqlen=SEQLEN, device="cpu", **options)
        rows.append(
            row(
                f"moeq {bits}-bit codes",
                report.stored_bytes,
                report.expert_bits_per_weight,
                measure(packed),
                continuation(packed),
            )
        )
    table = markdown_table(HEADER, rows)
    title = f"# moeq {moeq.__version__} demo: {MODEL.name}, prompt {PROMPT!r}\n\n"
    (output / "table.md").write_text(title + table + "\n", encoding="utf-8")
    print(title + table)
    print(f"\nwritten to {output / 'table.md'} in {time.perf_counter() - started:.0f} s; the checkpoints lie beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

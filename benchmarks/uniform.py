"""Quality of every quantizer at every width with uniform bits, at equal stored bytes.

    python benchmarks/uniform.py --model MODEL --data DATA --output benchmarks/uniform.md

MODEL is a small trained MoE with its tokenizer, DATA holds c4/calibration.txt, c4/eval.txt,
wikitext2/test.txt and mixture/heldout.jsonl. Results go to a JSON lines file first (--log), so that an
interrupted run goes on where it stopped.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import moeq
from moeq.calibration.tokens import read_text, windows
from moeq.evals import suite
from moeq.evals.reference import save_reference
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_any, load_tokenizer

TEXTS = {"wikitext2": "wikitext2/test.txt", "c4": "c4/eval.txt", "mixture": "mixture/heldout.jsonl"}
QUANTIZERS = ("minmax", "rtn", "hqq", "gptq-mc", "gptq")
GAINED = ("rtn", "hqq", "gptq")
"""Quantizers that match the gain of what they rounded, unless told not to."""
WIDTHS = (8, 4, 3, 2, 1)
LEVELS = ("asym", "asym16", "sym", "half")
SEQLEN = 256
BATCH = 16


def configurations(seeds: int) -> list[dict[str, Any]]:
    main = [
        {"quantizer": quantizer, "bits": bits, "levels": "asym", "seed": seed, "gain": True}
        for bits in WIDTHS
        for quantizer in QUANTIZERS
        for seed in range(seeds if quantizer == "gptq" and bits in (2, 3) else 1)
    ]
    plain = [
        {"quantizer": quantizer, "bits": bits, "levels": "asym", "seed": 0, "gain": False}
        for bits in (3, 2)
        for quantizer in GAINED
    ]
    levels = [
        {"quantizer": quantizer, "bits": bits, "levels": name, "seed": 0, "gain": True}
        for bits in (3, 2)
        for name in LEVELS[1:]
        for quantizer in ("hqq", "gptq")
    ]
    return main + plain + levels


def clean_calibration(data: Path, out: Path) -> Path:
    """The C4 calibration text without the documents that the C4 evaluation text holds as well."""
    held_out = set(read_text(data / "c4" / "eval.txt").splitlines())
    lines = read_text(data / "c4" / "calibration.txt").splitlines()
    out.write_text("\n".join(line for line in lines if line not in held_out) + "\n", encoding="utf-8")
    return out


def references(args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Path]:
    """What the original says about each text, computed once."""
    model = load_any(args.model, args.device, torch.float32)
    paths = {name: args.log.with_name(f"reference-{name}.safetensors") for name in rows}
    for name, windows_ in rows.items():
        save_reference(model, windows_, paths[name], batch_size=BATCH)
    return paths


def measure(
    configuration: dict[str, Any], args: argparse.Namespace, reference: Any, rows: dict[str, Any]
) -> dict[str, Any]:
    options = {**configuration, "accounting": "codes", "group_size": args.group_size, "device": args.device}
    options |= {"nsamples": args.nsamples, "seqlen": SEQLEN, "quality": False}
    if configuration["quantizer"].startswith("gptq"):
        options["calibration"] = str(args.log.with_name("calibration.txt"))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        packed = Path(scratch) / "packed"
        report = moeq.quantize(args.model, packed, **options)
        model = load_any(packed, args.device, torch.float32)
        result = {
            **configuration,
            "expert_bytes": report.expert_bytes,
            "bits_per_weight": report.expert_bits_per_weight,
            "seconds": report.seconds["pack"],
        }
        for name, windows_ in rows.items():
            metrics, tokens = suite.compare_all(model, reference[name], windows_, BATCH, None)
            result |= {f"{name}_{key}": value for key, value in metrics.items()} | {f"{name}_tokens": tokens}
    return result


def select(results: list[dict[str, Any]], quantizer: str, bits: int, levels: str, gain: bool) -> list[dict[str, Any]]:
    wanted = (quantizer, bits, levels, gain)
    return [r for r in results if (r["quantizer"], r["bits"], r["levels"], r["gain"]) == wanted]


def average(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def table(
    results: list[dict[str, Any]], wanted: list[tuple[str, int, str]], with_levels: bool = False, gain: bool = True
) -> str:
    header = ["bits", "levels" if with_levels else None, "quantizer", "stored bits/weight"]
    for name in TEXTS:
        header += [f"{name} ppl", f"{name} KL", f"{name} top-1"]
    header.append("seconds")
    lines = []
    for quantizer, bits, levels in wanted:
        rows = select(results, quantizer, bits, levels, gain)
        if not rows:
            continue
        label = quantizer + (f" ({len(rows)} seeds)" if len(rows) > 1 else "")
        line = [str(bits), levels if with_levels else None, label, f"{rows[0]['bits_per_weight']:.4f}"]
        for name in TEXTS:
            spread = max(r[f"{name}_kl"] for r in rows) - min(r[f"{name}_kl"] for r in rows)
            error = f" ± {spread / 2:.4f}" if len(rows) > 1 else ""
            line.append(f"{average(rows, f'{name}_perplexity'):.2f}")
            line.append(f"{average(rows, f'{name}_kl'):.4f}{error}")
            line.append(f"{100 * average(rows, f'{name}_top1_agreement'):.1f} %")
        line.append(f"{average(rows, 'seconds'):.1f}")
        lines.append(tuple(cell for cell in line if cell is not None))
    return markdown_table(tuple(name for name in header if name is not None), lines)


def claims(results: list[dict[str, Any]]) -> str:
    """The inequalities that must hold, with the ratio of mean KL over the three texts."""

    def kl(quantizer: str, bits: int) -> float:
        rows = select(results, quantizer, bits, "asym", gain=True)
        return sum(average(rows, f"{name}_kl") for name in TEXTS) / len(TEXTS)

    pairs = (("gptq", "hqq"), ("gptq", "rtn"), ("hqq", "minmax"), ("rtn", "minmax"), ("gptq", "gptq-mc"))
    rows = []
    for bits in (3, 2):
        for better, worse in pairs:
            ratio = kl(better, bits) / kl(worse, bits)
            rows.append((str(bits), f"{better} < {worse}", f"{ratio:.3f}", "holds" if ratio < 1 else "FAILS"))
    return markdown_table(("bits", "claim on KL", "ratio", ""), rows)


def write(results: list[dict[str, Any]], args: argparse.Namespace, reference: dict[str, float]) -> None:
    main = [(q, b, "asym") for b in WIDTHS for q in QUANTIZERS]
    levels = [(q, b, name) for b in (3, 2) for q in ("hqq", "gptq") for name in LEVELS]
    plain = [(q, b, "asym") for b in (3, 2) for q in GAINED]
    original = ", ".join(f"{name} {value:.2f}" for name, value in reference.items())
    text = f"""# Uniform bits: every quantizer at every width

Made by `python benchmarks/uniform.py` (moeq {moeq.__version__}, torch {torch.__version__}),
model `{args.model.name}`, group size {args.group_size}. Every expert matrix has the same width; all rows
of one width and level set take the same stored bytes. Calibration of gptq and gptq-mc:
{args.nsamples} x {SEQLEN} tokens of C4 (documents of the evaluation text taken out).
Measured on the first {args.max_tokens} tokens of each text in windows of {SEQLEN}, in float32.
KL is to the original model, in nats per token; "±" is half the range over seeds. Seconds are of packing
alone, on a shared machine: compare only their order of magnitude.
Perplexity of the original: {original}.

## Asymmetric levels, 8-bit zeros

{table(results, main)}

## What must hold

{claims(results)}

## Without matching the gain (`--no-gain`)

The same quantizers with scales as least squares leaves them: compare with the rows of the first table
(docs/decisions/0013-match-the-gain.md).

{table(results, plain, gain=False)}

## Level sets

Different level sets take different bytes: see the stored bits.

{table(results, levels, with_levels=True)}
"""
    args.output.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-22m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/uniform.md"))
    parser.add_argument("--log", type=Path, default=Path("build/uniform.jsonl"))
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    lines = args.log.read_text(encoding="utf-8").splitlines() if args.log.exists() else []
    results = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(args.model)
    rows = {
        name: windows(tokenizer, read_text(args.data / path), SEQLEN, max_tokens=args.max_tokens)
        for name, path in TEXTS.items()
    }
    clean_calibration(args.data, args.log.with_name("calibration.txt"))
    reference = references(args, rows)
    keys = ("quantizer", "bits", "levels", "seed", "gain")
    for configuration in configurations(args.seeds):
        if any(all(result[key] == configuration[key] for key in keys) for result in results):
            continue
        results.append(measure(configuration, args, reference, rows))
        with args.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(results[-1]) + "\n")
        kl = {name: round(results[-1][f"{name}_kl"], 5) for name in TEXTS}
        print(configuration, kl, f"{results[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    write(results, args, {name: results[0][f"{name}_reference_perplexity"] for name in TEXTS})
    if args.scratch is not None:
        shutil.rmtree(args.scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

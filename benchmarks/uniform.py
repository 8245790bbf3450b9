"""Quality of every quantizer at every width with uniform bits, at equal stored bytes.

    python benchmarks/uniform.py --model MODEL --data DATA --output benchmarks/uniform.md

Texts, tokens and measures are those of benchmarks/harness.py, with more calibration. An interrupted run goes on where
it stopped; the page is written when everything is measured.
"""

from typing import Any

import torch
from harness import SEQLEN, TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, write_page

import moeq
from moeq.report.tables import markdown_table

QUANTIZERS = ("minmax", "rtn", "hqq", "gptq-mc", "gptq")
GAINED = ("rtn", "hqq", "gptq")
"""Quantizers that match the gain of what they rounded, unless told not to."""
WIDTHS = (8, 4, 3, 2, 1)
LEVELS = ("asym", "asym16", "sym", "half")


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


def measure_one(configuration: dict[str, Any], bench: Bench, group_size: int) -> Row:
    """The row of a configuration."""
    options = {**bench.options(**configuration), "accounting": "codes", "group_size": group_size}
    if not configuration["quantizer"].startswith("gptq"):
        del options["calibration"]
    with bench.packed(**options) as (packed, report):
        return {
            **configuration,
            "expert_bytes": report.expert_bytes,
            "bits_per_weight": report.expert_bits_per_weight,
            "seconds": report.seconds["pack"],
        } | bench.measure(bench.open(packed))


def key_of(row: Row) -> tuple[Any, ...]:
    """What tells a row from all others."""
    return tuple(row[key] for key in ("quantizer", "bits", "levels", "seed", "gain"))


def select(results: list[Row], quantizer: str, bits: int, levels: str, gain: bool) -> list[Row]:
    wanted = (quantizer, bits, levels, gain)
    return [r for r in results if (r["quantizer"], r["bits"], r["levels"], r["gain"]) == wanted]


def average(rows: list[Row], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def table(results: list[Row], wanted: list[tuple[str, int, str]], with_levels: bool = False, gain: bool = True) -> str:
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


def claims(results: list[Row]) -> str:
    """The inequalities that must hold, with the ratio of mean KL over the three texts."""

    def kl(quantizer: str, bits: int) -> float:
        rows = select(results, quantizer, bits, "asym", gain=True)
        return sum(mean_kl(row) for row in rows) / len(rows)

    pairs = (("gptq", "hqq"), ("gptq", "rtn"), ("hqq", "minmax"), ("rtn", "minmax"), ("gptq", "gptq-mc"))
    rows = []
    for bits in (3, 2):
        for better, worse in pairs:
            ratio = kl(better, bits) / kl(worse, bits)
            rows.append((str(bits), f"{better} < {worse}", f"{ratio:.3f}", "holds" if ratio < 1 else "FAILS"))
    return markdown_table(("bits", "claim on KL", "ratio", ""), rows)


def page(results: list[Row], args: Any, reference: dict[str, float]) -> str:
    """The page."""
    main = [(q, b, "asym") for b in WIDTHS for q in QUANTIZERS]
    levels = [(q, b, name) for b in (3, 2) for q in ("hqq", "gptq") for name in LEVELS]
    plain = [(q, b, "asym") for b in (3, 2) for q in GAINED]
    original = ", ".join(f"{name} {value:.2f}" for name, value in reference.items())
    return f"""# Uniform bits: every quantizer at every width

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

{table(results, levels, with_levels=True)}"""


def main() -> None:
    """Measure what is missing and write the page."""
    parser = arguments("uniform", __doc__)
    parser.set_defaults(nsamples=128, max_tokens=16_384)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    args = parse(parser)
    bench = Bench.of(args)
    rows = Rows(work=args.work, name="uniform", key=key_of)
    for configuration in rows.missing(configurations(args.seeds)):
        rows.add(measure_one(configuration, bench, args.group_size))
    results = rows.all()
    write_page(args.output, [page(results, args, {name: results[0][f"{name}_reference_perplexity"] for name in TEXTS})])


if __name__ == "__main__":
    main()

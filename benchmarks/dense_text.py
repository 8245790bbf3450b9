"""What calibration text does for linears outside the experts, at equal stored bytes.

    python benchmarks/dense_text.py --model ../shared/models/ref-qwen3moe-62m --output benchmarks/dense_text.md

Experts are rounded as always, with text; attention once to nearest, as moeq did until November 2026, and once as it
does now (docs/decisions/0011). Texts, tokens and measures are those of benchmarks/harness.py. An interrupted run goes
on where it stopped; the page is written when everything is measured.
"""

from typing import Any
from unittest.mock import patch

from harness import SEQLEN, TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, spread, write_page

import moeq
from moeq.report.tables import markdown_table
from moeq.writing import packing

WIDTHS = (4, 6, 8)
BITS = (2.125, 4.125)


def wanted(seeds: int) -> list[Row]:
    """What is to be measured."""
    return [
        {"bits": bits, "attention": width, "text": text, "seed": seed}
        for seed in range(seeds)
        for bits in BITS
        for width in (16, *WIDTHS)
        for text in ((True,) if width == 16 else (False, True))
    ]


def measure_one(row: Row, bench: Bench) -> Row:
    """A row with its figures."""
    options = bench.options(method="uniform", bits=row["bits"], dense_bits=f"attention={row['attention']}")
    choice = packing.heard_quantizer if row["text"] else lambda recipe: None
    with (
        patch.object(packing, "heard_quantizer", choice),
        bench.packed(**options, seed=row["seed"]) as (packed, report),
    ):
        facts = {"stored_bytes": report.stored_bytes, "seconds": report.seconds["pack"]}
        return row | facts | bench.measure(bench.open(packed))


def key_of(row: Row) -> tuple[Any, ...]:
    """What tells a row from all others."""
    return tuple(row[key] for key in ("bits", "attention", "text", "seed"))


def page(rows: list[Row], args: Any) -> str:
    """The page."""
    lines = []
    for bits in BITS:
        for width in (16, *WIDTHS):
            means = {}
            for text in (False, True):
                same = [r for r in rows if (r["bits"], r["attention"], r["text"]) == (bits, width, text)]
                if not same:
                    continue
                means[text] = sum(map(mean_kl, same)) / len(same)
                how = "as they are" if width == 16 else "with text" if text else "to nearest"
                kls = (spread([r[f"{name}_kl"] for r in same], 4) for name in TEXTS)
                ratio = f"{means[True] / means[False]:.2f}" if len(means) == 2 else ""
                stored = f"{same[0]['stored_bytes']:,}"
                lines.append((f"{bits:g}", str(width), how, stored, *kls, f"{means[text]:.4f}", ratio))
    header = ("bits of experts", "of attention", "rounded", "stored bytes", *(f"{name} KL" for name in TEXTS), "mean")
    return f"""# Linears outside the experts, with and without calibration text

`python benchmarks/dense_text.py --model MODEL`, moeq {moeq.__version__}, model `{args.model.name}`, {args.seeds} seeds,
{args.nsamples} x {SEQLEN} tokens of C4 for calibration (documents of the evaluation text taken out); KL to the
original in nats per token on the first {args.max_tokens} tokens of each text, "±" is half the range
over seeds. Method uniform.

{markdown_table((*header, "with text / to nearest"), lines)}"""


def main() -> None:
    """Measure what is missing and write the page."""
    parser = arguments("dense_text", __doc__)
    parser.add_argument("--seeds", type=int, default=2)
    args = parse(parser)
    bench = Bench.of(args)
    rows = Rows(work=args.work, name="dense_text", key=key_of)
    for row in rows.missing(wanted(args.seeds)):
        rows.add(measure_one(row, bench))
    write_page(args.output, [page(rows.all(), args)])


if __name__ == "__main__":
    main()

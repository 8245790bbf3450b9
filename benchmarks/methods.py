"""The methods as they come, on a well trained model, at equal stored bytes: the table of the README.

    python benchmarks/methods.py run [--part I/N]     measure what is missing
    python benchmarks/methods.py write                write benchmarks/methods.md

The model is the reference for conclusions: 62 M parameters, 6 layers of 32 experts, top 4, trained on 170 M tokens.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from harness import TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, spread, write_page

import moeq
from moeq.report.tables import markdown_table

BITS = 2.125
MIXTURE = "mixture/calibration.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "round to nearest": {"method": "uniform", "quantizer": "rtn"},
    "uniform": {"method": "uniform"},
    "gemq, matrix units, no router tuning": {"method": "gemq", "unit": "matrix", "router": "none"},
    "gemq": {"method": "gemq"},
    "alphaq": {"method": "alphaq"},
    "bitsmoe": {"method": "bitsmoe"},
    "tileq": {"method": "tileq"},
}
"""Row -> options; what is not named is the method's own."""


def key_of(row: Row) -> Any:
    """What tells a row from all others."""
    return row["name"], row["calibration"], row["seed"]


def measure_one(job: Row, bench: Bench) -> Row:
    """The row of a method."""
    text = bench.data / MIXTURE if job["calibration"] == "mixture" else bench.calibration
    options = bench.options(**METHODS[job["name"]], bits=BITS, seed=job["seed"], calibration=str(text))
    with bench.packed(**options) as (packed, report):
        row = {**job, "bits_per_weight": report.expert_bits_per_weight, "expert_bytes": report.expert_bytes}
        return row | {"seconds": report.seconds} | bench.measure(bench.open(packed))


def page(found: list[Row], args: Any) -> str:
    """The page."""
    lines = []
    for name in METHODS:
        for calibration in args.calibrations:
            rows = [row for row in found if (row["name"], row["calibration"]) == (name, calibration)]
            if rows:
                texts = (spread([row[f"{text}_kl"] for row in rows], 3) for text in TEXTS)
                perplexities = " / ".join(f"{statistics.fmean(r[f'{t}_perplexity'] for r in rows):.1f}" for t in TEXTS)
                mean = spread([mean_kl(row) for row in rows], 3)
                bits = f"{rows[0]['bits_per_weight']:.4f}"
                lines.append((name, calibration, str(len(rows)), bits, *texts, mean, perplexities))
    original = " / ".join(f"{found[0][f'{text}_reference_perplexity']:.1f}" for text in TEXTS)
    header = ("method", "calibration", "seeds", "stored bits", *(f"KL {text}" for text in TEXTS), "mean", "perplexity")
    return f"""# The methods on a well trained model

Made by `python benchmarks/methods.py run` (moeq {moeq.__version__}, torch {torch.__version__}), model
`{args.model.name}`, {BITS:g} stored bits per expert weight for all, calibration {args.nsamples} x {args.seqlen} tokens.
KL to the original in nats per token on {args.max_tokens} tokens of each text, windows of {args.seqlen} spread evenly
over it, float32; ± is half the range over seeds. Perplexity of {" / ".join(TEXTS)}; the original has
{original}.

{markdown_table(header, lines)}"""


def main() -> None:
    """Measure, or write the page."""
    parser = arguments("methods", __doc__, ("run", "write"))
    parser.set_defaults(model=Path("../shared/models/ref-qwen3moe-62m"), nsamples=128, max_tokens=20_480)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibrations", nargs="+", default=["c4", "mixture"])
    parser.add_argument("--only", nargs="+", default=list(METHODS), help="names of rows")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th row from the I-th on")
    args = parse(parser)
    part, parts = map(int, args.part.split("/"))
    rows = Rows(work=args.work, name="methods", key=key_of, part=str(part))
    wanted: list[Row] = [
        {"name": name, "calibration": calibration, "seed": seed}
        for seed in args.seeds
        for calibration in args.calibrations
        for name in args.only
    ]
    if args.what == "write":
        write_page(args.output, [page(rows.all(), args)])
        return
    bench = Bench.of(args, seqlen=args.seqlen, evenly=True)
    for job in rows.missing(wanted[part::parts]):
        rows.add(measure_one(job, bench))


if __name__ == "__main__":
    main()

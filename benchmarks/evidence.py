"""What the methods and their parts are worth on a well trained model: the rows behind docs/evidence.md.

    python benchmarks/evidence.py run [--part I/N] [--groups main budgets ...]     measure what is missing
    python benchmarks/evidence.py write                                  write benchmarks/evidence.md, docs/evidence.md

Every row is a whole run at the same stored bytes. Measured tables of costs are kept and serve all rows that may share
them, as `moeq measure` and `--costs` would. Rows that are done are copied to benchmarks/results.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from evidence_claims import claims_page
from evidence_rows import GROUPS, METHODS, TEXT_COSTS, wanted
from harness import TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, spread, top1, write_page

import moeq
from moeq.evals.tasks import minimal_pairs, read_pairs
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_tokenizer

MIXTURE = "mixture/calibration.jsonl"
PAIRS = 670
"""Minimal pairs of BLiMP for the main rows: ten of each paradigm."""


def key_of(row: Row) -> Any:
    """What tells a row from all others."""
    return row["model"], row["name"], row["calibration"], row["bits"], row["seed"]


def text_of(calibration: str, bench: Bench) -> str | None:
    """What `--calibration` gets."""
    c4, mixture = str(bench.calibration), str(bench.data / MIXTURE)
    return {"c4": c4, "mixture": mixture, "both": f"{c4}:0.5,{mixture}:0.5", "bundled": "bundled"}[calibration]


def costs_for(job: Row, options: dict[str, Any], bench: Bench) -> str | None:
    """The table of costs that a row needs, measured once for all rows that may share it."""
    fixed = ("bits", "router", "scope", "shares", "progressive", "solver", "effort", "tune", "compensate")
    if "method" not in options:
        return None
    recipe = Recipe(**{name: value for name, value in options.items() if name not in fixed})
    settled = recipe.settled()
    if options.get("progressive") or settled.cost is None:
        return None
    if not recipe.has_components:
        recipe = recipe.replace(candidates="1,2,3,4")
    elif recipe.quantizer == "gptq":
        recipe = recipe.replace(quantizer=None, candidates=None)
    asked = (job["calibration"], job["seed"]) if settled.cost in TEXT_COSTS else None
    own = ("trellis",) if settled.quantizer == "trellis" else ()  # costs of plain levels serve all other quantizers
    return str(bench.costs(recipe, (settled.cost, settled.unit, recipe.options_of_cost(), asked, *own)))


def measure_one(job: Row, bench: Bench) -> Row:
    """The row of a job."""
    chosen = METHODS[job["name"]]
    options = bench.options(**chosen, bits=job["bits"], seed=job["seed"])
    options["calibration"] = text_of(job["calibration"], bench)
    try:
        with bench.packed(**options, costs=costs_for(job, options, bench)) as (packed, report):
            model = bench.open(packed)
            row = {**job, "bits_per_weight": report.expert_bits_per_weight, "expert_bytes": report.expert_bytes}
            row |= {"seconds": report.seconds} | bench.measure(model)
            if job["group"] in ("main", "budgets"):
                pairs = [pair for file in sorted((bench.data / "blimp").rglob("*.jsonl")) for pair in read_pairs(file)]
                some = pairs[:: max(1, len(pairs) // PAIRS)]
                row["blimp"] = minimal_pairs(model, load_tokenizer(bench.model), some).accuracy
            return row
    except moeq.MoeqError as error:
        return {**job, "error": str(error)}


def lines_of(found: list[Row], base: list[Row]) -> list[tuple[str, ...]]:
    """A line for every name and calibration, in the order of the lists."""
    lines = []
    for name in METHODS:
        for calibration in ("bundled", "c4", "mixture", "both"):
            rows = [row for row in found if (row["name"], row["calibration"]) == (name, calibration)]
            good = [row for row in rows if "error" not in row]
            if rows and not good:
                lines.append((name, calibration, str(len(rows)), "cannot be reached", *[""] * (len(TEXTS) + 5)))
            if not good:
                continue
            kls = [mean_kl(row) for row in good]
            fair = [mean_kl(row) for row in base if row["calibration"] == calibration] or [
                mean_kl(row) for row in base if row["calibration"] == "both"
            ]
            lines.append(
                (
                    name,
                    calibration,
                    str(len(good)),
                    f"{good[0]['bits_per_weight']:.4f}",
                    *(spread([row[f"{text}_kl"] for row in good], 3) for text in TEXTS),
                    spread(kls, 3),
                    f"{statistics.fmean(kls) / statistics.fmean(fair):.2f}" if fair else "",
                    " / ".join(f"{statistics.fmean(r[f'{t}_perplexity'] for r in good):.1f}" for t in TEXTS),
                    top1(good),
                    "".join({f"{100 * row['blimp']:.1f} %" for row in good[:1] if "blimp" in row}),
                )
            )
    return lines


HEADER = ("method", "calibration", "seeds", "stored bits", *(f"KL {t}" for t in TEXTS), "mean KL", "/ uniform's")


def page(found: list[Row], args: Any) -> list[str]:
    """benchmarks/evidence.md."""
    large = [row for row in found if row["model"] == args.model.name]
    original = " / ".join(f"{large[0][f'{text}_reference_perplexity']:.1f}" for text in TEXTS)
    parts = [
        f"# Methods and their parts on a well trained model\n\nMade by `python benchmarks/evidence.py run` (moeq "
        f"{moeq.__version__}, torch {torch.__version__}), model `{args.model.name}`, {args.nsamples} x {args.seqlen} "
        f"tokens of calibration, KL to the original in nats per token on {args.max_tokens} tokens of each text in "
        f"windows of {args.seqlen} spread evenly over it, float32. Perplexity of {' / '.join(TEXTS)}; the original has "
        f"{original}. Where there are several seeds of the calibration text, ± is half their range. "
        f'`both` is half C4, half mixture. "/ uniform\'s" compares with uniform bits by gptq and the same text. '
        f"BLiMP: {PAIRS} pairs, first seed."
    ]
    for title, model, bits in sorted({(row["title"], row["model"], row["bits"]) for row in found}):
        rows = [row for row in found if (row["title"], row["model"], row["bits"]) == (title, model, bits)]
        base = [r for r in found if (r["name"], r["model"], r["bits"]) == ("uniform", model, bits) and "error" not in r]
        table = markdown_table((*HEADER, f"perplexity {' / '.join(TEXTS)}", "top-1", "BLiMP"), lines_of([*rows], base))
        where = "" if model == args.model.name else f", {model}"
        parts.append(f"## {title} at {bits:g} bits{where}\n\n{table}")
    return parts


def main() -> None:
    """Measure, or write the pages."""
    parser = arguments("evidence", __doc__, ("run", "write"))
    parser.set_defaults(model=Path("../shared/models/ref-qwen3moe-62m"), nsamples=128, max_tokens=20_480)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th row from the I-th on")
    args = parse(parser)
    part, parts = map(int, args.part.split("/"))
    rows = Rows(work=args.work, name="evidence", key=key_of, part=str(part))
    if args.what == "write":
        found = rows.all()
        write_page(args.output, page(found, args))
        Path("docs/evidence.md").write_text(claims_page(found, args.model.name), encoding="utf-8")
        return
    jobs = [job for job in wanted(args.groups, args.model.name) if not args.only or job["name"] in args.only]
    bench = Bench.of(args, seqlen=args.seqlen, evenly=True)
    for job in rows.missing(jobs)[part::parts]:
        rows.add(measure_one(job, bench))


if __name__ == "__main__":
    main()

"""Which allocation of bits keeps most quality, at equal stored bytes.

    python benchmarks/allocation.py run [--part I/N]     measure everything that is missing; parts may run side by side
    python benchmarks/allocation.py write                write benchmarks/allocation.md from what was measured

All methods get the same budget in stored bits per expert weight (scales, zeros and padding included), the same final
quantizer (gptq with gain matching) and the same calibration text. Results go to a JSON lines file per part; rows
that are done are copied to benchmarks/results.
"""

import statistics
from typing import Any

import torch
from harness import SEQLEN, TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, spread, top1, write_page

import moeq
from moeq.evals.tasks import minimal_pairs, read_pairs
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_tokenizer

BUDGETS = (1.5, 2.0, 2.5, 3.0, 3.5)
SEEDS = (0, 1, 2)
BEST_GAMMA = 10
"""The best of the sweep below by mean KL; that choice has seen the evaluation texts, so read it as an upper bound."""
SWEEP = (0, 1, 3, 10, 30, 100)


def alphaq(unit: str = "matrix", **options: Any) -> dict[str, Any]:
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return {"method": "alphaq", "unit": unit, "cost_options": text or None}


METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "pmq": {"method": "pmq"},
    "pmq, matrix units": {"method": "pmq", "unit": "matrix"},
    "alphaq gamma 0": alphaq(gamma=0),
    "alphaq gamma 1": alphaq(gamma=1),
    "alphaq best gamma": alphaq(gamma=BEST_GAMMA),
    "alphaq dataless gamma": alphaq(gamma="auto"),
    "alphaq dataless gamma, expert units": alphaq(unit="expert", gamma="auto"),
    "alphaq best gamma, alpha shuffled": alphaq(gamma=BEST_GAMMA, alpha="shuffled"),
    "alphaq best gamma, alpha reversed": alphaq(gamma=BEST_GAMMA, alpha="reversed"),
    "alphaq best gamma, measured noise": alphaq(gamma=BEST_GAMMA, noise="weights"),
    "gemq, no router tuning": {"method": "gemq", "router": "none"},
    "gemq": {"method": "gemq"},
    "gemq, matrix units, no router tuning": {"method": "gemq", "unit": "matrix", "router": "none"},
    "gemq progressive": {"method": "gemq", "progressive": True},
}
"""Row of the main table -> options beside budget, seed and calibration."""

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"alphaq gamma {gamma}": alphaq(gamma=gamma) for gamma in SWEEP},
    "fisher as in the paper (min-max perturbation, no floor)": {
        "method": "gemq",
        "router": "none",
        "cost_options": "perturb=paper,floor=0",
    },
    "fisher, gptq perturbation": {"method": "gemq", "router": "none", "cost_options": "perturb=gptq"},
    "fisher, no shares": {"method": "gemq", "router": "none", "shares": "none"},
    "fisher, matrix units, no shares": {"method": "gemq", "router": "none", "shares": "none", "unit": "matrix"},
    "fisher, full form, matrix units, no shares": {
        "method": "gemq",
        "router": "none",
        "shares": "none",
        "unit": "matrix",
        "cost_options": "form=full",
    },
    "fisher, full form with linear term, matrix units, no shares": {
        "method": "gemq",
        "router": "none",
        "shares": "none",
        "unit": "matrix",
        "cost_options": "form=full,linear=true",
    },
    "output error squared, matrix units": {
        "cost": "output-error",
        "cost_options": "mode=squared",
        "unit": "matrix",
        "scope": "global",
        "shares": "none",
        "solver": "auto",
    },
    "weight error, matrix units": {
        "cost": "weight-error",
        "unit": "matrix",
        "scope": "global",
        "shares": "none",
        "solver": "auto",
    },
    "gemq without 1 bit, no router tuning": {"method": "gemq", "router": "none", "candidates": "2,3,4"},
    "gemq, kl router tuning": {"method": "gemq", "router": "kl"},
    "gemq progressive, read literally": {"method": "gemq", "progressive": True, "round_context": True},
    "uniform, router tuning": {"method": "uniform", "router": "task"},
}
"""Ablations: one seed, two budgets."""
VARIANT_BUDGETS = (2.0, 2.5)
LADDER = (3.5, 3.0, 2.5, 2.0)
"""A progressive run goes through the last two of these that lie above its budget."""


def jobs() -> list[Row]:
    """The first seed of everything, then the other seeds of what depends on them most: budgets in order of interest."""
    order = sorted(BUDGETS, key=lambda bits: (abs(bits - 2.25), bits))
    first = [{"name": name, "bits": bits, "seed": SEEDS[0], "table": "main"} for bits in order for name in METHODS]
    more = [{"name": name, "bits": bits, "seed": 0, "table": "more"} for bits in VARIANT_BUDGETS for name in VARIANTS]
    rest = [
        {"name": name, "bits": bits, "seed": seed, "table": "main"}
        for bits in order
        for seed in SEEDS[1:]
        for name in METHODS
    ]
    return [*first[: 2 * len(METHODS)], *more, *first[2 * len(METHODS) :], *rest]


def options_of(job: Row, bench: Bench) -> dict[str, Any] | None:
    """Options of a row; None for a progressive run with nothing to go through."""
    options = dict((METHODS if job["table"] == "main" else VARIANTS)[job["name"]])
    if options.pop("progressive", False):
        earlier = [bits for bits in LADDER if bits > job["bits"]][-2:]
        if not earlier:
            return None
        options["progressive"] = ",".join(map(str, earlier))
    return bench.options(**options, bits=job["bits"], seed=job["seed"])


def costs_for(options: dict[str, Any], bench: Bench) -> str | None:
    """The table of costs that these options need, measured once for all budgets."""
    if options.get("progressive"):
        return None
    recipe = Recipe(**{name: value for name, value in options.items() if name != "bits"})
    settled = recipe.settled()
    if settled.cost is None:
        return None
    key = (settled.cost, settled.unit, recipe.options_of_cost(), recipe.seed if settled.cost in TEXT_COSTS else None)
    return str(bench.costs(recipe.replace(candidates="1,2,3,4"), key))


TEXT_COSTS = ("fisher", "output-error")


def measure_one(job: Row, bench: Bench, num_pairs: int) -> Row | None:
    """The row of a job."""
    options = options_of(job, bench)
    if options is None:
        return None
    try:
        with bench.packed(**options, costs=costs_for(options, bench)) as (packed, report):
            model = bench.open(packed)
            row = {**job, "bits_per_weight": report.expert_bits_per_weight, "seconds": report.seconds}
            row |= bench.measure(model)
            if job["table"] == "main" and job["seed"] == 0:
                pairs = [pair for file in sorted((bench.data / "blimp").rglob("*.jsonl")) for pair in read_pairs(file)]
                some = pairs[:: max(1, len(pairs) // num_pairs)]
                row["blimp"] = minimal_pairs(model, load_tokenizer(bench.model), some).accuracy
    except moeq.MoeqError as error:
        return {**job, "error": str(error)}
    return row


def key_of(job: Row) -> tuple[Any, ...]:
    """What tells a row from all others."""
    return (job["table"], job["name"], job["bits"], job["seed"])


def table(found: list[Row], which: str, bits: float) -> str:
    lines = []
    base = [mean_kl(r) for r in found if r["name"] == "uniform" and r["table"] == "main" and r["bits"] == bits]
    for name in METHODS if which == "main" else VARIANTS:
        rows = [r for r in found if (r["table"], r["name"], r["bits"]) == (which, name, bits) and "error" not in r]
        if not rows:
            continue
        kls = [mean_kl(r) for r in rows]
        line = [name, str(len(rows)), f"{rows[0]['bits_per_weight']:.4f}", spread(kls, 4)]
        line.append(f"{statistics.fmean(kls) / statistics.fmean(base):.3f}" if base else "")
        for text in TEXTS:
            line.append(spread([r[f"{text}_perplexity"] for r in rows], 2))
        line.append(top1(rows))
        line.append("".join(f"{100 * r['blimp']:.1f} %" for r in rows if "blimp" in r))
        lines.append(tuple(line))
    header = ("method", "seeds", "stored bits", "KL", "KL / uniform's", *(f"{t} ppl" for t in TEXTS), "top-1", "BLiMP")
    return markdown_table(header, lines)


def main() -> None:
    """Measure, or write the page."""
    parser = arguments("allocation", __doc__, ("run", "write"))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--pairs", type=int, default=500)
    args = parse(parser)
    part, parts = map(int, args.part.split("/"))
    rows = Rows(work=args.work, name="allocation", key=key_of, part=str(part))
    if args.what == "run":
        bench = Bench.of(args)
        for job in rows.missing(jobs()[part::parts]):
            row = measure_one(job, bench, args.pairs)
            if row is not None:
                rows.add(row)
        return
    found = rows.all()
    pages = [
        f"# Allocation: who gets the bits\n\nMade by `python benchmarks/allocation.py` (moeq {moeq.__version__}, torch "
        f"{torch.__version__}), model `{args.model.name}`. Budgets are stored bits per expert weight, all-in; every "
        f"method obeys the same number of bytes. Final quantizer of all: gptq, gain matched, group size 128, "
        f"{args.nsamples} x {SEQLEN} tokens of C4 (documents of the evaluation text taken out). Measured on the first "
        f"{args.max_tokens} tokens of each text in float32. KL is the mean over the three texts, in nats per token, to "
        "the original model; ± is half the range over calibration seeds. BLiMP: seed 0."
    ]
    pages += [f"## {bits:g} bits\n\n{table(found, 'main', bits)}" for bits in BUDGETS]
    pages += [f"## Variants at {bits:g} bits, one seed\n\n{table(found, 'more', bits)}" for bits in VARIANT_BUDGETS]
    write_page(args.output, pages)


if __name__ == "__main__":
    main()

"""Which allocation of bits keeps most quality, at equal stored bytes.

    python benchmarks/allocation.py run [--part I/N]     measure everything that is missing; parts may run side by side
    python benchmarks/allocation.py write                write benchmarks/allocation.md from what was measured

All methods get the same budget in stored bits per expert weight (scales, zeros and padding included), the same final
quantizer (gptq with gain matching) and the same calibration text. Results go to a JSON lines file per part; rows
that are done are copied to benchmarks/results. `--nsamples 64 --max-tokens 4096` is what the page has.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from uniform import BATCH, SEQLEN, TEXTS, clean_calibration

import moeq
from moeq.calibration.tokens import read_text, windows
from moeq.checkpoint.write import write_file_atomic
from moeq.codec import canonical
from moeq.evals import suite
from moeq.evals.reference import save_reference
from moeq.evals.tasks import minimal_pairs, read_pairs
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import measure

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
KNOWN = Path(__file__).parent / "results"
"""Rows that were measured before, with the same options as the page says."""
LADDER = (3.5, 3.0, 2.5, 2.0)
"""A progressive run goes through the last two of these that lie above its budget."""


def jobs() -> list[dict[str, Any]]:
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


def options_of(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any] | None:
    options = dict((METHODS if job["table"] == "main" else VARIANTS)[job["name"]])
    if options.pop("progressive", False):
        earlier = [bits for bits in LADDER if bits > job["bits"]][-2:]
        if not earlier:
            return None
        options["progressive"] = ",".join(map(str, earlier))
    common = {"calibration": str(args.work / "calibration.txt"), "nsamples": args.nsamples, "seqlen": SEQLEN}
    return {**common, **options, "bits": job["bits"], "seed": job["seed"], "device": args.device, "quality": False}


def costs_for(options: dict[str, Any], args: argparse.Namespace) -> str | None:
    """The table of costs that these options need, measured once for all budgets."""
    if options.get("progressive"):
        return None
    recipe = Recipe(**{name: value for name, value in options.items() if name != "bits"})
    settled = recipe.settled()
    if settled.cost is None:
        return None
    key = (settled.cost, settled.unit, recipe.options_of_cost(), recipe.seed if settled.cost in TEXT_COSTS else None)
    path = args.work / f"costs-{zlib.crc32(repr(key).encode()):08x}.json"
    if not path.exists():
        table = measure.run(args.model, recipe.replace(candidates="1,2,3,4"))
        write_file_atomic(path, canonical(table.to_dict()))
    return str(path)


TEXT_COSTS = ("fisher", "output-error")


def measure_one(job: dict[str, Any], args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any] | None:
    options = options_of(job, args)
    if options is None:
        return None
    options["costs"] = costs_for(options, args)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        packed = Path(scratch) / "packed"
        report = moeq.quantize(args.model, packed, **options)
        model = load_any(packed, args.device, torch.float32)
        result = {**job, "bits_per_weight": report.expert_bits_per_weight, "seconds": report.seconds}
        for name, windows_ in rows.items():
            metrics, tokens = suite.compare_all(
                model, args.work / f"reference-{name}.safetensors", windows_, BATCH, None
            )
            result |= {f"{name}_{key}": value for key, value in metrics.items()} | {f"{name}_tokens": tokens}
        if job["table"] == "main" and job["seed"] == 0:
            tokenizer = load_tokenizer(args.model)
            result["blimp"] = minimal_pairs(model, tokenizer, pairs(args)).accuracy
    return result


def pairs(args: argparse.Namespace) -> list[Any]:
    found = [pair for file in sorted((args.data / "blimp").rglob("*.jsonl")) for pair in read_pairs(file)]
    return found[:: max(1, len(found) // args.pairs)]


def open_texts(args: argparse.Namespace) -> dict[str, Any]:
    """Windows of every held-out text; the calibration text and the original's answers are made where they lack."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(args.model)
    rows = {
        name: windows(tokenizer, read_text(args.data / path), SEQLEN, max_tokens=args.max_tokens)
        for name, path in TEXTS.items()
    }
    prepare(args, rows)
    return rows


def prepare(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    clean = args.work / "calibration.txt"
    if not clean.exists():
        clean_calibration(args.data, clean)
    model = load_any(args.model, args.device, torch.float32)
    for name, windows_ in rows.items():
        path = args.work / f"reference-{name}.safetensors"
        if not path.exists():
            save_reference(model, windows_, path, batch_size=BATCH)


def run(args: argparse.Namespace) -> None:
    part, parts = map(int, args.part.split("/"))
    rows = open_texts(args)
    log = args.work / f"results-{part}.jsonl"
    done = {key_of(result) for result in results(args)}
    for index, job in enumerate(jobs()):
        if index % parts != part or key_of(job) in done:
            continue
        try:
            result = measure_one(job, args, rows)
        except moeq.MoeqError as error:
            result = {**job, "error": str(error)}
        if result is None:
            continue
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(job, result.get("error") or f"KL {mean_kl(result):.5f}", file=sys.stderr, flush=True)


def key_of(job: dict[str, Any]) -> tuple[Any, ...]:
    return (job["table"], job["name"], job["bits"], job["seed"])


def results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What was measured, now or before, each row once."""
    rows = (
        json.loads(line)
        for file in (*KNOWN.glob("allocation.jsonl"), *sorted(args.work.glob("results-*.jsonl")))
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    return list({key_of(row): row for row in rows}.values())


def mean_kl(result: dict[str, Any]) -> float:
    return statistics.fmean(result[f"{name}_kl"] for name in TEXTS)


def spread(values: list[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(found: list[dict[str, Any]], which: str, bits: float) -> str:
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
        line.append(f"{100 * statistics.fmean(r[f'{t}_top1_agreement'] for r in rows for t in TEXTS):.1f} %")
        line.append("".join(f"{100 * r['blimp']:.1f} %" for r in rows if "blimp" in r))
        lines.append(tuple(line))
    header = ("method", "seeds", "stored bits", "KL", "KL / uniform's", *(f"{t} ppl" for t in TEXTS), "top-1", "BLiMP")
    return markdown_table(header, lines)


def write(args: argparse.Namespace) -> None:
    found = results(args)
    parts = [
        f"# Allocation: who gets the bits\n\nMade by `python benchmarks/allocation.py` (moeq {moeq.__version__}, torch "
        f"{torch.__version__}), model `{args.model.name}`. Budgets are stored bits per expert weight, all-in; every "
        f"method obeys the same number of bytes. Final quantizer of all: gptq, gain matched, group size 128, "
        f"{args.nsamples} x {SEQLEN} tokens of C4 (documents of the evaluation text taken out). Measured on the first "
        f"{args.max_tokens} tokens of each text in float32. KL is the mean over the three texts, in nats per token, to "
        "the original model; ± is half the range over calibration seeds. BLiMP: seed 0."
    ]
    for bits in BUDGETS:
        parts.append(f"## {bits:g} bits\n\n{table(found, 'main', bits)}")
    for bits in VARIANT_BUDGETS:
        parts.append(f"## Variants at {bits:g} bits, one seed\n\n{table(found, 'more', bits)}")
    notes = args.output.with_name("allocation_notes.md")  # what the figures say, by hand
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").strip())
    args.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-22m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/allocation"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/allocation.md"))
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "run":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        run(args)
    else:
        write(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Do the predicted costs of single matrices add up to what a whole plan does to the model?

    python benchmarks/additivity.py --output benchmarks/additivity.md

Random plans of equal stored bytes (every matrix 1 to 4 bits) are carried out with rtn and measured on held-out text;
each cost's predicted sum is compared in rank with the measured KL and with the measured rise of the loss.
Costs are measured with rtn too. Results are kept in a JSON lines file, so an interrupted run goes on.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers.utils import logging
from uniform import BATCH, SEQLEN, TEXTS, clean_calibration

import moeq
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, Inventory, Plan, expert_bytes
from moeq.calibration.tokens import read_text, windows
from moeq.evals import suite
from moeq.evals.reference import save_reference
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_any, load_tokenizer
from moeq.spec import QuantSpec, stored_bytes
from moeq.stages import measure

WIDTHS = (1, 2, 3, 4)
COSTS = {
    "weight error": ("weight-error", ""),
    "spectral tail, dataless gamma": ("spectral-tail", "gamma=auto"),
    "spectral tail, gamma 0": ("spectral-tail", "gamma=0"),
    "output error, squared": ("output-error", "mode=squared,perturb=rtn"),
    "output error, PMQ's product": ("output-error", "perturb=rtn"),
    "fisher, diagonal (GEMQ)": ("fisher", ""),
    "fisher, full": ("fisher", "form=full"),
    "fisher, full, with linear term": ("fisher", "form=full,linear=true"),
    "fisher, full, labels drawn from the model": ("fisher", "form=full,labels=sampled"),
}


def random_plan(inventory: Inventory, bits: float, seed: int) -> Plan:
    """Random widths, brought to the budget by random steps up or down."""
    generator = random.Random(seed)
    specs = tuple(QuantSpec(bits=b, levels="half" if b <= 2 else "asym") for b in WIDTHS)
    units = [shape for _, shape in inventory.units()]
    sizes = [[stored_bytes(spec, shape) for spec in specs] for shape in units]
    chosen = [generator.randrange(len(specs)) for _ in units]
    limit = int(bits * inventory.expert_parameters / 8) - 64 * len(inventory.layers) * 64
    total = sum(row[column] for row, column in zip(sizes, chosen, strict=True))
    order = list(range(len(units)))
    while total > limit:
        unit = generator.choice(order)
        if chosen[unit]:
            total += sizes[unit][chosen[unit] - 1] - sizes[unit][chosen[unit]]
            chosen[unit] -= 1
    generator.shuffle(order)
    for unit in order:
        if chosen[unit] + 1 < len(specs) and total + sizes[unit][chosen[unit] + 1] - sizes[unit][chosen[unit]] <= limit:
            total += sizes[unit][chosen[unit] + 1] - sizes[unit][chosen[unit]]
            chosen[unit] += 1
    rest = iter(chosen)
    experts = tuple(
        tuple(tuple(next(rest) for _ in layer.projections) for _ in range(layer.num_experts))
        for layer in inventory.layers
    )
    draft = Plan(model_hash=inventory.model_hash, method="uniform", specs=specs, experts=experts, expert_bytes=0)
    return replace(draft, expert_bytes=expert_bytes(draft, inventory))


def predicted(table: CostTable, plan: Plan) -> float:
    """Sum of the costs of what the plan chose."""
    columns = {spec.bits: column for column, spec in enumerate(table.candidates)}
    flat = [plan.specs[index].bits for layer in plan.experts for expert in layer for index in expert]
    return math.fsum(row[columns[bits]] for row, bits in zip(table.costs, flat, strict=True))


def tables(args: argparse.Namespace) -> dict[str, CostTable]:
    found = {}
    for name, (cost, options) in COSTS.items():
        path = args.work / f"{name.replace(' ', '-').replace(',', '')}.json"
        if not path.exists():
            recipe = Recipe(
                cost=cost,
                cost_options=options or None,
                unit="matrix",
                candidates=",".join(map(str, WIDTHS)),
                calibration=str(args.work / "calibration.txt"),
                nsamples=args.nsamples,
                seqlen=SEQLEN,
                quantizer="rtn",
            )
            measure.run(args.model, recipe).save(path)
        found[name] = CostTable.load(path)
    return found


def carry_out(plan: Plan, args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        file = Path(scratch) / "plan.json"
        plan.save(file)
        moeq.quantize(
            args.model, Path(scratch) / "packed", plan=str(file), quantizer="rtn", quality=False, device="cpu"
        )
        model = load_any(Path(scratch) / "packed", "cpu", torch.float32)
        kls, rises = [], []
        for name, windows_ in rows.items():
            metrics, _ = suite.compare_all(model, args.work / f"reference-{name}.safetensors", windows_, BATCH, None)
            kls.append(metrics["kl"])
            rises.append(math.log(metrics["perplexity"] / metrics["reference_perplexity"]))
    return {"kl": sum(kls) / len(kls), "rise": sum(rises) / len(rises)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-22m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/additivity"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/additivity.md"))
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=4096)
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    clean_calibration(args.data, args.work / "calibration.txt")
    tokenizer = load_tokenizer(args.model)
    rows = {
        name: windows(tokenizer, read_text(args.data / path), SEQLEN, max_tokens=args.max_tokens)
        for name, path in TEXTS.items()
    }
    original = load_any(args.model, "cpu", torch.float32)
    for name, windows_ in rows.items():
        path = args.work / f"reference-{name}.safetensors"
        if not path.exists():
            save_reference(original, windows_, path, batch_size=BATCH)
    inventory, _ = read_inventory(args.model)
    costs = tables(args)
    log = args.work / "plans.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for seed in range(len(done), args.plans):
        plan = random_plan(inventory, args.bits, seed)
        done.append({"bytes": plan.expert_bytes, **carry_out(plan, args, rows)})
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(seed, done[-1], file=sys.stderr, flush=True)
    plans = [random_plan(inventory, args.bits, seed) for seed in range(args.plans)]
    lines = []
    for name, table in costs.items():
        sums = [predicted(table, plan) for plan in plans]
        against = [float(spearmanr(sums, [row[key] for row in done]).statistic) for key in ("kl", "rise")]
        lines.append((name, *(f"{value:+.2f}" for value in against)))
    spread = max(row["bytes"] for row in done) / min(row["bytes"] for row in done) - 1
    text = f"""# Do costs add up?

Made by `python benchmarks/additivity.py` (moeq {moeq.__version__}), model `{args.model.name}`: {args.plans} random
plans of equal stored bytes (within {100 * spread:.2f} %, {args.bits:g} bits per expert weight, every matrix 1 to 4
bits), carried out with rtn, measured on {args.max_tokens} tokens of each of three texts. Costs of single matrices
were measured with rtn on {args.nsamples} x {SEQLEN} tokens of C4. Measured KL ranges from
{min(r["kl"] for r in done):.4f} to {max(r["kl"] for r in done):.4f} nats. Spearman's correlation of the predicted sum
with what was measured; with {args.plans} plans, chance exceeds {1.96 / math.sqrt(args.plans - 1):.2f} in 5 % of cases.

{markdown_table(("cost, summed over matrices", "KL", "rise of the loss"), lines)}
"""
    args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

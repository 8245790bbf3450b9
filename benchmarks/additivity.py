"""Do the predicted costs of single matrices add up to what a whole plan does to the model?

    python benchmarks/additivity.py --output benchmarks/additivity.md

Random plans of equal stored bytes (every matrix 1 to 4 bits) are carried out with rtn and measured on held-out text;
each cost's predicted sum is compared in rank with the measured KL and with the measured rise of the loss.
Costs are measured with rtn too. Results are kept in a JSON lines file, so an interrupted run goes on.
"""

import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import SEQLEN, TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, write_page
from scipy.stats import spearmanr

import moeq
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, Inventory, Plan, expert_bytes
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.spec import QuantSpec, stored_bytes

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


def tables(bench: Bench) -> dict[str, CostTable]:
    """Every cost of every matrix."""
    found = {}
    for name, (cost, options) in COSTS.items():
        recipe = Recipe(
            cost=cost,
            cost_options=options or None,
            unit="matrix",
            candidates=",".join(map(str, WIDTHS)),
            calibration=str(bench.calibration),
            nsamples=bench.nsamples,
            seqlen=SEQLEN,
            quantizer="rtn",
        )
        found[name] = CostTable.load(bench.costs(recipe, name))
    return found


def carry_out(plan: Plan, bench: Bench) -> Row:
    """What a plan does to the model."""
    with tempfile.TemporaryDirectory(dir=bench.work) as scratch:
        file = Path(scratch) / "plan.json"
        plan.save(file)
        with bench.packed(plan=str(file), quantizer="rtn", quality=False, device=bench.device) as (packed, _):
            row = bench.measure(bench.open(packed))
    rises = [math.log(row[f"{name}_perplexity"] / row[f"{name}_reference_perplexity"]) for name in TEXTS]
    return {"bytes": plan.expert_bytes, "kl": mean_kl(row), "rise": sum(rises) / len(rises)}


def key_of(row: Row) -> Any:
    """What tells a plan from the others."""
    return row["seed"]


def main() -> None:
    """Measure what is missing and write the page."""
    parser = arguments("additivity", __doc__)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--bits", type=float, default=2.5)
    args = parse(parser)
    bench, rows = Bench.of(args), Rows(work=args.work, name="additivity", key=key_of)
    inventory, _ = read_inventory(args.model)
    costs = tables(bench)
    plans = [random_plan(inventory, args.bits, seed) for seed in range(args.plans)]
    for job in rows.missing([{"seed": seed} for seed in range(args.plans)]):
        rows.add(job | carry_out(plans[job["seed"]], bench))
    done = sorted(rows.all(), key=key_of)
    lines = []
    for name, table in costs.items():
        sums = [predicted(table, plan) for plan in plans]
        against = [float(spearmanr(sums, [row[key] for row in done]).statistic) for key in ("kl", "rise")]
        lines.append((name, *(f"{value:+.2f}" for value in against)))
    spread = max(row["bytes"] for row in done) / min(row["bytes"] for row in done) - 1
    page = f"""# Do costs add up?

Made by `python benchmarks/additivity.py` (moeq {moeq.__version__}), model `{args.model.name}`: {args.plans} random
plans of equal stored bytes (within {100 * spread:.2f} %, {args.bits:g} bits per expert weight, every matrix 1 to 4
bits), carried out with rtn, measured on {args.max_tokens} tokens of each of three texts. Costs of single matrices
were measured with rtn on {args.nsamples} x {SEQLEN} tokens of C4. Measured KL ranges from
{min(r["kl"] for r in done):.4f} to {max(r["kl"] for r in done):.4f} nats. Spearman's correlation of the predicted sum
with what was measured; with {args.plans} plans, chance exceeds {1.96 / math.sqrt(args.plans - 1):.2f} in 5 % of cases.

{markdown_table(("cost, summed over matrices", "KL", "rise of the loss"), lines)}"""
    write_page(args.output, [page])


if __name__ == "__main__":
    main()

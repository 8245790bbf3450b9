"""BitsMoE against its own ablations and against grouped methods, at equal stored bytes, bases charged.

    python benchmarks/bitsmoe.py run         measure everything that is missing
    python benchmarks/bitsmoe.py surrogate   twenty allocations of one budget: predicted cost against measured KL
    python benchmarks/bitsmoe.py write       write benchmarks/bitsmoe.md from what was measured

Texts, tokens and measures are those of benchmarks/harness.py.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    BATCH,
    SEQLEN,
    TEXTS,
    Bench,
    Row,
    Rows,
    arguments,
    mean_kl,
    parse,
    top1,
    write_page,
)
from scipy.stats import spearmanr
from torch import nn

import moeq
from moeq.allocation import plans as allocate
from moeq.arch.inventory import read_inventory
from moeq.costs.component_table import ComponentTable
from moeq.evals.forward import batches
from moeq.layouts.spectral.shape import basis_bytes
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table

BUDGETS = (2.0, 3.0, 2.5, 1.6)
SEEDS = (0, 1, 2)


def spectral(cost: str = "joint=false", **options: Any) -> dict[str, Any]:
    """`bitsmoe` with separate bases of gate and up, as in the paper, unless told otherwise."""
    return {"method": "bitsmoe", "cost_options": cost if "joint" in cost else f"joint=false,{cost}", **options}


METHODS: dict[str, dict[str, Any]] = {
    "bitsmoe": spectral(),
    "uniform, grouped, gptq": {"method": "uniform"},
    "uniform, grouped, rtn": {"method": "uniform", "quantizer": "rtn"},
    "gemq, grouped, gptq, no router tuning": {"method": "gemq", "router": "none"},
    "gemq, grouped, rtn, no router tuning": {"method": "gemq", "router": "none", "quantizer": "rtn"},
    "dropping counts once (the paper's)": spectral("drop=1"),
    "dropping counts twice": spectral("drop=2"),
    "dropping counts six times": spectral("drop=6"),
    "importance by routing (the paper's)": spectral("importance=routing"),
    "no activation term": spectral("activation=false"),
    "no energy term": spectral("energy=false"),
    "uniform bits in the spectral domain": spectral("activation=false,energy=false"),
    "identity basis": spectral("basis=identity"),
    "budget per layer": spectral(scope="layer"),
    "16-bit basis": spectral("basis_bits=16"),
    "released quantizer": spectral(quantizer="alternating"),
    "no gain": spectral(gain=False),
    "error feedback": spectral(quantizer="gptq"),
    "without 0 bits": spectral(candidates="1,2,3,4,6,8"),
    "joint basis of gate and up (the default)": spectral("joint=true"),
    "basis for the inputs": spectral("metric=inputs"),
    "exact errors": spectral("errors=exact"),
    "second basis not charged": spectral(),
}
SEEDED = (
    "bitsmoe",
    "joint basis of gate and up (the default)",
    "uniform, grouped, gptq",
    "gemq, grouped, gptq, no router tuning",
)
"""Rows that are measured with several seeds of the calibration text."""


def costs_for(options: dict[str, Any], bench: Bench) -> str | None:
    """The costs that these options need, measured once."""
    wanted = {key: value for key, value in options.items() if key not in ("bits", "scope")}
    recipe = Recipe(**wanted)
    if recipe.settled().cost is None:
        return None
    if recipe.has_components and recipe.candidates is not None:
        wanted.pop("candidates")  # the table knows all widths
    if recipe.quantizer == "gptq" or (recipe.settled().quantizer == "gptq" and not recipe.has_components):
        wanted.pop("quantizer", None)
    recipe = Recipe(**wanted)
    if not recipe.has_components:
        recipe = recipe.replace(candidates="1,2,3,4")
    return str(bench.costs(recipe, sorted(wanted.items())))


def spared(bench: Bench) -> float:
    """Bits per expert weight that a basis for both gate and up saves."""
    layer = read_inventory(bench.model)[0].layers[0]
    hidden = layer.shapes["down"][0]
    weights = layer.num_experts * sum(rows * columns for rows, columns in layer.shapes.values())
    return 8 * basis_bytes(8, hidden, hidden) / weights


def jobs(budgets: list[float]) -> list[Row]:
    """Name, bits and seed of every row: the first seed of everything, then the others."""
    first = [{"name": name, "bits": bits, "seed": SEEDS[0]} for bits in budgets for name in METHODS]
    more = [{"name": name, "bits": bits, "seed": s} for bits in budgets for s in SEEDS[1:] for name in SEEDED]
    return first + more


def measure_one(job: Row, bench: Bench) -> Row:
    """The row of a job."""
    name, bits = job["name"], job["bits"]
    options = bench.options(**METHODS[name], seed=job["seed"])
    bits += spared(bench) if name == "second basis not charged" else 0
    try:
        with bench.packed(**options, bits=bits, costs=costs_for(options, bench)) as (packed, report):
            measured = bench.measure(bench.open(packed))
            return {**job, "bits_per_weight": report.expert_bits_per_weight} | measured
    except moeq.MoeqError as error:
        return {**job, "error": str(error)}


def block_error(packed: Path, bench: Bench) -> float:
    """Mean over MoE layers of |z' - z|^2 / |z|^2, z the experts' answers to what the original model asks them."""
    stock, rounded = (bench.open(path) for path in (bench.model, packed))
    paths = [layer.path for layer in read_inventory(bench.model)[0].layers]
    sums = torch.zeros(len(paths), 2, dtype=torch.float64)

    def compare(index: int, _: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        other = rounded.get_submodule(paths[index])(*inputs)
        sums[index, 0] += (other - output).double().square().sum()
        sums[index, 1] += output.double().square().sum()

    for index, path in enumerate(paths):
        stock.get_submodule(path).register_forward_hook(partial(compare, index))
    with torch.inference_mode():
        for ids_NT in bench.windows.values():
            for _, batch in batches(ids_NT, BATCH):
                stock(input_ids=batch, use_cache=False)
    return float((sums[:, 0] / sums[:, 1]).mean())


def surrogate_key(row: Row) -> Any:
    """What tells an allocation from the others."""
    return row["kind"], row["strength"]


def surrogate(bench: Bench, log: Rows, bits: float = 2.0, plans: int = 20) -> None:
    """Allocations by factors that are more and more unlike the true ones, all of the same stored bytes."""
    options = bench.options(**METHODS["bitsmoe"], bits=bits)
    costs = costs_for(options, bench)
    assert costs is not None
    recipe = Recipe(**options, costs=costs).settled()
    inventory, headers = read_inventory(bench.model)
    kinds = ("noise", "energy", "power", "random")
    wanted = [{"kind": kinds[seed % 4], "strength": 0.5 * (1 + seed // 4), "seed": seed} for seed in range(plans)]
    for job in log.missing(wanted):
        plan, predicted = distorted(job, Path(costs), recipe, inventory, headers)
        with tempfile.TemporaryDirectory(dir=bench.work) as scratch:
            file = Path(scratch) / "plan.json"
            plan.save(file)
            text = {"quality": False, "device": bench.device, "quantizer": "rtn"}
            with bench.packed(plan=str(file), costs=costs, **text) as (packed, _):
                row = {"kind": job["kind"], "strength": job["strength"], "bytes": plan.expert_bytes}
                row |= {"predicted": predicted, "block_error": block_error(packed, bench)}
                log.add(row | bench.measure(bench.open(packed)))


def distorted(job: Row, costs: Path, recipe: Recipe, inventory: Any, headers: Any) -> tuple[Any, float]:
    """A plan by factors that are not the true ones, and what the true ones predict of it."""
    table, true = ComponentTable(costs), ComponentTable(costs)
    random, kind, strength = np.random.default_rng(job["seed"]), job["kind"], job["strength"]

    def factors(index: int, projection: str) -> Any:
        costs_of = true.layer(index, projection)
        weight = costs_of.weight_EH.numpy().astype(np.float64)
        if kind == "noise":
            weight = weight * np.exp(strength * random.standard_normal(weight.shape))
        elif kind == "energy":
            weight = costs_of.energy_EH.numpy() ** strength
        elif kind == "power":
            weight = weight**strength
        else:
            weight = np.exp(strength * random.standard_normal(weight.shape))
        return weight.astype(np.float32) / float(weight.mean())

    table.weights = factors  # type: ignore[method-assign]
    plan = allocate.run(inventory, headers, recipe, table=table)
    predicted = 0.0
    for index, layer in enumerate(inventory.layers):
        for name, widths in plan.widths(index, layer).items():
            part = true.layer(index, name)
            curve = {0: true.facts.drop[index][name]} | {
                spec.bits: loss for spec, loss in zip(true.candidates, part.curve_C.tolist(), strict=True)
            }
            lost = np.vectorize(curve.get)(widths)
            predicted += float((part.weight_EH.numpy() * lost).sum(dtype=np.float64))
    return plan, predicted


def key_of(row: Row) -> tuple[str, float, int]:
    """What tells a row from all others."""
    return row["name"], row["bits"], row.get("seed", SEEDS[0])


def table_of(found: list[Row], bits: float) -> str:
    """The rows of one budget, means over seeds."""
    lines = []
    base = [mean_kl(row) for row in found if key_of(row) == ("bitsmoe", bits, SEEDS[0])]
    for name in METHODS:
        mine = sorted((row for row in found if key_of(row)[:2] == (name, bits)), key=key_of)
        if not mine:
            continue
        if "error" in mine[0]:
            lines.append((name, "", "cannot be reached", "", "", ""))
            continue
        kls = [mean_kl(row) for row in mine]
        spread = f" ({min(kls):.4f} to {max(kls):.4f})" if len(kls) > 1 else ""
        texts = " / ".join(f"{statistics.fmean(row[f'{text}_perplexity'] for row in mine):.2f}" for text in TEXTS)
        lines.append(
            (
                name,
                f"{mine[0]['bits_per_weight']:.4f}",
                f"{statistics.fmean(kls):.4f}{spread}",
                f"{kls[0] / base[0]:.2f}" if base else "",
                texts,
                top1(mine),
            )
        )
    header = ("method", "stored bits", "KL", "KL / bitsmoe's", f"perplexity {' / '.join(TEXTS)}", "top-1")
    return f"## {bits:g} bits\n\n{markdown_table(header, lines)}"


def write(args: Any, found: list[Row], pairs: list[Row]) -> None:
    """The page."""
    parts = [
        f"# BitsMoE: components of a shared basis\n\nMade by `python benchmarks/bitsmoe.py run` (moeq "
        f"{moeq.__version__}, torch {torch.__version__}), model `{args.model.name}`, {args.nsamples} x {SEQLEN} tokens "
        "of C4 for costs; where a range is given, mean and range of three seeds of that text, else the first of them. "
        "The ratio compares first seeds. Budgets are stored bits per expert weight: codes, scales, bases, maps, tables "
        f"and padding. KL in nats per token to the original, mean over three texts, {args.max_tokens} tokens of each, "
        "float32. Rows not named grouped are `bitsmoe` with "
        "a basis each for gate and up, as in the paper, and the change that they name."
    ]
    parts += [table_of(found, bits) for bits in sorted(BUDGETS)]
    if pairs:
        kls = [mean_kl(row) for row in pairs]
        rank = spearmanr([row["predicted"] for row in pairs], kls).statistic
        blocks = [row["block_error"] for row in pairs]
        predicts, follows = (
            float(spearmanr(side, blocks).statistic) for side in ([row["predicted"] for row in pairs], kls)
        )
        spread = max(row["bytes"] for row in pairs) / min(row["bytes"] for row in pairs) - 1
        parts.append(
            f"## Does the predicted cost predict?\n\n{len(pairs)} allocations of 2 bits (stored bytes within "
            f"{100 * spread:.2f} %) by factors that differ from the true ones: times noise, powers of them, the "
            "energy alone, pure noise; each projection of a layer scaled to the same mean, so that none of them is the "
            "default's plan. Spearman's correlation of the predicted sum with KL on held-out text: "
            f"**{rank:.3f}** (KL from {min(kls):.4f} to {max(kls):.4f}). With the measured error of the layers' "
            "answers (mean over layers of the relative squared error, each asked what the original model asks it): "
            f"**{predicts:.3f}**; that error with KL: {follows:.3f}."
        )
    write_page(args.output, parts)


def main() -> None:
    """Measure, or write the page."""
    parser = arguments("bitsmoe", __doc__, ("run", "surrogate", "write"))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    args = parse(parser)
    rows = Rows(work=args.work, name="bitsmoe", key=key_of)
    pairs = Rows(work=args.work, name="bitsmoe_surrogate", key=surrogate_key)
    if args.what == "write":
        write(args, rows.all(), pairs.all())
    elif args.what == "surrogate":
        surrogate(Bench.of(args), pairs)
    else:
        bench = Bench.of(args)
        for job in rows.missing(jobs(args.budgets)):
            rows.add(measure_one(job, bench))


if __name__ == "__main__":
    main()

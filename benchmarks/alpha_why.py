"""Why bits by alpha lose: rank correlations of alpha with measured harm, and whom it starves.

    python benchmarks/alpha_why.py --costs FILE [--model MODEL] [--bits 2.125]

FILE is what `moeq measure --method gemq` made of the model: harm of rounding each matrix, by loss gradients. Alpha, and
the plan by it, need the weights alone.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from moeq.allocation import plans
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, Plan
from moeq.costs.component_table import load_table
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.stages import measure

Array = NDArray[np.float64]


def harm(table: CostTable, bits: int) -> Array:
    """What rounding each matrix to `bits` does."""
    at = [spec.bits for spec in table.candidates].index(bits)
    return np.array([row[at] for row in table.costs], dtype=np.float64)


def widths(plan: Plan, table: CostTable) -> Array:
    """Code bits of each matrix, in the order of a table's units."""
    found = []
    for unit in table.units:
        names = ("gate", "up", "down")
        found.append(plan.spec(unit, names).bits)
    return np.array(found, dtype=np.float64)


def within(cells: list[tuple[int, str]], left: Array, right: Array) -> float:
    """Mean over cells (layer and projection) of the rank correlation inside."""
    found = []
    for cell in sorted(set(cells)):
        inside = [at for at, each in enumerate(cells) if each == cell]
        value = spearmanr(left[inside], right[inside]).statistic
        found.append(0.0 if np.isnan(value) else float(value))
    return statistics.fmean(found)


def main() -> None:
    """Two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-62m"))
    parser.add_argument("--bits", type=float, default=2.125)
    args = parser.parse_args()
    inventory, headers = read_inventory(args.model)
    fisher: Any = load_table(args.costs)
    tail: Any = measure.run(args.model, Recipe(method="alphaq", device="cpu"))
    assert list(fisher.units) == list(tail.units)
    cells = [(unit.layer, str(unit.projection)) for unit in fisher.units]
    alpha = np.array(tail.statistics["alpha"], dtype=np.float64)
    hurt = harm(fisher, 2)
    facts = {
        "alpha": alpha,
        "-alpha (a heavy tail first: AlphaQ)": -alpha,
        "weights' variance": np.array(tail.statistics["variance"], dtype=np.float64),
        "tokens routed": np.array(fisher.statistics["tokens"], dtype=np.float64),
        "gradient": np.array(fisher.statistics["gradient"], dtype=np.float64),
    }
    lines = [
        (name, f"{spearmanr(value, hurt).statistic:.2f}", f"{within(cells, value, hurt):.2f}")
        for name, value in facts.items()
    ]
    print(
        markdown_table(
            ("rank correlation with the harm of 2 bits", "all matrices", "inside layer and projection"), lines
        )
    )
    by = {}
    for name, table, options in (("alphaq", tail, {}), ("gemq", fisher, {"calibration": "-", "router": "none"})):
        recipe = Recipe(method=name, unit="matrix", bits=args.bits, **options).settled()
        by[name] = widths(plans.run(inventory, headers, recipe, table=table), table)
    lines = []
    for cell in sorted(set(cells)):
        inside = [at for at, each in enumerate(cells) if each == cell]
        lines.append(
            (
                str(cell[0]),
                cell[1],
                f"{alpha[inside].mean():.2f}",
                f"{hurt[inside].sum() / hurt.sum():.3f}",
                *(f"{by[name][inside].mean():.2f}" for name in by),
                f"{spearmanr(alpha[inside], hurt[inside]).statistic:.2f}",
            )
        )
    header = ("layer", "projection", "mean alpha", "share of harm", "bits, alphaq", "bits, gemq", "alpha ~ harm inside")
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()

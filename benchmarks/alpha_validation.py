"""Does the tail of a matrix's spectrum say how much rounding it hurts? Measured on a small trained model.

    python benchmarks/alpha_validation.py --model MODEL --data DATA --output benchmarks/alpha_validation.md

Rounds a part of the experts to 2 bits in memory, leaves the rest as it is, and compares the measured harm with what
alpha, noise and their product predicted. Parts: all experts of one layer and projection; equal numbers of matrices
of similar score; single matrices drawn from every layer and projection. Results go to a JSON lines file first
(--log), so that an interrupted run goes on where it stopped.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import BATCH, SEQLEN, Bench, Row, Rows, arguments, parse, write_page
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import moeq
from moeq.arch.inventory import read_inventory
from moeq.checkpoint.read import Reader
from moeq.costs import spectra
from moeq.costs.base import LayerView
from moeq.costs.spectral_tail import SPREAD, SpectralTail, gamma_for_spread, tail_scores
from moeq.costs.weight_error import WeightError
from moeq.evals import suite
from moeq.evals.forward import evaluating
from moeq.evals.observe import observe
from moeq.evals.reference import save_reference
from moeq.format.records import dequantize
from moeq.quantizers.registry import make_quantizer
from moeq.report.tables import markdown_table
from moeq.spec import QuantSpec, Unit

HALVES = ("c4", "wikitext2")
"""The texts that harm is measured on, half the tokens each."""
GAMMAS = (1.0, 12.0, 40.0)
BINS = 12
BINNED = ("tail", "noise", "product")
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    """What is known of all matrices without rounding any: one entry per matrix, in storage order."""

    units: list[Unit]
    cells: list[tuple[int, str]]
    alpha: Array
    halves: Array
    variance: Array
    stable_rank: Array
    energy: Array
    error: Array
    tokens: Array

    @property
    def gamma(self) -> float:
        return gamma_for_spread(self.alpha, SPREAD)

    def predictors(self) -> dict[str, Array]:
        """Name -> what should rise with the harm."""
        noise = self.variance * 4.0**-2
        products = {
            f"s · η, γ = {gamma:.3g}{' (auto)' if gamma == self.gamma else ''}": noise * tail_scores(self.alpha, gamma)
            for gamma in (*GAMMAS, self.gamma)
        }
        return {
            "1 / α": 1 / self.alpha,
            "η = Var · 4^-b": noise,
            **products,
            "weight error": self.error,
            "s · weight error (auto)": self.error * tail_scores(self.alpha, self.gamma),
            "relative weight error": self.error / self.energy,
            "1 / stable rank": 1 / self.stable_rank,
            "routed tokens (needs data)": self.tokens,
            "routed tokens · weight error (needs data)": self.tokens * self.error,
        }


class Swap:
    """The model's expert weights, of which some can be replaced by rounded ones for a while."""

    def __init__(self, model: torch.nn.Module, inventory: Any, rounded: dict[Unit, Tensor]) -> None:
        self._model = model
        self._inventory = inventory
        self._rounded = rounded

    def _place(self, unit: Unit) -> Tensor:
        layer = self._inventory.layers[unit.layer]
        experts = self._model.get_submodule(layer.path)
        if unit.projection == "down":
            return experts.down_proj.data[unit.expert]
        fused = experts.gate_up_proj.data[unit.expert]
        half = fused.shape[0] // 2
        return fused[:half] if unit.projection == "gate" else fused[half:]

    def run(self, units: Iterable[Unit], work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """`work` while `units` are rounded."""
        places = [(self._place(unit), self._rounded[unit]) for unit in units]
        originals = [place.clone() for place, _ in places]
        for place, rounded in places:
            place.copy_(rounded)
        try:
            return work()
        finally:
            for (place, _), original in zip(places, originals, strict=True):
                place.copy_(original)


def gather(args: argparse.Namespace, spec: QuantSpec, tokens: Array) -> tuple[Facts, Any, dict[Unit, Tensor]]:
    """Scores and rounded weights of every matrix."""
    inventory, headers = read_inventory(args.model)
    units = [unit for unit, _ in inventory.units()]
    quantizer = make_quantizer("rtn")
    rounded, stable_rank, halves = {}, [], []
    tail, error = SpectralTail(gamma=1), WeightError()
    with Reader(args.model, headers) as reader:
        for index, layer in enumerate(inventory.layers):
            view = LayerView(
                index=index,
                layer=layer,
                read=lambda expert, name, layer=layer: reader.matrix(layer.sources[name], expert, layer.shapes[name]),
                candidates=(spec,),
                unit="matrix",
                device=torch.device("cpu"),
            )
            tail.visit(view, None)
            error.visit(view, None)
            for unit in (unit for unit in units if unit.layer == index):
                w_NK = view.read(unit.expert, unit.projection)
                q = quantizer.quantize(w_NK, spec, None)
                rounded[unit] = dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec)
                values = torch.linalg.svdvals(w_NK.double()).square()
                stable_rank.append(float(values.sum() / values[0]))
                tiles = spectra.tiles(w_NK)
                halves.append([spectra.hill(spectra.squared_singular_values(tiles[part::2])) for part in (0, 1)])
    tails, errors = tail.result(), error.result()
    facts = Facts(
        units=units,
        cells=[(unit.layer, unit.projection) for unit in units],
        alpha=np.concatenate([each.statistics["alpha"] for each in tails]),
        halves=np.array(halves),
        variance=np.concatenate([each.statistics["variance"] for each in tails]),
        stable_rank=np.array(stable_rank),
        energy=np.concatenate([each.statistics["energy"] for each in errors]),
        error=np.concatenate([each.costs_UC[:, 0] for each in errors]),
        tokens=np.array([tokens[unit.layer, unit.expert] for unit in units]),
    )
    return facts, inventory, rounded


def routed(model: torch.nn.Module, rows: Sequence[Tensor], num_experts: int) -> Array:
    """(layer, expert) -> tokens."""
    with evaluating(model):
        parts = [observe(model, torch.stack(rows[i : i + BATCH]), routing=True) for i in range(0, len(rows), BATCH)]
    layers = zip(*(part.routing for part in parts), strict=True)
    counts = [
        sum(torch.bincount(chosen.flatten(), minlength=num_experts) for chosen in layer).tolist() for layer in layers
    ]
    return np.array(counts, dtype=np.float64)


def parts_to_round(facts: Facts, sample: int) -> list[dict[str, Any]]:
    """What is rounded, one entry per measurement: kind, name, indices of the matrices."""
    cells = sorted(set(facts.cells))
    members = {cell: [i for i, other in enumerate(facts.cells) if other == cell] for cell in cells}
    parts = [{"kind": "group", "name": f"{layer}.{name}", "members": members[layer, name]} for layer, name in cells]
    noise = facts.variance
    scores = {"tail": 1 / facts.alpha, "noise": noise, "product": noise * tail_scores(facts.alpha, facts.gamma)}
    for kind in BINNED:
        for place, chunk in enumerate(np.array_split(np.argsort(scores[kind], kind="stable"), BINS)):
            parts.append({"kind": f"bin-{kind}", "name": str(place), "members": sorted(chunk.tolist())})
    rng = np.random.default_rng(0)
    for cell in cells:
        for member in sorted(rng.choice(members[cell], size=sample, replace=False).tolist()):
            parts.append({"kind": "matrix", "name": str(facts.units[member]), "members": [member]})
    return parts


def correlations(facts: Facts, results: list[dict[str, Any]], kind: str) -> str:
    """Every predictor against the harm of one kind of parts."""
    rows = [result for result in results if result["kind"] == kind]
    harm = np.array([row["kl"] for row in rows])
    loss = np.array([math.log(row["perplexity"] / row["reference_perplexity"]) for row in rows])
    error = np.array([facts.error[row["members"]].sum() for row in rows])
    cells = [facts.cells[row["members"][0]] for row in rows]
    later = np.array([block > 0 for block, _ in cells])
    inside, where = (cells, "cells") if kind == "matrix" else ([cell[0] for cell in cells], "blocks")
    lines = []
    for name, each in facts.predictors().items():
        averaged = name.startswith(("1 /", "relative"))
        predicted = np.array([each[row["members"]].mean() if averaged else each[row["members"]].sum() for row in rows])
        if np.ptp(predicted) == 0:  # every expert of a layer together sees the same tokens
            continue
        line = [name, _rho(predicted, harm), _rho(predicted[later], harm[later]), _rho(predicted, loss)]
        line += [f"{_within(np.log(predicted), np.log(harm), inside):+.2f}", _rho(predicted, harm / error)]
        lines.append(line)
    names = ("predictor", "KL", "KL, without block 0", "Δ log ppl", f"KL, within {where} (r of logs)")
    return markdown_table((*names, "KL per squared error"), lines)


def chance(count: int) -> float:
    """What |Spearman's rho| of `count` unrelated pairs exceeds in one case of twenty, about."""
    return 1.96 / math.sqrt(count - 1)


def _rho(x: Array, y: Array) -> str:
    return f"{stats.spearmanr(x, y).statistic:+.2f}"


def _within(x: Array, y: Array, cells: Sequence[object]) -> float:
    """Pearson's correlation after the mean of each cell was taken out."""
    return float(np.corrcoef(centred(x, cells), centred(y, cells))[0, 1])


def centred(x: Array, cells: Sequence[object]) -> Array:
    """`x` less the mean of its cell."""
    means = {cell: np.mean([value for value, other in zip(x, cells, strict=True) if other == cell]) for cell in cells}
    return x - np.array([means[cell] for cell in cells])


def explained(x: Array, *labels: Sequence[object]) -> float:
    """R^2 of a linear model with a constant for every value of every label."""
    columns = [np.ones(len(x))]
    for label in labels:
        columns += [np.array([other == value for other in label], dtype=float) for value in sorted(set(label), key=str)]
    design = np.column_stack(columns)
    rest = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
    return float(1 - rest.var() / x.var())


def confounds(facts: Facts) -> str:
    """V3: what alpha is explained by."""
    blocks, names = [cell[0] for cell in facts.cells], [cell[1] for cell in facts.cells]
    rest = centred(np.log(facts.alpha), facts.cells)
    rows = []
    for title, values in (("α", np.log(facts.alpha)), ("Var(W)", np.log(facts.variance))):
        parts = (explained(values, blocks), explained(values, names), explained(values, blocks, names))
        rows.append((f"log {title}", *(f"{part:.2f}" for part in parts), f"{explained(values, facts.cells):.2f}"))
    regression = markdown_table(("R² of", "block", "projection", "both", "cell (block × projection)"), rows)
    others = {"Var(W)": facts.variance, "stable rank": facts.stable_rank, "routed tokens": facts.tokens}
    related = []
    for name, values in others.items():
        inside = np.corrcoef(rest, centred(np.log(values), facts.cells))[0, 1]
        related.append((name, _rho(facts.alpha, values), f"{inside:+.2f}"))
    halves = np.log(facts.halves)
    reliability = [
        2 * r / (1 + r)
        for r in (
            np.corrcoef(halves.T)[0, 1],
            np.corrcoef(centred(halves[:, 0], facts.cells), centred(halves[:, 1], facts.cells))[0, 1],
        )
    ]
    table = markdown_table(("α against", "Spearman, all matrices", "r of logs within cells"), related)
    return f"""{regression}

{table}

Two estimates of α from one half of a matrix's tiles each agree so far that the reliability of the whole (Spearman
and Brown) is {reliability[0]:.2f} over all matrices and {reliability[1]:.2f} within cells."""


def medians(facts: Facts) -> str:
    """Median alpha of each cell."""
    blocks = sorted({cell[0] for cell in facts.cells})
    names = ("gate", "up", "down")
    rows = []
    for block in blocks:
        row = [str(block)]
        for name in names:
            values = facts.alpha[[cell == (block, name) for cell in facts.cells]]
            row.append(f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})")
        rows.append(row)
    return markdown_table(("block", *names), rows)


def bins(results: list[dict[str, Any]]) -> str:
    """Measured KL of each bin, lowest score first."""
    rows = [
        (kind, *(f"{1000 * r['kl']:.2f}" for r in results if r["kind"] == f"bin-{kind}"))
        for kind in BINNED
        if any(r["kind"] == f"bin-{kind}" for r in results)
    ]
    return markdown_table(("binned by", *(str(place + 1) for place in range(BINS))), rows)


def write(facts: Facts, results: list[dict[str, Any]], args: argparse.Namespace, conclusion: str) -> None:
    counts = {kind: sum(r["kind"] == kind for r in results) for kind in ("group", "matrix")}
    alpha = facts.alpha
    text = f"""# Does alpha predict harm?

Made by `python benchmarks/alpha_validation.py` (moeq {moeq.__version__}, torch {torch.__version__}), model
`{args.model.name}`, {len(facts.units)} expert matrices. Parts of the experts are rounded to 2 bits (rtn, group size
128) in memory, all else stays as it is. Harm is the KL to the original in nats per token, on {args.max_tokens} tokens,
half C4, half WikiText-2, in windows of {SEQLEN}, float32. Correlations are Spearman's ρ where nothing else is said; a
predictor that works has a positive one.

{conclusion}

## Alphas

Median (range) over the 16 experts; {len(spectra.tiles(torch.zeros(args.shape)))} tiles per matrix. Mean
{alpha.mean():.2f}, coefficient of variation {100 * alpha.std() / alpha.mean():.1f} %; pure noise would give 6.4.
`gamma: auto` is {facts.gamma:.1f} here.

{medians(facts)}

## V1: harm of rounding all experts of one layer and projection

{counts["group"]} parts; by chance |ρ| exceeds {chance(counts["group"]):.2f} in 5 % of cases.

{correlations(facts, results, "group")}

## V1: harm of rounding single matrices

{counts["matrix"]} matrices, {args.sample} from each layer and projection; by chance |ρ| exceeds
{chance(counts["matrix"]):.2f} in 5 % of cases. "Within cells" compares only matrices of one
layer and projection with each other.

{correlations(facts, results, "matrix")}

## V1: harm of rounding matrices of similar score

{len(facts.units) // BINS} matrices in each of {BINS} bins, by rising 1/α ("tail"), Var(W) ("noise") and s · η with
γ auto ("product"). KL in thousandths of a nat: a good score makes it rise along the row.

{bins(results)}

## V3: what else alpha stands for

{confounds(facts)}"""
    write_page(args.output, [text])


def key_of(row: Row) -> Any:
    """What tells a part from the others."""
    return row["kind"], row["name"]


def main() -> None:
    """Measure what is missing and write the page."""
    parser = arguments("alpha_validation", __doc__)
    parser.set_defaults(max_tokens=8192)
    parser.add_argument("--conclusion", type=Path, help="a text that goes on top of the report")
    parser.add_argument("--sample", type=int, default=3, help="single matrices of each layer and projection")
    args = parse(parser)
    bench = Bench.of(args, texts=HALVES, max_tokens=args.max_tokens // len(HALVES))
    model, rows = bench.open(args.model), [row for part in bench.windows.values() for row in part]
    inventory, _ = read_inventory(args.model)
    args.shape = inventory.layers[0].shapes["up"]
    tokens = routed(model, rows, inventory.layers[0].num_experts)
    facts, inventory, rounded = gather(args, QuantSpec(bits=2), tokens)
    reference = args.work / "reference.safetensors"
    save_reference(model, rows, reference, batch_size=BATCH)
    swap, log = Swap(model, inventory, rounded), Rows(work=args.work, name="alpha_validation", key=key_of)
    for part in log.missing(parts_to_round(facts, args.sample)):
        units = [facts.units[member] for member in part["members"]]
        log.add({**part, **swap.run(units, lambda: suite.compare_all(model, reference, rows, BATCH, None)[0])})
    conclusion = args.conclusion.read_text(encoding="utf-8").strip() if args.conclusion else ""
    write(facts, log.all(), args, conclusion)


if __name__ == "__main__":
    main()

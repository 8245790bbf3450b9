"""BitsMoE against its own ablations and against grouped methods, at equal stored bytes, bases charged.

    python benchmarks/bitsmoe.py run         measure everything that is missing
    python benchmarks/bitsmoe.py surrogate   twenty allocations of one budget: predicted cost against measured KL
    python benchmarks/bitsmoe.py write       write benchmarks/bitsmoe.md from what was measured

Texts, tokens and measures are those of benchmarks/allocation.py. Results go to JSON lines files.
"""

import argparse
import json
import statistics
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers.utils import logging
from uniform import BATCH, SEQLEN, TEXTS

import moeq
from allocation import KNOWN, mean_kl, open_texts
from moeq.allocation import plans as allocate
from moeq.arch.inventory import read_inventory
from moeq.checkpoint.write import write_file_atomic
from moeq.codec import canonical
from moeq.costs.component_table import ComponentTable
from moeq.evals import suite
from moeq.evals.forward import batches
from moeq.layouts.spectral.shape import basis_bytes
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_any
from moeq.stages import measure

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


def costs_for(options: dict[str, Any], args: argparse.Namespace) -> str | None:
    wanted = {key: value for key, value in options.items() if key not in ("bits", "scope")}
    recipe = Recipe(**wanted)
    if recipe.settled().cost is None:
        return None
    if recipe.has_components and recipe.candidates is not None:
        wanted.pop("candidates")  # the table knows all widths
    if recipe.quantizer == "gptq" or (recipe.settled().quantizer == "gptq" and not recipe.has_components):
        wanted.pop("quantizer", None)
    path = args.work / f"costs-{zlib.crc32(repr(sorted(wanted.items())).encode()):08x}"
    if not path.exists():
        if recipe.has_components:
            measure.run(args.model, Recipe(**wanted), output=path)
        else:
            table = measure.run(args.model, Recipe(**wanted).replace(candidates="1,2,3,4"))
            write_file_atomic(path, canonical(table.to_dict()))
    return str(path)


def common(args: argparse.Namespace) -> dict[str, Any]:
    text = {"calibration": str(args.work / "calibration.txt"), "nsamples": args.nsamples, "seqlen": SEQLEN}
    return {**text, "device": args.device, "quality": False}


def spared(args: argparse.Namespace) -> float:
    """Bits per expert weight that a basis for both gate and up saves."""
    layer = read_inventory(args.model)[0].layers[0]
    hidden = layer.shapes["down"][0]
    weights = layer.num_experts * sum(rows * columns for rows, columns in layer.shapes.values())
    return 8 * basis_bytes(8, hidden, hidden) / weights


def jobs(args: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Name, bits and seed of every row: the first seed of everything, then the others."""
    first = [(name, bits, SEEDS[0]) for bits in args.budgets for name in METHODS]
    return first + [(name, bits, seed) for bits in args.budgets for seed in SEEDS[1:] for name in SEEDED]


def evaluate(packed: Path, args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, float]:
    model = load_any(packed, args.device, torch.float32)
    found: dict[str, float] = {}
    for name, windows_ in rows.items():
        metrics, _ = suite.compare_all(model, args.work / f"reference-{name}.safetensors", windows_, BATCH, None)
        found |= {f"{name}_{key}": value for key, value in metrics.items()}
    return found


def run(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    log = args.work / "bitsmoe.jsonl"
    done = {key_of(row) for row in rows_of(args)}
    for name, bits, seed in jobs(args):
        if (name, bits, seed) in done:
            continue
        options = {**common(args), **METHODS[name], "seed": seed}
        row: dict[str, Any] = {"name": name, "bits": bits, "seed": seed}
        try:
            options["costs"] = costs_for(options, args)
            options["bits"] = bits + (spared(args) if name == "second basis not charged" else 0)
            with tempfile.TemporaryDirectory(dir=args.work) as scratch:
                report = moeq.quantize(args.model, Path(scratch) / "packed", **options)
                row |= {"bits_per_weight": report.expert_bits_per_weight}
                row |= evaluate(Path(scratch) / "packed", args, rows)
        except moeq.MoeqError as error:
            row["error"] = str(error)
        append(log, row)


def block_error(packed: Path, args: argparse.Namespace, rows: dict[str, Any]) -> float:
    """Mean over MoE layers of |z' - z|^2 / |z|^2, z the experts' answers to what the original model asks them."""
    stock, rounded = (load_any(path, args.device, torch.float32) for path in (args.model, packed))
    paths = [layer.path for layer in read_inventory(args.model)[0].layers]
    sums = torch.zeros(len(paths), 2, dtype=torch.float64)

    def compare(index: int, _: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        other = rounded.get_submodule(paths[index])(*inputs)
        sums[index, 0] += (other - output).double().square().sum()
        sums[index, 1] += output.double().square().sum()

    for index, path in enumerate(paths):
        stock.get_submodule(path).register_forward_hook(partial(compare, index))
    with torch.inference_mode():
        for ids_NT in rows.values():
            for _, batch in batches(ids_NT, BATCH):
                stock(input_ids=batch, use_cache=False)
    return float((sums[:, 0] / sums[:, 1]).mean())


def surrogate(args: argparse.Namespace, rows: dict[str, Any], bits: float = 2.0, plans: int = 20) -> None:
    """Allocations by factors that are more and more unlike the true ones, all of the same stored bytes."""
    options = {**common(args), **METHODS["bitsmoe"], "bits": bits}
    costs = costs_for(options, args)
    assert costs is not None
    recipe = Recipe(**options, costs=costs).settled()
    inventory, headers = read_inventory(args.model)
    log = args.work / "surrogate.jsonl"
    for seed in range(len(read(log)), plans):
        table, true = ComponentTable(Path(costs)), ComponentTable(Path(costs))
        random = np.random.default_rng(seed)
        kind = ("noise", "energy", "power", "random")[seed % 4]
        strength = 0.5 * (1 + seed // 4)

        def factors(index: int, projection: str) -> Any:
            costs_of = true.layer(index, projection)  # noqa: B023
            weight = costs_of.weight_EH.numpy().astype(np.float64)
            if kind == "noise":  # noqa: B023
                weight = weight * np.exp(strength * random.standard_normal(weight.shape))  # noqa: B023
            elif kind == "energy":  # noqa: B023
                weight = costs_of.energy_EH.numpy() ** strength  # noqa: B023
            elif kind == "power":  # noqa: B023
                weight = weight**strength  # noqa: B023
            else:
                weight = np.exp(strength * random.standard_normal(weight.shape))  # noqa: B023
            return weight.astype(np.float32) / float(weight.mean())

        table.weights = factors  # type: ignore[method-assign]
        plan = allocate.run(inventory, headers, recipe, table=table)
        predicted = 0.0
        for index, layer in enumerate(inventory.layers):
            for name, widths in plan.widths(index, layer).items():
                part = true.layer(index, name)
                curve = {0: true.facts.drop} | {
                    spec.bits: loss for spec, loss in zip(true.candidates, part.curve_C.tolist(), strict=True)
                }
                lost = np.vectorize(curve.get)(widths)
                predicted += float((part.weight_EH.numpy() * lost).sum(dtype=np.float64))
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            plan.save(Path(scratch) / "plan.json")
            text = {"quality": False, "device": args.device, "quantizer": "rtn"}
            moeq.quantize(
                args.model, Path(scratch) / "packed", plan=str(Path(scratch) / "plan.json"), costs=costs, **text
            )
            row = {"kind": kind, "strength": strength, "bytes": plan.expert_bytes, "predicted": predicted}
            row["block_error"] = block_error(Path(scratch) / "packed", args, rows)
            append(log, row | evaluate(Path(scratch) / "packed", args, rows))


def append(log: Path, row: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = row.get("error") or f"KL {mean_kl(row):.5f}"
    print({k: v for k, v in row.items() if "_" not in k}, shown, file=sys.stderr, flush=True)


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def key_of(row: dict[str, Any]) -> tuple[str, float, int]:
    return row["name"], row["bits"], row.get("seed", SEEDS[0])


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What was measured, now or before, each row once."""
    logs = (KNOWN / "bitsmoe.jsonl", *sorted(args.work.glob("bitsmoe*.jsonl")))
    return list({key_of(row): row for log in logs for row in read(log)}.values())


def table_of(found: list[dict[str, Any]], bits: float) -> str:
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
        top1 = statistics.fmean(row[f"{text}_top1_agreement"] for row in mine for text in TEXTS)
        lines.append(
            (
                name,
                f"{mine[0]['bits_per_weight']:.4f}",
                f"{statistics.fmean(kls):.4f}{spread}",
                f"{kls[0] / base[0]:.2f}" if base else "",
                texts,
                f"{100 * top1:.1f} %",
            )
        )
    header = ("method", "stored bits", "KL", "KL / bitsmoe's", f"perplexity {' / '.join(TEXTS)}", "top-1")
    return f"## {bits:g} bits\n\n{markdown_table(header, lines)}"


def write(args: argparse.Namespace) -> None:
    found = rows_of(args)
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
    pairs = read(args.work / "surrogate.jsonl") or read(KNOWN / "bitsmoe_surrogate.jsonl")
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
    notes = args.output.with_name("bitsmoe_notes.md")
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").strip())
    args.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def arguments(
    name: str, text: str | None, verbs: tuple[str, ...], budgets: tuple[float, ...]
) -> argparse.ArgumentParser:
    """The command line that benchmarks of one method share."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=verbs)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-22m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build") / name)
    parser.add_argument("--output", type=Path, default=Path("benchmarks") / f"{name}.md")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--budgets", type=float, nargs="+", default=budgets)
    parser.add_argument("--device", default="cpu")
    return parser


def main() -> int:
    parser = arguments("bitsmoe", __doc__, ("run", "surrogate", "write"), BUDGETS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "write":
        write(args)
        return 0
    rows = open_texts(args)
    (run if args.what == "run" else surrogate)(args, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

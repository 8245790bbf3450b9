"""TileQ against its own ablations and against grouped methods, at equal stored bytes, all sides charged.

    python benchmarks/tileq.py run         measure everything that is missing
    python benchmarks/tileq.py latency     time of the tiled reference against the same residuals without factors
    python benchmarks/tileq.py write       write benchmarks/tileq.md from what was measured

Texts, tokens and measures are those of benchmarks/harness.py.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import KNOWN, SEQLEN, Bench, Row, Rows, arguments, mean_kl, parse, read, spread, top1, write_page

import moeq
from moeq.arch.inventory import read_inventory
from moeq.checkpoint.read import Reader
from moeq.layouts.grouped import reference
from moeq.layouts.grouped import serving as grouped_serving
from moeq.layouts.tiled import reference as tiled_kernel
from moeq.layouts.tiled import serving as tiled_serving
from moeq.layouts.tiled.serving import TiledExperts
from moeq.layouts.tiled.shape import TileForm, sides_bytes
from moeq.report.tables import markdown_table

BUDGETS = (2.25, 3.3)
SEEDS = (0, 1, 2)


def tiled(options: str = "", rank: int | str = "auto", **more: Any) -> dict[str, Any]:
    return {"method": "tileq", "rank": str(rank), "tile_options": options or None, **more}


BASE = "down=true,rotation=none"
PAPER = (
    "grid=paper,scales=expert,alpha=2.4,placement=literal,factors=deflation,refits=0,frequency=false,rotation=expert"
)

METHODS: dict[str, dict[str, Any]] = {
    "plain gptq": {"method": "uniform"},
    "plain gptq, groups of 64": {"method": "uniform", "group_size": 64},
    "plain vector": {"method": "uniform", "quantizer": "vector"},
    "tileq, defaults": {"method": "tileq"},
    "rank auto": tiled(),
    "tile": tiled(BASE, 4),
    "private low rank of the same bytes": tiled(BASE + ",grid=private", 1),
    "one factor shared, hidden side": tiled(BASE + ",grid=hidden", 2),
    "random placement": tiled(BASE + ",placement=random", 4),
    "no scale": tiled(BASE + ",alpha=0", 4),
    "alpha 2": tiled(BASE + ",alpha=2.0", 4),
    "down alone": tiled("down=false,rotation=none", 6),
    "rotation, permutation per tile": tiled("down=true,rotation=tile", 4),
    "rotation, permutation per layer": tiled("down=true,rotation=layer", 4),
    "rotation, permutation per expert": tiled("down=true,rotation=expert", 4),
    "rotation, no low rank": tiled("down=true,rotation=layer", 0),
    "no refit": tiled(BASE + ",refits=0", 4),
    "deflation, no refit": tiled(BASE + ",factors=deflation,refits=0", 4),
    "sixty swaps": tiled(BASE + ",swaps=60", 4),
    "rank 2": tiled(BASE, 2),
    "rank 8": tiled(BASE, 8),
    "rank 32": tiled(BASE, 32),
    "as the released code": tiled(PAPER, 4),
    "tile, vector": tiled(BASE, 4, quantizer="vector"),
    "tile, gemq widths": tiled(BASE, 4, allocation="gemq"),
    "gemq, no router tuning": {"method": "gemq", "router": "none"},
}


def energies(model: torch.nn.Module, source: Path) -> dict[str, float]:
    """Projection -> captured energy of the factors as they are stored, mean over layers, all inputs alike."""
    handlers = [module for module in model.modules() if isinstance(module, TiledExperts)]
    inventory, headers = read_inventory(source)
    found: dict[str, list[float]] = {}
    with Reader(source, headers) as reader:
        for handler, layer in zip(handlers, inventory.layers, strict=True):
            for name in layer.projections:
                sides = handler.layer.sides[name]
                if not sides.form.rank:
                    continue
                left = total = 0.0
                for expert in range(layer.num_experts):
                    w_OI = reader.matrix(layer.sources[name], expert, layer.shapes[name]).float()
                    left += float((w_OI - sides.low_rank(expert)).square().sum())
                    total += float(w_OI.square().sum())
                found.setdefault(name, []).append(1 - left / total)
    return {f"energy_{name}": statistics.fmean(values) for name, values in found.items()}


def jobs(seeds: list[int], budgets: list[float]) -> list[Row]:
    """The first seed of everything, then the other seeds."""
    return [{"name": name, "bits": bits, "seed": seed} for seed in seeds for bits in budgets for name in METHODS]


def measure_one(job: Row, bench: Bench) -> Row:
    """The row of a job."""
    options = bench.options(**METHODS[job["name"]], bits=job["bits"], seed=job["seed"])
    started = time.perf_counter()
    try:
        with bench.packed(**options) as (packed, report):
            seconds, model = time.perf_counter() - started, bench.open(packed)
            row = {**job, "bits_per_weight": report.expert_bits_per_weight, "seconds": seconds}
            if options["method"] == "tileq":
                row |= energies(model, bench.model) | {"ranks": ranks_of(packed)}
            return row | bench.measure(model)
    except moeq.MoeqError as error:
        return {**job, "error": str(error)}


def ranks_of(packed: Path) -> dict[str, int]:
    tiles = json.loads((packed / "moeq_plan.json").read_text(encoding="utf-8"))["tiles"]
    return {name: form["rank"] for name, form in tiles[0].items()}


def key_of(row: Row) -> tuple[str, float, int]:
    """What tells a row from all others."""
    return row["name"], row["bits"], row["seed"]


def latency(args: Any, repeats: int = 7) -> None:
    """All models in one process, by turns; medians. All of them run on the torch reference."""
    grouped_serving.EXPERTS, tiled_serving.EXPERTS = (reference.experts,), (tiled_kernel.experts,)
    common_ = {"device": args.device, "quality": False, "quantizer": "rtn", "bits": 3.3}
    variants = {
        "plain": {"method": "uniform", **common_},
        "no factors": {**tiled("rotation=none", rank=0), **common_},
        "rotation only": {**tiled("rotation=tile", rank=0), **common_},
        "tile": {**tiled(BASE, rank=8), **common_},
        "tile and rotation": {**tiled("down=true,rotation=tile", rank=8), **common_},
        "private": {**tiled("down=true,rotation=none,grid=private", rank=2), **common_},
    }
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        models = {}
        for name, options in variants.items():
            moeq.quantize(args.model, Path(scratch) / name, **options)
            models[name] = moeq.load(Path(scratch) / name, device=args.device, dtype=torch.float32)
        for tokens in (1, 32, 512):
            ids = torch.arange(tokens).view(1, tokens) % 4000
            times: dict[str, list[float]] = {name: [] for name in models}
            with torch.inference_mode():
                for _ in range(repeats + 1):
                    for name, model in models.items():
                        started = time.perf_counter()
                        model(ids, use_cache=False)
                        times[name].append(time.perf_counter() - started)
            row = {"tokens": tokens} | {name: statistics.median(each[1:]) for name, each in times.items()}
            with (args.work / "latency.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, file=sys.stderr)


MODELS = {
    "Qwen1.5-MoE-A2.7B": (60, 2048, 1408, (8, 8)),
    "Mixtral-8x7B": (8, 4096, 14336, (4, 2)),
    "Qwen3-30B-A3B": (128, 2048, 768, (8, 16)),
    "DeepSeek-MoE-16B": (64, 2048, 1408, (8, 8)),
}


def memory() -> str:
    """Bits per weight of the factors at rank 32, from shapes."""
    lines = []
    for name, (experts, hidden, inner, paper) in MODELS.items():
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        weights = 3 * experts * hidden * inner
        grids = {"tile": paper, "per expert": (experts, experts), "1D": (1, experts)}
        found = []
        for rows, columns in grids.values():
            forms = {each: TileForm(rank=32, rows=rows, columns=columns) for each in shapes}
            found.append(8 * sides_bytes(forms, experts, shapes) / weights)
        lines.append((name, f"{paper[0]}x{paper[1]}", *(f"{bits:.4f}" for bits in found), f"{found[1] / found[0]:.1f}"))
    return markdown_table(("model", "grid", *grids, "ratio"), lines)


def write(args: Any, found: list[Row]) -> None:
    """The page."""
    parts = [
        f"# TileQ: shared low-rank factors in tiles\n\nMade by `python benchmarks/tileq.py run` (moeq "
        f"{moeq.__version__}, torch {torch.__version__}), model `{args.model.name}`, {args.nsamples} x {SEQLEN} tokens "
        "of C4. Budgets are stored bits per expert weight: codes, scales, codebooks, factors, permutations, cells, "
        "tables and padding. What a row does not need for its own parts widens its first matrices by one bit, so all "
        "rows have the same bytes. KL in nats per token to the original, mean over three texts, first "
        f"{args.max_tokens} tokens each, float32; ± is half the range over seeds. Energies are what the factors, as "
        "they are stored, capture of the weights, all inputs alike."
    ]
    for bits in BUDGETS:
        base = [mean_kl(row) for row in found if row["bits"] == bits and row["name"] == "plain gptq"]
        lines = []
        for name in METHODS:
            rows = [row for row in found if (row["name"], row["bits"]) == (name, bits)]
            good = [row for row in rows if "error" not in row]
            if rows and not good:
                lines.append((name, str(len(rows)), "", "cannot be reached", "", "", "", ""))
            if not good:
                continue
            kls = [mean_kl(row) for row in good]
            ranks = (
                "/".join(str(good[0]["ranks"].get(each, 0)) for each in ("gate", "up", "down"))
                if good[0].get("ranks")
                else ""
            )
            energy = " / ".join(
                f"{good[0][f'energy_{each}']:.3f}" for each in ("gate", "up", "down") if f"energy_{each}" in good[0]
            )
            lines.append(
                (
                    name,
                    str(len(good)),
                    f"{good[0]['bits_per_weight']:.4f}",
                    spread(kls, 4),
                    f"{statistics.fmean(kls) / statistics.fmean(base):.2f}" if base else "",
                    top1(good),
                    ranks,
                    energy,
                )
            )
        header = ("row", "seeds", "stored bits", "KL", "KL / plain gptq", "top-1", "rank", "energy gate / up / down")
        if lines:
            parts.append(f"## {bits:g} bits\n\n{markdown_table(header, lines)}")
    parts.append(f"## Bits of the factors at rank 32, from shapes\n\n{memory()}")
    times = read(args.work / "latency.jsonl") or read(KNOWN / "tileq_latency.jsonl")
    if times:
        names = [name for name in times[-1] if name != "tokens"]
        lines = [
            (str(row["tokens"]), *(f"{row[name] / row['plain']:.2f}" for name in names))
            for row in {row["tokens"]: row for row in times}.values()
        ]
        parts.append(
            "## Time of the torch reference\n\nWhole forward passes, one thread, one process, by turns, median of 7; "
            "ratio to a model of plain matrices at the same bytes. Rank 8, private rank 2; all on the reference.\n\n"
            + markdown_table(("tokens", *names), lines)
        )
    write_page(args.output, parts)


def main() -> None:
    """Measure, or write the page."""
    parser = arguments("tileq", __doc__, ("run", "latency", "write"))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th row from the I-th on")
    args = parse(parser)
    part, parts = map(int, args.part.split("/"))
    rows = Rows(work=args.work, name="tileq", key=key_of, part=str(part))
    if args.what == "write":
        write(args, rows.all())
    elif args.what == "latency":
        latency(args)
    else:
        bench = Bench.of(args)
        for job in rows.missing(jobs(args.seeds, args.budgets)[part::parts]):
            if not args.only or job["name"] in args.only:
                rows.add(measure_one(job, bench))


if __name__ == "__main__":
    main()

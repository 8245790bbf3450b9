"""Two workers against one: how much faster each stage is, and that the bytes are the same.

    OMP_NUM_THREADS=1 python benchmarks/ray_fleet.py [--rounds 3]

One worker and two take turns inside one run, each after a first piece of work, so that no start is counted; the figure
is the median of the ratios. Every run has one thread a worker. Numbers and bytes are compared with those of this
process alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Bench

from moeq.checkpoint.write import hash_file
from moeq.fleet import HERE, Fleet
from moeq.integrations.ray_fleet import RayFleet
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.stages import evaluate, measure, quantize

MODEL = Path("../shared/models/ref-qwen3moe-62m")
DATA = Path("../shared/data")


def stages(bench: Bench, work: Path) -> dict[str, Callable[[Fleet], Any]]:
    """Name -> does it with a fleet; what it gives must not depend on that."""
    texts = f"{bench.calibration}:0.5,{DATA / 'mixture/calibration.jsonl'}:0.5"
    small = {"nsamples": 16, "seqlen": 512, "device": "cpu", "quality": False, "bits": 2.125}
    plain = Recipe(method="uniform", quantizer="hqq", calibration="none", **{k: small[k] for k in ("device", "bits")})
    rounded = Recipe(method="uniform", quantizer="trellis", calibration=texts, **small)
    packed = work / "packed"
    if not packed.exists():
        quantize.run(MODEL, packed, plain)

    def made(recipe: Recipe, fleet: Fleet) -> Any:
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            out = Path(scratch) / "out"
            quantize.run(MODEL, out, recipe, fleet=fleet)
            return [hash_file(path).sha256 for path in sorted(out.glob("*.safetensors"))]

    def costs(fleet: Fleet, **options: Any) -> Any:
        return measure.run(MODEL, Recipe(device="cpu", **options), fleet=fleet).hash

    def quality(fleet: Fleet) -> Any:
        text = DATA / "wikitext2/test.txt"
        return evaluate.run(
            packed, text, reference=MODEL, seqlen=512, max_tokens=16_384, batch_size=4, device="cpu", fleet=fleet
        ).metrics

    tail = {"method": "alphaq", "calibration": "none"}
    fisher = {"method": "gemq", "calibration": texts, "nsamples": 8, "seqlen": 512}
    return {
        "measure, weights (alphaq), by layer": lambda fleet: costs(fleet, **tail),
        "measure, gradients (gemq), two texts": lambda fleet: costs(fleet, **fisher),
        "quantize, no text (hqq), by layer": lambda fleet: made(plain, fleet),
        "quantize, text (trellis), by expert": lambda fleet: made(rounded, fleet),
        "eval, KL, by eight windows": quality,
    }


def timed(call: Callable[[Fleet], Any], workers: int) -> tuple[float, Any]:
    """Seconds with so many workers, none of them new, and what came out."""
    with RayFleet(workers=workers) as fleet:
        list(fleet.spread(_awake, range(4 * workers)))
        started = time.perf_counter()
        found = call(fleet)
        return time.perf_counter() - started, found


def _awake(_: int) -> None:
    """A piece of work that makes a worker import what all need."""
    time.sleep(0.2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/ray_fleet"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(model=MODEL, data=DATA, work=args.work, nsamples=32, max_tokens=0)
    lines = []
    for name, call in stages(bench, args.work).items():
        started = time.perf_counter()
        wanted = call(HERE)
        alone = time.perf_counter() - started
        ratios, ones = [], []
        for _ in range(args.rounds):
            (one, first), (two, second) = timed(call, 1), timed(call, 2)
            assert first == second == wanted, name
            ratios.append(one / two)
            ones.append(one)
        overhead = statistics.median(ones) / alone
        lines.append((name, f"{statistics.median(ratios):.2f}", f"{overhead:.2f}", "yes"))
        print(lines[-1], flush=True)
    header = ("stage", "one worker / two", "one worker / this process", "same bytes")
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()

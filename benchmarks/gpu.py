"""Everything about GPUs in one run, for whoever has one for ten minutes: is it right, and how fast is it?

    python benchmarks/gpu.py --all --minutes 8 --output DIR   # all parts, in the order of `PARTS`
    python benchmarks/gpu.py --only layers,layouts --output DIR
    python benchmarks/gpu.py --tune tiles.json --output DIR   # looks for better tiles first; compiles for long
    python benchmarks/gpu.py --smoke --output DIR             # tiny shapes, no times; needs no GPU

What is right comes before what is fast. Every part is guarded: what it raises is a row, and the next part goes on; it
starts nothing after its share of the time. Every row is on disk as soon as it is there (DIR/rows.jsonl, and the page
DIR/gpu.md), whatever happens later. It runs with PYTHONPATH=src where there are torch, triton, transformers and pytest,
and says what it skipped. Without a GPU `--smoke` runs the kernels from what their compiler makes of them
(tests/ttir.py).
"""

import argparse
import contextlib
import datetime
import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Row = dict[str, Any]
PARTS = {
    "selftest": ("gpu_checks", "selftest_rows", 0.1),
    "tests": ("gpu_checks", "test_rows", 0.2),
    "end to end": ("gpu_endtoend", "rows", 0.2),
    "layers": ("gpu_layers", "rows", 0.2),
    "layouts": ("gpu_layers", "layout_rows", 0.1),
    "model": ("gpu_model", "rows", 0.1),
    "packing": ("gpu_quantize", "rows", 0.1),
}
"""Part -> module, function, share of the time; what a part leaves over goes to the next."""
TARGETS: dict[str, tuple[str, Callable[[list[Row]], list[float]], Callable[[float], bool]]] = {}
"""Words -> part, its figures among the rows, whether one is good enough."""


def target(words: str, part: str, good: Callable[[float], bool]) -> Callable[[Any], Any]:
    """Registers what picks a target's figures out of rows."""

    def add(pick: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
        def figures(rows: list[Row]) -> list[float]:
            found = (pick(row) for row in rows if row["part"] == part and "failed" not in row)
            return [value for value in found if value is not None and not math.isnan(value)]

        TARGETS[words] = part, figures, good
        return pick

    return add


@target("decoding reads at least 60 % of the copy bandwidth (Mixtral, 1 to 8 tokens)", "layers", lambda v: v >= 0.6)
def _bandwidth(row: Row) -> float | None:
    return row["of copy"] if row.get("shape") == "Mixtral" and row["tokens"] <= 8 else None


@target("faster than bfloat16 grouped_mm below 64 tokens", "layers", lambda v: v > 1)
def _speed(row: Row) -> float | None:
    return row["speed-up"] if row.get("tokens", 64) < 64 else None


@target("4096 tokens take at most 1 / 0.7 of grouped_mm's time", "layers", lambda v: v >= 0.7)
def _prefill(row: Row) -> float | None:
    return row["speed-up"] if row.get("tokens") == 4096 else None


@target("the mixed plan is at least 90 % as fast as 3 bits", "layers", lambda v: v >= 0.9)
def _mixed(row: Row) -> float | None:
    return row.get("of uniform")


@target("tiles add at most 5 % to a grouped layer's time", "layouts", lambda v: v <= 1.05)
def _tiles(row: Row) -> float | None:
    return row.get("tiled ratio")


@target("a model of OLMoE's shape decodes twice as fast as in bfloat16", "model", lambda v: v >= 2)
def _model(row: Row) -> float | None:
    return row.get("speed-up")


@target("first token within 15 s of loading, nothing compiled before, seven widths", "model", lambda v: v <= 15)
def _first(row: Row) -> float | None:
    return row.get("first token s")


@target("packed models answer on the GPU what they answer on the CPU (relative error below 0.05)", "end to end",
        lambda v: v < 0.05)  # fmt: skip
def _same(row: Row) -> float | None:
    return row.get("error")


@target("no self-test fails", "selftest", lambda v: v == 1)
def _selftest(row: Row) -> float | None:
    return None if "ok" not in row else float(row["ok"])


@target("no native test fails", "tests", lambda v: v == 1)
def _tests(row: Row) -> float | None:
    return None if "ok" not in row else float(row["ok"])


@dataclass(kw_only=True)
class Board:
    """The rows so far, on disk."""

    output: Path
    where: str
    command: str
    smoke: bool
    rows: list[Row] = field(default_factory=list)

    def add(self, part: str, row: Row) -> None:
        """Keep a row: in the file, on the page, on the screen."""
        if "bits" in row and row["bits"].startswith("mixed"):
            for other in self.rows:
                if other.get("shape") == row["shape"] and other.get("tokens") == row["tokens"] and other["bits"] == "3":
                    row["of uniform"] = other["packed us"] / row["packed us"]
        kept = {"part": part} | {key: rounded(value) for key, value in row.items()}
        self.rows.append({"part": part, **row})
        with (self.output / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(part, *(f"{key}={value}" for key, value in kept.items() if key != "part"), sep="  ", flush=True)
        (self.output / "gpu.md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """All there is, as markdown."""
        from moeq.report.tables import markdown_table

        text = f"# GPU kernels\n\nMade by `{self.command}` on {self.where}.\n\n"
        if self.smoke:
            text += "No figure here is one: tiny shapes, to see that everything runs."
        else:
            text += "## Targets\n\n" + markdown_table(("target", "figures", "verdict"), self.verdicts())
        for part in PARTS:
            rows = [
                {key: value for key, value in row.items() if key != "part"} for row in self.rows if row["part"] == part
            ]
            if rows:
                columns = list(dict.fromkeys(key for row in rows for key in row))
                cells = [tuple(str(rounded(row.get(column, ""))) for column in columns) for row in rows]
                text += f"\n\n## {part.capitalize()}\n\n" + markdown_table(tuple(columns), cells)
        return text + "\n"

    def verdicts(self) -> list[tuple[str, str, str]]:
        """Each target, the range of its figures, and how many of them are good enough."""
        found = []
        for words, (part, figures, good) in TARGETS.items():
            values = figures([row for row in self.rows if row["part"] == part])
            met = sum(map(good, values))
            spread = f"{min(values):.3g} to {max(values):.3g}" if values else "-"
            verdict = "not measured" if not values else "met" if met == len(values) else f"{met} of {len(values)} met"
            found.append((words, spread, verdict))
        return found


def rounded(value: Any) -> Any:
    """Numbers with three digits; what is no number as text."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.3g}")
    return value if isinstance(value, int | bool | type(None)) else str(value)


def run(board: Board, parts: list[str], seconds: float, options: dict[str, Any]) -> None:
    """Run the parts; each may take its share of the time and what those before left over."""
    start = time.monotonic()
    used = 0.0
    total = sum(PARTS[part][2] for part in parts)
    for part in parts:
        module, function, share = PARTS[part]
        used += share / total
        began, count = time.monotonic(), 0
        try:
            make = getattr(importlib.import_module(module), function)
            for row in make(until=start + seconds * used, **options):
                board.add(part, row)
                count += 1
        except KeyboardInterrupt:
            board.add(part, {"what": "interrupted", "failed": "by the user"})
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = " ".join(str(error).split())[:300]
            board.add(
                part, {"what": f"after {count} rows", "failed": f"{type(error).__name__}: {words} ({where.name})"}
            )
        print(f"{part}: {count} rows in {time.monotonic() - began:.0f} s", flush=True)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """A GPU that is not there, whose Triton kernels run from what their compiler makes of them."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    pretend_gpu, ttir = (importlib.import_module(name) for name in ("pretend_gpu", "ttir"))
    with pretend_gpu.present(major=9), ttir.running():
        yield


def machine() -> str:
    """GPU, driver and versions."""
    import torch
    import transformers

    import moeq

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
    date = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"{name}, {date}; torch {torch.__version__} (CUDA {torch.version.cuda}), triton {triton}, "
        f"transformers {transformers.__version__}, moeq {moeq.__version__}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for rows.jsonl and gpu.md")
    parser.add_argument("--all", action="store_true", help="all parts, all shapes that the targets name")
    parser.add_argument("--only", metavar="PART,PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after this time")
    parser.add_argument("--full", action="store_true", help="all shapes, plans and numbers of tokens")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="time candidates for tiles and write the best")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="use the tiles of an earlier --tune")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and no times: does all of it still run?")
    options = parser.parse_args()
    parts = [part.strip() for part in options.only.split(",")] if options.only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not (options.all or options.only or options.smoke or options.tune):
        parser.error("give --all, --only, --tune or --smoke")
    import torch

    there = torch.cuda.is_available()
    if not there and not options.smoke:
        print("there is no CUDA device; --smoke runs without one", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = "python benchmarks/gpu.py " + " ".join(
        word if word != str(options.output) else "DIR" for word in sys.argv[1:]
    )
    with contextlib.nullcontext() if there else stand_in():
        if options.tiles:
            importlib.import_module("moeq.kernels.tuning").use(options.tiles)
        board = Board(output=options.output, where=machine(), command=command, smoke=options.smoke)
        given = {"device": torch.device("cuda", 0), "smoke": options.smoke, "quick": not options.full}
        if options.tune:
            PARTS["layers"] = ("gpu_layers", "tuned_rows", 1.0)
            given["tune"], parts = options.tune, ["layers"]
        try:
            run(board, parts, 60 * options.minutes, given)
        except KeyboardInterrupt:
            print("interrupted; what was measured is in", options.output, file=sys.stderr)
            return 130
    return 1 if any("failed" in row or row.get("ok") is False for row in board.rows) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())

"""What the benchmarks of quality share: models, texts, rows that are kept, and tables.

A benchmark names its rows and their options; this opens the texts, takes the calibration text apart from them, asks the
original once, packs, measures every text, and keeps each row on disk as soon as it is there, so that an interrupted run
goes on where it stopped.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import moeq
from moeq.calibration.tokens import read_text, windows
from moeq.checkpoint.write import write_file_atomic
from moeq.codec import canonical
from moeq.evals import suite
from moeq.evals.reference import save_reference
from moeq.recipe import Recipe
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import measure

TEXTS = {"wikitext2": "wikitext2/test.txt", "c4": "c4/eval.txt", "mixture": "mixture/heldout.jsonl"}
"""Held-out texts; a mean can hide one that got worse, so rows have all of them."""
SEQLEN = 256
BATCH = 16
KNOWN = Path(__file__).parent / "results"
"""Rows that were measured before, with the options that the pages name."""
Row = dict[str, Any]


def arguments(name: str, text: str | None, verbs: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The command line that benchmarks of quality share."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if verbs:
        parser.add_argument("what", choices=verbs)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-22m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build") / name)
    parser.add_argument("--output", type=Path, default=Path("benchmarks") / f"{name}.md")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--device", default="cpu")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the working directory made."""
    args = parser.parse_args()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows on disk: those of `KNOWN`, and those of this and other parts of a run.

    Attributes:
        work: where new rows go.
        name: of the benchmark.
        key: row -> what tells it from all others.
        part: of a run whose parts go on side by side; new rows go to a file of its own.
    """

    work: Path
    name: str
    key: Callable[[Row], Any]
    part: str = "0"

    def all(self) -> list[Row]:
        """What was measured, now or before, each row once; of two the later."""
        logs = (KNOWN / f"{self.name}.jsonl", *sorted(self.work.glob(f"{self.name}-*.jsonl")))
        return list({self.key(row): row for log in logs for row in read(log)}.values())

    def missing(self, wanted: list[Row]) -> list[Row]:
        """Those of some rows that nobody has measured."""
        done = {self.key(row) for row in self.all()}
        return [row for row in wanted if self.key(row) not in done]

    def add(self, row: Row) -> None:
        """Keep a row, and say it."""
        with (self.work / f"{self.name}-{self.part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = row.get("error") or (f"KL {mean_kl(row):.5f}" if f"{next(iter(TEXTS))}_kl" in row else "")
        words = {key: value for key, value in row.items() if "_" not in key and not isinstance(value, dict | list)}
        print(words, shown, file=sys.stderr, flush=True)


def read(log: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


@dataclass(slots=True, kw_only=True)
class Bench:
    """A model, and the texts that it is measured on.

    Attributes:
        model: the original checkpoint.
        data: holds `TEXTS`, and c4/calibration.txt.
        work: where everything is kept that is made once.
        nsamples: calibration sequences.
        max_tokens: tokens of each text.
        device: where it is packed and measured.
        texts: names to measure, of `TEXTS`.
        seqlen: tokens of a sequence and of a window.
        evenly: windows are spread over a text; else its first ones.
    """

    model: Path
    data: Path
    work: Path
    nsamples: int
    max_tokens: int
    device: str = "cpu"
    texts: tuple[str, ...] = tuple(TEXTS)
    seqlen: int = SEQLEN
    evenly: bool = False
    _windows: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace, **more: Any) -> "Bench":
        """That of a command line, but for what is given."""
        names = ("model", "data", "work", "nsamples", "max_tokens", "device")
        return cls(**{**{name: getattr(args, name) for name in names}, **more})

    @property
    def calibration(self) -> Path:
        """The C4 calibration text without the documents that the C4 evaluation text holds as well."""
        out = self.work / "calibration.txt"
        if not out.exists():
            held_out = set(read_text(self.data / TEXTS["c4"]).splitlines())
            lines = read_text(self.data / "c4" / "calibration.txt").splitlines()
            out.write_text("\n".join(line for line in lines if line not in held_out) + "\n", encoding="utf-8")
        return out

    @property
    def windows(self) -> dict[str, list[torch.Tensor]]:
        """Name of a text -> its windows."""
        if not self._windows:
            tokenizer = load_tokenizer(self.model)
            for name in self.texts:
                text = read_text(self.data / TEXTS[name])
                if self.evenly:
                    found, wanted = windows(tokenizer, text, self.seqlen), self.max_tokens // self.seqlen
                    self._windows[name] = [found[len(found) * at // wanted] for at in range(min(wanted, len(found)))]
                else:
                    self._windows[name] = windows(tokenizer, text, self.seqlen, max_tokens=self.max_tokens)
        return self._windows

    def reference(self, name: str) -> Path:
        """What the original says about a text, computed once."""
        path = self.work / f"reference-{name}.safetensors"
        if not path.exists():
            save_reference(self.open(self.model), self.windows[name], path, batch_size=BATCH)
        return path

    def open(self, directory: Path) -> PreTrainedModel:
        """A model in float32."""
        return load_any(directory, self.device, torch.float32)

    def options(self, **more: Any) -> dict[str, Any]:
        """Options of every run: the calibration text, and no measurement by `quantize` itself."""
        text = {"calibration": str(self.calibration), "nsamples": self.nsamples, "seqlen": self.seqlen}
        return {**text, "device": self.device, "quality": False, **more}

    def costs(self, recipe: Recipe, key: Any) -> Path:
        """Measured costs, kept by `key`: everything that they depend on."""
        path = self.work / f"costs-{zlib.crc32(repr(key).encode()):08x}.json"
        if not path.exists():
            if recipe.has_components:
                measure.run(self.model, recipe, output=path)
            else:
                write_file_atomic(path, canonical(measure.run(self.model, recipe).to_dict()))
        return path

    @contextmanager
    def packed(self, **options: Any) -> Iterator[tuple[Path, "moeq.stages.quantize.QuantizeReport"]]:
        """A packed checkpoint for a while, and the report of its making."""
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            out = Path(scratch) / "packed"
            yield out, moeq.quantize(self.model, out, **options)

    def measure(self, model: PreTrainedModel) -> Row:
        """Perplexity, KL, top-1 agreement and the rest of every text, as <text>_<measure>."""
        found: Row = {}
        for name, rows in self.windows.items():
            metrics, tokens = suite.compare_all(model, self.reference(name), rows, BATCH, None)
            found |= {f"{name}_{key}": value for key, value in metrics.items()} | {f"{name}_tokens": tokens}
        return found


def mean_kl(row: Row) -> float:
    """KL to the original, nats per token, mean over texts."""
    return statistics.fmean(row[f"{name}_kl"] for name in TEXTS)


def top1(rows: list[Row]) -> str:
    """Top-1 agreement with the original, mean over rows and texts."""
    return f"{100 * statistics.fmean(row[f'{name}_top1_agreement'] for row in rows for name in TEXTS):.1f} %"


def spread(values: list[float], digits: int) -> str:
    """A mean, with half the range if there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def write_page(output: Path, parts: list[str]) -> None:
    """A page of parts, and what is said by hand about it in a file beside: <page>_notes.md."""
    notes = output.with_name(f"{output.stem}_notes.md")
    if notes.exists():
        parts = [*parts, notes.read_text(encoding="utf-8").strip()]
    output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")

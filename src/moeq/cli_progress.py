"""How the command line shows that it works: a live display on a terminal, lines of text elsewhere, nothing if asked."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from moeq import progress
from moeq.report.tables import human_bytes

EVERY: Final = 30.0
"""Seconds between two lines about the same thing, where there is no terminal."""
NARROW: Final = 60
"""Columns below which bar and memory are left out, so that counts and times stay whole."""
NAMES: Final = {
    "blocks": "measuring blocks",
    "packing": "packing blocks",
    "layers": "measuring layers",
    "shards": "writing files",
    "tuning": "tuning",
    "verify": "verifying",
    "kernels": "compiling kernels",
    "windows": "measuring windows",
    "sequences": "asking",
    "candidates": "candidates",
    "compared": "comparing",
    "checkpoints": "checkpoints",
}
"""What is counted -> what is said of it."""


def peak_memory() -> int:
    """The most memory that this process had, bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


@contextlib.contextmanager
def shown(*, quiet: bool) -> Iterator[progress.Progress]:
    """The display of one run; the value is told of progress."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        console = Console(file=sys.stderr)
        bar = (BarColumn(bar_width=None),) if console.width >= NARROW else ()
        memory = (_Memory(),) if console.width >= NARROW else ()
        columns = (TextColumn("{task.description}", justify="right"), *bar, MofNCompleteColumn(), _Left(), *memory)
        with Progress(*columns, console=console, expand=True) as live:
            yield _Live(live)
    else:
        yield _Lines()


class _Left(TimeRemainingColumn):
    """Time left while something is done, time taken when it is."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        if task.finished:
            return Text(_clock(task.finished_time or 0.0), style="progress.elapsed")
        return super().render(task)


class _Memory(ProgressColumn):
    """Peak memory, beside what is going on."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text("" if task.finished else f"peak {human_bytes(peak_memory())}")


class _Live:
    """Rows of a live display: one for each thing that is counted; a count that begins anew is a new row."""

    def __init__(self, live: Progress) -> None:
        self._live = live
        self._rows: dict[str, tuple[int, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        row, before = self._rows.get(what, (-1, 0))
        if row < 0 or done < before:
            row = self._live.add_task(NAMES.get(what, what), total=total)
        self._rows[what] = row, done
        self._live.update(row, completed=done, total=total)  # type: ignore[arg-type]


class _Lines:
    """A line when something begins and ends, and every half minute between."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float, float]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say that `done` of `total` are done, if it is time to."""
        now = time.monotonic()
        before, said, began = self._last.get(what, (total + 1, 0.0, now))
        if done < before:
            said, began = 0.0, now
        if said and done < total and now - said < EVERY:
            self._last[what] = done, said, began
            return
        self._last[what] = done, now, began
        spent = f", {_clock(now - began)}" if now - began >= 1 else ""
        text = f"{NAMES.get(what, what)}: {done} of {total}{spent}, peak memory {human_bytes(peak_memory())}"
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

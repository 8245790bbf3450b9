"""The command `moeq`: arguments are read before anything heavy is imported.

Importing `moeq` imports torch and transformers, which takes seconds; help, completion and wrong arguments need neither.
So this is a package of its own, which `moeq` knows and which knows `moeq` only when there is something to do.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from moeq_cli.args import build_parser

__all__ = ["build_parser", "main"]

INTERRUPTED: Final = 130
"""The exit status after Ctrl-C, as shells have it."""
BARS: Final = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""There is one display, and it is ours; and nobody is told of anything."""
CACHES: Final = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""torch keeps code for each of the last 1024 shapes of a product, twice: megabytes for every length of a prompt, and
for every number of tokens that an expert meets in calibration (benchmarks/serve.md, benchmarks/peers.md)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.words = words
    for name, value in (BARS | CACHES).items():
        os.environ.setdefault(name, value)
    try:
        with _leaving_at_once():
            from moeq.cli import run
        return run(args)
    except KeyboardInterrupt:
        print("interrupted" + ("; go on with --resume" if args.verb == "quantize" else ""), file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """While modules are imported Ctrl-C ends the process: some would swallow the exception, and nothing has begun."""
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    if ours:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)

"""Processes of their own that need not import torch again: forked from a server that has, and has done nothing else."""

import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["moeq"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A process that has ended; fields as those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Running:
    """A process, and where its words go."""

    process: ForkServerProcess
    folder: "TemporaryDirectory[str]"

    def wait(self, timeout: float = 300) -> Done:
        """Wait for its end."""
        with self.folder as folder:
            self.process.join(timeout)
            assert self.process.exitcode is not None, "it does not end"
            out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return Done(returncode=self.process.exitcode, stdout=out, stderr=err)


def start(code: str, *arguments: str) -> Running:
    """Begin what `python -c code arguments` would do."""
    folder = TemporaryDirectory()
    process = _CONTEXT.Process(target=_run, args=(code, arguments, folder.name))
    process.start()
    return Running(process=process, folder=folder)


def run(code: str, *arguments: str) -> Done:
    """Do it."""
    return start(code, *arguments).wait()


def _run(code: str, arguments: tuple[str, ...], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()

"""The output directory: built beside its final name, renamed when everything in it has been proven."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moeq.checkpoint.journal import JOURNAL_NAME, remove_journal
from moeq.errors import HeaderError, MissingTensorError, OutputError, ResumeError, StorageError, TensorError

PARTIAL_SUFFIX = ".partial"


def partial_of(out: Path) -> Path:
    """Where the checkpoint is built until it is complete."""
    return out.with_name(out.name + PARTIAL_SUFFIX)


@contextlib.contextmanager
def building(source: Path, out: Path, *, resume: bool, needed_bytes: int) -> Iterator[Path]:
    """The directory to build in; after an error it stays only if a later run can go on there.

    Args and errors are those of `prepare`.
    """
    partial = prepare(source, out, resume=resume, needed_bytes=needed_bytes)
    try:
        yield partial
    except (HeaderError, MissingTensorError, TensorError):
        # The input must change before a run can succeed, and a run with another input cannot go on here.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:
        _drop_unbegun(partial)
        raise


@contextlib.contextmanager
def all_or_nothing(partial: Path) -> Iterator[None]:
    """After an error nothing stays, where there is no journal and no later run could go on."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def one_file(source: Path, out: Path, needed_bytes: int) -> Iterator[Path]:
    """A path beside `out` to write a file to; it gets its name when the block ends well, and goes when it does not.

    Raises:
        OutputError: `out` exists, lies in the input, or cannot be written.
        StorageError: there is too little free space.
    """
    unfinished = partial_of(out)
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists", option="output", fix="choose another name, or remove it")
    if _overlap(source, out):
        raise OutputError("the output lies in the input", option="output", fix="choose a place outside the input")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        unfinished.touch()
    except OSError as error:
        message = f"cannot write {out}: {error.strerror}"
        raise OutputError(message, option="output", fix="choose another place") from error
    try:
        if free < needed_bytes:
            message = f"the disk has {free} bytes free, the output needs {needed_bytes}"
            raise StorageError(message, file=out, fix=f"free {needed_bytes - free} bytes, or write elsewhere")
        yield unfinished
        unfinished.rename(out)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise StorageError(f"cannot write {out} ({name})", file=out, fix="free space, or write elsewhere") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _drop_unbegun(partial: Path) -> None:
    """Remove a directory in which no run has begun."""
    if partial.is_dir() and all(path.name[0] == "." and path.name != JOURNAL_NAME for path in partial.iterdir()):
        shutil.rmtree(partial, ignore_errors=True)


def prepare(source: Path, out: Path, *, resume: bool, needed_bytes: int) -> Path:
    """Check that `out` can be written and make the directory in which it is built.

    Args:
        source: the input; must not be the output.
        out: the final directory; must not exist, or be empty.
        resume: go on in an unfinished run's directory.
        needed_bytes: free space required.

    Returns:
        The directory to build in.

    Raises:
        OutputError: `out` is the input, not empty, or cannot be written.
        ResumeError: there is an unfinished run and `resume` is off, or the reverse.
        StorageError: there is too little free space.
    """
    partial = partial_of(out) if out.name else out
    try:
        check_free(source, out, partial, resume)
        partial.mkdir(parents=True, exist_ok=True)
        for path in partial.iterdir():  # what a killed run spilled, or wrote for other processes
            if path.name.startswith(".moeq-") and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(
            f"cannot make {partial}: {reason}", option="output", fix="choose another directory"
        ) from error
    if not os.access(partial, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {partial}", option="output", fix="choose another directory")
    try:
        _check_space(partial, needed_bytes)
    except StorageError:
        _drop_unbegun(partial)
        raise
    return partial


def check_free(source: Path, out: Path, partial: Path, resume: bool) -> None:
    """Raise OutputError or ResumeError unless `out` can be built in `partial`."""
    if _overlap(source, out):
        raise OutputError("the output overlaps the input", option="output", fix="choose a directory outside the input")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputError(f"{out} exists and is not empty", option="output", fix="choose another, or remove it")
    unfinished = (partial / JOURNAL_NAME).exists()
    if unfinished and not resume:
        raise ResumeError(
            f"an unfinished run lies in {partial}", option="resume", fix="go on with --resume, or remove that directory"
        )
    if partial.exists() and not unfinished and any(path.name[0] != "." for path in partial.iterdir()):
        raise ResumeError(f"{partial} holds files of something else", option="output", fix="remove that directory")


def _overlap(source: Path, out: Path) -> bool:
    source, out = source.resolve(), out.resolve()
    return source == out or out in source.parents or source in out.parents


def _check_space(partial: Path, needed_bytes: int) -> None:
    present = sum(path.stat().st_size for path in partial.iterdir() if path.is_file())
    free = shutil.disk_usage(partial).free
    if free + present < needed_bytes:
        raise StorageError(
            f"the disk has {free} bytes free, the output needs {needed_bytes - present} more",
            file=partial,
            fix=f"free {needed_bytes - present - free} bytes, or write elsewhere",
        )


def publish(partial: Path, out: Path) -> None:
    """Give a complete checkpoint its name.

    Raises:
        StorageError: the rename failed; everything is still in `partial`, to be resumed.
    """
    try:
        if out.exists():
            out.rmdir()
        partial.rename(out)
        remove_journal(out)
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise StorageError(
            f"cannot rename {partial} to {out} ({name})", file=out, fix="free that name, then --resume"
        ) from error

"""Every error moeq raises, as one tree.

    MoeqError
    |- OptionError            an option, recipe key or argument is wrong
    |  |- RecipeError         a recipe file has unknown keys or wrong types
    |  |- BudgetError         the budget cannot be met, or is not one
    |  |  `- InfeasibleError  no choice of candidates fits; says the smallest that would
    |  |- DeviceError         the device asked for is not there
    |  `- OutputError         the output directory cannot be used
    |- CheckpointError        the source checkpoint is broken or not for us
    |  |- HeaderError         a safetensors file contradicts its own header
    |  |- MissingTensorError  a tensor or shard that must exist does not
    |  |- TensorError         a tensor has a wrong shape, dtype or value
    |  |- NotMoeError         the model has no routed experts we know of
    |  `- AlreadyQuantizedError
    |- CalibrationError       the calibration or evaluation text cannot be used
    |- ArtifactError          a Plan, CostTable, ... is malformed or of another model
    |  `- VersionError        an artifact or checkpoint of a future format
    |- PackedError            a packed checkpoint is inconsistent or was tampered with
    |- ResumeError            a journal does not match what is asked for now
    |- StorageError           the disk is full or refuses to write
    |- WorkerError            processes that work was spread over died, or cannot be reached
    `- InternalError          a bug of moeq's, or an error below it that nobody foresaw

Each message names what is at fault (file, tensor or option) and says the fix. One thing is no error, because answers
stay right: `KernelWarning`.
"""

from pathlib import Path
from typing import Any


class MoeqError(Exception):
    """Base of all errors of moeq: what is wrong, where, and what to do about it.

    Args:
        message: what is wrong, one sentence.
        file: the file at fault.
        tensor: the tensor at fault.
        option: the option (as spelled in the CLI or recipe) at fault.
        fix: what the user can do, one sentence.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        option: str | None = None,
        fix: str = "",
    ) -> None:
        self.message = message
        self.file = str(file) if file is not None else None
        self.tensor = tensor
        self.option = option
        self.fix = fix
        where = [
            f"{kind} {value}"
            for kind, value in (("file", self.file), ("tensor", tensor), ("option", option))
            if value is not None
        ]
        parts = [f"{message}" + (f" ({', '.join(where)})" if where else "")]
        if fix:
            parts.append(f"Fix: {fix}")
        super().__init__(". ".join(part.rstrip(".") for part in parts) + ".")

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of workers travel: they are put together again from what they say, not made anew."""
        return _received, (type(self), self.args, self.__dict__)


def _received(kind: type[MoeqError], args: tuple[Any, ...], facts: dict[str, Any]) -> MoeqError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class OptionError(MoeqError):
    """An option, recipe key or argument has a value that cannot be used."""


class RecipeError(OptionError):
    """A recipe file is not valid YAML or has unknown keys or wrong types."""


class BudgetError(OptionError):
    """The budget lies below the smallest or above the largest reachable size."""


class InfeasibleError(BudgetError):
    """No choice of candidates fits the limit and the shares.

    Args:
        smallest: the smallest limit that could be met, in the units of the problem; None when the
            shares contradict each other and no limit helps.
    """

    def __init__(self, message: str, *, smallest: int | None, fix: str = "") -> None:
        super().__init__(message, option="bits, size", fix=fix)
        self.smallest = smallest


class DeviceError(OptionError):
    """The device asked for does not exist on this machine."""


class OutputError(OptionError):
    """The output directory is not empty, is the input, or cannot be written."""


class CheckpointError(MoeqError):
    """The source checkpoint is broken or not one that moeq can read."""


class HeaderError(CheckpointError):
    """A safetensors file is truncated or contradicts its own header."""


class MissingTensorError(CheckpointError):
    """A shard or tensor that must exist does not."""


class TensorError(CheckpointError):
    """A tensor has a wrong shape or dtype, or holds NaN or infinity."""


class NotMoeError(CheckpointError):
    """The model has no routed experts that moeq knows how to handle."""


class AlreadyQuantizedError(CheckpointError):
    """The source is quantized already; quantizing twice would compound errors."""


class CalibrationError(MoeqError):
    """A calibration or evaluation text is empty, too short or undecodable."""


class ArtifactError(MoeqError):
    """A stored artifact is malformed, or belongs to another model."""


class VersionError(ArtifactError):
    """An artifact or checkpoint was written in a format this version does not know."""


class PackedError(MoeqError):
    """A packed checkpoint is inconsistent or has been tampered with."""


class ResumeError(MoeqError):
    """A journal does not match the input, options or version of this run."""


class StorageError(MoeqError):
    """The disk is full or refuses to write."""


class WorkerError(MoeqError):
    """A process that does a part of the work died again and again, or nobody is there to work."""


class InternalError(MoeqError):
    """Something in moeq or below it went wrong in a way that nobody foresaw."""

    @classmethod
    def of(cls, error: Exception) -> "InternalError":
        """What to say of an error of another kind."""
        line = " ".join(str(error).split())[:200]
        return cls(f"{type(error).__name__}: {line}", fix="report this as a bug, with what moeq doctor --json says")


class KernelWarning(RuntimeWarning):
    """Compiled kernels failed their self-test on this machine and are off: answers stay right, but take longer."""

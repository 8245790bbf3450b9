"""Activation stores that live on disk once they are large."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from moeq.errors import StorageError

IN_MEMORY_BYTES = 64 * 2**20


class SpillPool:
    """Makes tensors, file-backed where they are large, so that the system can write them out under pressure.

    The files are unlinked at once: they vanish with the tensors, also after a crash.

    Args:
        directory: where the files live; must be on a disk, not in memory.
        in_memory: bytes up to which a tensor is not worth a file.
    """

    def __init__(self, directory: Path, in_memory: int = IN_MEMORY_BYTES) -> None:
        self._directory = directory
        self._in_memory = in_memory

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor.

        Raises:
            StorageError: the disk has no room for it.
        """
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        if num_bytes <= self._in_memory:
            return torch.empty(shape, dtype=dtype)
        path = Path(tempfile.mkstemp(prefix="activations-", dir=self._directory)[1])
        try:
            with path.open("r+b") as file:
                file.truncate(num_bytes)
            storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=num_bytes)
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"cannot spill {num_bytes} bytes: {error}",
                file=self._directory,
                fix="free disk space there, or use fewer samples (--nsamples)",
            ) from error
        finally:
            path.unlink(missing_ok=True)
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]

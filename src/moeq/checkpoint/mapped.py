"""Maps the tensors of a finished safetensors file into memory, without copies."""

from pathlib import Path

import torch
from torch import Tensor

from moeq.checkpoint.dtypes import TORCH_DTYPES
from moeq.checkpoint.header import read_header

DTYPES = {
    "U8": torch.uint8,
    "I64": torch.int64,
}
FLOATS = ("F16", "F32", "F64")


def map_file(path: Path, *, floats: bool = False) -> dict[str, Tensor]:
    """The packed tensors (U8 and I64) of a file, as private mappings: pages are read when first touched.

    Args:
        path: the file.
        floats: map tensors of floats too.

    Raises:
        MissingTensorError, HeaderError: the file is absent or contradicts its header.
    """
    headers = read_header(path)
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
    tensors = {}
    for name, info in headers.items():
        dtype = TORCH_DTYPES[info.dtype] if floats and info.dtype in FLOATS else DTYPES.get(info.dtype)
        if dtype is not None:
            view = whole[info.start : info.stop]
            # Blobs are aligned by the writer; a small table need not be. Kernels read 16-bit scales from bytes.
            if info.start % max(dtype.itemsize, 2):
                view = view.clone()
            tensors[name] = view.view(dtype).view(info.shape)
    return tensors

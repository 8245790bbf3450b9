"""Maps the tensors of a finished safetensors file into memory, without copies."""

from pathlib import Path

import torch
from torch import Tensor

from moeq.checkpoint.header import read_header

DTYPES = {
    "U8": torch.uint8,
    "I64": torch.int64,
}


def map_file(path: Path) -> dict[str, Tensor]:
    """The packed tensors (U8 and I64) of a file, as private mappings: pages are read when first touched.

    Raises:
        MissingTensorError, HeaderError: the file is absent or contradicts its header.
    """
    headers = read_header(path)
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
    tensors = {}
    for name, info in headers.items():
        if info.dtype in DTYPES:
            view = whole[info.start : info.stop]
            dtype = DTYPES[info.dtype]
            # Blobs are aligned by the writer; a small table need not be.
            if info.start % dtype.itemsize:
                view = view.clone()
            tensors[name] = view.view(dtype).view(info.shape)
    return tensors

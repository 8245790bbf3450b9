"""Triton kernels run natively where there is a GPU; elsewhere what their compiler makes of them runs (`ttir`)."""

from collections.abc import Iterator

import pytest
import torch

import ttir


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where tensors have to be for the kernels to take them."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with ttir.running():
            yield torch.device("cpu")

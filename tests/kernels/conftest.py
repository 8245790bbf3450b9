"""Triton kernels run natively where there is a GPU; elsewhere what the compiler makes of them runs on the CPU (`ttir`).

`test_interpreted.py` runs the same tests in triton's interpreter, in a process of its own: torch imports triton early,
and how its functions behave is decided then.
"""

import os
from collections.abc import Iterator

import pytest
import torch

import ttir

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where tensors have to be for the kernels to take them."""
    pytest.importorskip("triton")
    if INTERPRETED:
        yield torch.device("cpu")
    elif torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with ttir.running():
            yield torch.device("cpu")

"""Tests of Triton kernels run natively where there is a GPU, and in triton's interpreter elsewhere.

torch imports triton early, and how its functions behave is decided then, so the interpreter needs a process of its own:
`test_interpreted.py` starts it.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def triton_device() -> torch.device:
    """Where tensors have to be for the kernels to take them."""
    pytest.importorskip("triton")
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("needs a CUDA device; test_interpreted.py runs it in the interpreter")

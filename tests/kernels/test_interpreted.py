"""Runs the tests of Triton kernels in triton's interpreter, in another process whose environment asks for it."""

import os
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, run

import pytest

FILES = ("test_gpu.py", "test_gpu_rows.py", "test_gpu_selftest.py")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is that process")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(str(here / name) for name in FILES)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # Matrices are tiny: more than one thread only waits for the others.
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = run(command, cwd=here.parent.parent, env=environment, stdout=PIPE, stderr=STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout

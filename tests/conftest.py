import os

# Before torch is imported, and inherited by subprocesses: tiny matrices gain nothing from threads, and on a busy
# machine threads that wait for each other make tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import moeq
import zoo
from moeq.layouts import trust

with suppress(ImportError):  # tests on a GPU run where there is little more than pytest
    from hypothesis import settings

    settings.register_profile("moeq", deadline=None)  # how long an example takes says nothing on a shared machine
    settings.load_profile("moeq")

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verdicts on kernels go to a directory of the tests, those of command lines too."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        patch.setenv("HF_MODULES_CACHE", str(directory / "modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory / "modules"))
        patch.setenv("HF_ASSETS_CACHE", str(directory / "assets"))
        patch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(directory / "assets"))
        trust.keep_verdicts_in(directory / "moeq")
        yield


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The bundled model: 4 layers of 16 experts, top 2, bfloat16."""
    return ASSETS / "demo-qwen3moe-4m"


@pytest.fixture(scope="session")
def text_dir() -> Path:
    """The bundled texts."""
    return ASSETS / "text"


@pytest.fixture(scope="session")
def demo_tokenizer(demo_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_dir)


@pytest.fixture(scope="session")
def demo_model(demo_dir: Path) -> nn.Module:
    """The bundled model, bfloat16 on the CPU. Shared by all tests: change a copy, never this."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def calibration_text(text_dir: Path) -> Path:
    """The bundled calibration text, a document per line."""
    return text_dir / "calibration.txt"


@pytest.fixture(scope="session")
def packed_demo(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, packed with mixed widths and 8-bit linears. Shared: change a copy, never this."""
    out = tmp_path_factory.mktemp("session") / "packed-demo"
    moeq.quantize(demo_dir, out, quantizer="rtn", bits=3.7, dense_bits="8", device="cpu")
    return out


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe of a few hundred kB, bfloat16, whose tokens are letters. Shared: change a copy, never this."""
    logging.disable_progress_bar()
    directory = tmp_path_factory.mktemp("session") / "tiny"
    zoo.make_tiny("qwen3_moe", directory, dtype=torch.bfloat16)
    zoo.write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def packed_tiny(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dir`, packed. Shared: change a copy, never this."""
    out = tmp_path_factory.mktemp("session") / "packed-tiny"
    moeq.quantize(tiny_dir, out, quantizer="minmax", bits=5, group_size=32, dense_bits="8", device="cpu")
    return out

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

ASSETS = Path(__file__).parent.parent / "assets"


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

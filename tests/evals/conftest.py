import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moeq.calibration.tokens import read_text, windows


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(demo_model: nn.Module) -> nn.Module:
    """The demo model in float32, so that results do not depend on batching; not to be changed."""
    return copy.deepcopy(demo_model).float()


@pytest.fixture(scope="session")
def noisy(model: nn.Module) -> nn.Module:
    """The model with noise on its experts, as a coarse quantizer would leave it; not to be changed."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in noisy.named_parameters():
            if ".experts." in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.5 * float(weight.std()))
    return noisy


@pytest.fixture(scope="session")
def rows(demo_tokenizer, text_dir: Path) -> list[Tensor]:
    """Five windows of 64 tokens and one of 41."""
    return windows(demo_tokenizer, read_text(text_dir / "eval.txt"), 64, max_tokens=361)

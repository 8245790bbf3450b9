from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

import moeq
import zoo

Pack = Callable[[str], Path]


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Packs the tiny model of a family, float32, once; the original lies beside it as `source`."""
    done: dict[str, Path] = {}

    def packed(model_type: str) -> Path:
        if model_type not in done:
            logging.disable_progress_bar()
            place = tmp_path_factory.mktemp(model_type)
            zoo.make_tiny(model_type, place / "source")
            options = {"bits": 2, "accounting": "codes", "group_size": 32, "quantizer": "minmax"}
            moeq.quantize(place / "source", place / "packed", device="cpu", **options)
            done[model_type] = place / "packed"
        return done[model_type]

    return packed


@pytest.fixture
def ids() -> Tensor:
    """Four sequences of the tiny models' tokens."""
    return torch.randint(3, zoo.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(5))

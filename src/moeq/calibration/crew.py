"""Rounds the experts of a layer in other processes; inputs and results travel through files."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.fleet import Fleet
from moeq.quantizers.base import QuantizedMatrix

INPUTS = "inputs.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Other processes that round experts.

    Attributes:
        fleet: they.
        directory: what they and this process can read and write.
    """

    fleet: Fleet
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What one expert is rounded for.

    Attributes:
        expert: its number.
        seen: tokens that its statistics see.
        routed: tokens that it answers.
    """

    expert: int
    seen: Tensor
    routed: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Done:
    """What is to be stored of one expert, by projection, and its answers, chunk by chunk, not weighted."""

    stored: dict[str, Any]
    answers: list[Tensor]


Work = Callable[[Tensor, Asked], Done]
"""(inputs of the layer (T, H), what is asked of an expert) -> what became of it."""


def rounded(crew: Crew, work: Work, x_TH: Tensor, asked: Sequence[Asked]) -> Iterator[Done]:
    """The results of `work`, which can be pickled, in order."""
    with tempfile.TemporaryDirectory(dir=crew.directory, prefix=".moeq-crew-") as name:
        directory = Path(name)
        torch.save(x_TH.contiguous(), directory / INPUTS)
        for path in crew.fleet.spread(partial(_away, work, directory), asked):
            found = torch.load(path)
            path.unlink()
            stored = {projection: QuantizedMatrix(**parts) for projection, parts in found["stored"].items()}
            yield Done(stored=stored, answers=found["answers"])


def _away(work: Work, directory: Path, asked: Asked) -> Path:
    """Round one expert; where the result lies, whole."""
    x_TH = torch.load(directory / INPUTS, mmap=True)
    with torch.inference_mode():
        done = work(x_TH, asked)
    stored = {
        projection: {name: getattr(part, name) for name in QuantizedMatrix.__slots__}
        for projection, part in done.stored.items()
    }
    path = directory / f"{asked.expert}.pt"
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        torch.save({"stored": stored, "answers": done.answers}, file)
    Path(file.name).replace(path)
    return path

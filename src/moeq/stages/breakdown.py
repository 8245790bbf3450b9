"""Where the time of a decoded token goes, module by module; each without the modules that it calls."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import nn

NUMBERS: Final = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Modules of one name, whatever layer they are in.

    Attributes:
        module: path in the model, numbers as `*`.
        kind: name of the class.
        calls: how often they are called for a token.
        milliseconds: what they take of a token, themselves.
        share: of the token's time.
    """

    module: str
    kind: str
    calls: float
    milliseconds: float
    share: float


class Breakdown:
    """Seconds and calls by (path, class), collected while modules run; see `watched`."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self.calls: dict[tuple[str, str], int] = {}
        self._running: list[list[float]] = []

    def enter(self, *_: Any) -> None:
        """A module starts."""
        self._running.append([time.perf_counter(), 0.0])

    def leave(self, key: tuple[str, str], *_: Any) -> None:
        """The module that started last is done."""
        started, inside = self._running.pop()
        taken = time.perf_counter() - started
        if self._running:
            self._running[-1][1] += taken
        self.seconds[key] = self.seconds.get(key, 0.0) + taken - inside
        self.calls[key] = self.calls.get(key, 0) + 1

    def parts(self, tokens: int) -> tuple[Part, ...]:
        """By time, longest first."""
        total = sum(self.seconds.values())
        found = [
            Part(
                module=path or "(model)",
                kind=kind,
                calls=self.calls[path, kind] / tokens,
                milliseconds=1e3 * seconds / tokens,
                share=seconds / total,
            )
            for (path, kind), seconds in self.seconds.items()
        ]
        return tuple(sorted(found, key=lambda part: -part.share))


@contextmanager
def watched(model: nn.Module) -> Iterator[Breakdown]:
    """Collect what the model's modules take while the context lasts; that itself costs each call some microseconds."""
    found = Breakdown()
    hooks = []
    for path, module in model.named_modules():
        key = NUMBERS.sub("*", path), type(module).__name__
        hooks.append(module.register_forward_pre_hook(found.enter, prepend=True))
        hooks.append(module.register_forward_hook(partial(found.leave, key)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

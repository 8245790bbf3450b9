"""Stand-ins for decoder blocks: the family's own model drives, somebody else computes its blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

RunBlock = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
"""(module path of the block, its arguments, its keyword arguments) -> what the block returns."""


class EnoughError(Exception):
    """Raised out of a stand-in when nobody needs what the driving model would do next."""


class StandIn(nn.Module):
    """Takes a decoder block's place in the driving model."""

    def __init__(self, block: nn.Module, path: str, run: RunBlock) -> None:
        super().__init__()
        self._path = path
        self._run = run
        # Past nn.Module's bookkeeping: the block must not count as a part of the driving model.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        # Drivers read plain facts off their blocks (attention_type, layer_idx, ...).
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever `run` answers for the block."""
        return self._run(self._path, args, kwargs)


@contextmanager
def replaced(driver: nn.Module, blocks: Sequence[str], run: RunBlock) -> Iterator[None]:
    """Let `run` compute the blocks of `driver` for a while; they are back in place afterwards."""
    originals = {path: driver.get_submodule(path) for path in blocks}
    try:
        for path, block in originals.items():
            _put(driver, path, StandIn(block, path, run))
        yield
    finally:
        for path, block in originals.items():
            _put(driver, path, block)


def _put(driver: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    driver.get_submodule(parent)._modules[name] = module

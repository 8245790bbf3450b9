"""Which values of a parameter are tried at every commit, and which by `make nightly`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly(value: Any) -> Any:
    """A value that waits for the night; a tuple is one of several parameters together."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.nightly)


def by_day(values: Iterable[Any], daily: Collection[Any]) -> list[Any]:
    """All values; those that are not in `daily` wait for the night."""
    return [value if value in daily else nightly(value) for value in values]

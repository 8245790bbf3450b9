"""Checks of a cost's options: they may come from a command line or a YAML file, as anything."""

import math
from collections.abc import Sequence

from moeq.errors import OptionError


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raise OptionError unless `value` is one of `choices`."""
    if value not in choices:
        raise OptionError(f"{value!r} cannot be used", option=option, fix=f"choose one of {', '.join(choices)}")


def check_switch(option: str, value: object) -> None:
    """Raise OptionError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise OptionError(f"{value!r} cannot be used", option=option, fix="choose true or false")


def check_number(option: str, value: object, least: float = 0.0, *, whole: bool = False) -> None:
    """Raise OptionError unless `value` is a finite number of at least `least`, an integer if `whole`."""
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < math.inf:
        kind = "whole number" if whole else "number"
        raise OptionError(f"{value!r} cannot be used", option=option, fix=f"choose a {kind} from {least:g} on")

"""Values of options as they come from a command line, a YAML file or Python."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from moeq import codec
from moeq.errors import ArtifactError, OptionError

TEXTS_OF_NUMBERS = ("size", "dense_bits", "routing", "candidates", "progressive", "rank")
"""Options that are texts and may be given as a whole number."""


def named_values(text: str | None, option: str, example: str) -> dict[str, Any]:
    """The names and values of "NAME=VALUE,..."; values are YAML scalars."""
    found: dict[str, Any] = {}
    for part in (text or "").split(","):
        name, equals, value = part.partition("=")
        if part.strip() and (not equals or not name.strip()):
            raise OptionError(f"{part.strip()!r} is not NAME=VALUE", option=option, fix=f"write for example {example}")
        if part.strip():
            found[name.strip().replace("-", "_")] = yaml.safe_load(value.strip() or "null")
    return found


def typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type that the field has; numbers and paths pass for the texts they stand for."""
    if isinstance(value, PurePath) or (name in TEXTS_OF_NUMBERS and type(value) is int):
        value = str(value)
    option = name.replace("_", "-")
    try:
        return codec.decode(kind, value, option)
    except ArtifactError as error:
        raise OptionError(error.message, option=option, fix="give a value of that type") from error


def choose(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise OptionError unless `value` is one of `choices`."""
    if value not in choices:
        legal = ", ".join(str(choice) for choice in choices)
        raise OptionError(f"{value!r} is not supported", option=option, fix=f"choose one of {legal}")


def numbers(text: str | None, option: str, what: str, example: str) -> tuple[float, ...]:
    """The numbers of "3,2.5"; none without a text."""
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(
            f"{text!r} is not a list of {what}", option=option, fix=f"write for example {example}"
        ) from None


def widths(text: str, option: str, choices: tuple[int, ...]) -> tuple[int, ...]:
    """The code widths of "1,2,3", rising."""
    parts = [part.strip() for part in text.split(",")]
    found = sorted({int(part) for part in parts if part.isdecimal()})
    if len(found) != len(parts):
        raise OptionError(f"{text!r} is not a list of widths", option=option, fix="write for example 1,2,3")
    for width in found:
        choose(option, width, choices)
    return tuple(found)


def by_kind(
    text: str, option: str, legal: Mapping[str, tuple[int | str, ...]], common: tuple[str, ...]
) -> dict[str, int | str]:
    """Kind -> width of "attention=4,lm_head=8"; one width alone is that of the `common` kinds, the others have 16."""
    found: dict[str, int | str] = dict.fromkeys(legal, 16)
    if "=" in text:
        for part in text.split(","):
            kind, _, said = part.strip().partition("=")
            choose(option, kind, tuple(legal))
            found[kind] = int(said) if said.isdecimal() else said
    else:
        found.update(dict.fromkeys(common, int(text) if text.isdecimal() else text))
    for kind, width in found.items():
        choose(option, width, legal[kind])
    return found

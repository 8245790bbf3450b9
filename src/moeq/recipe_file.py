"""Recipes as YAML files."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from moeq.errors import OptionError, RecipeError
from moeq.recipe import Recipe


def load_recipe(path: Path) -> dict[str, Any]:
    """The options a YAML file gives, by name; a null counts as not given.

    Raises:
        RecipeError: not readable, not YAML, unknown keys, or values that a Recipe refuses.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", file=path, fix="give a mapping of options") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"cannot read the recipe: {reason}", file=path, fix="give a YAML file") from error
    fields = [field.name for field in dataclasses.fields(Recipe)]
    known = f"options are {', '.join(sorted(fields))}"
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping of options", file=path, fix=known)
    options: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise RecipeError(f"unknown option {str(key)[:40]!r}", file=path, fix=known)
        if name in options:
            raise RecipeError(f"option {name!r} is given twice", file=path, fix="drop one of them")
        if value is not None:
            options[name] = value
    try:
        recipe = Recipe(**options)
    except OptionError as error:
        raise RecipeError(error.message, file=path, option=error.option, fix=error.fix) from error
    return {name: getattr(recipe, name) for name in options}

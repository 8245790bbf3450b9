"""What a run does where nothing was said: the method, the text, and presets. Chosen by docs/evidence.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moeq.arch.gguf_source import open_source
from moeq.arch.named_experts import brings_code
from moeq.calibration.texts import BUNDLED, NO_TEXT
from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.costs.registry import COSTS, make_cost
from moeq.errors import MoeqError
from moeq.methods import METHODS, method
from moeq.option_values import choose
from moeq.quantizers.registry import QUANTIZERS
from moeq.runtime.load import load_tokenizer, predicts_tokens

METHOD: Final = "auto"
"""The method where none was named and there is text."""
PAPER: Final = "gemq"
"""The method where a preset was named and no method."""
PRESETS: Final = ("paper",)
"""paper: `moeq.methods.Method.paper`."""
ALIKE: Final = ("vector",)
"""Quantizers for whose widths no costs are measured."""


def filled(model: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, with a method and a text where none was named.

    A text that nobody asked for is not insisted on: a model that has no tokenizer, predicts no tokens or brings its own
    code is rounded without one, evenly. What is chosen is said by `moeq plan` and in the report.

    Args:
        model: as the stages take it.
        options: of a `moeq.recipe.Recipe`, and "preset"; None is nothing said.

    Raises:
        OptionError: there is no such preset or method.
    """
    given = {name: value for name, value in options.items() if value is not None}
    preset = given.pop("preset", None)
    if preset is not None:
        choose("preset", preset, PRESETS)
        given = {"method": PAPER, **given}
        given = dict(method(given["method"]).paper) | given
    named = QUANTIZERS.get(str(given.get("quantizer")))
    if "plan" in given:
        heard = "calibration" in given or (named is not None and not named.needs_hessian)
        return given if heard or not (_speaks(model) and _has_tokenizer(model)) else given | {"calibration": BUNDLED}
    text = given.get("calibration")
    if text == NO_TEXT:
        return {"method": "uniform"} | given
    others = {"cost", *(option for row in METHODS.values() for option in row.own_options)}
    even = bool(others & given.keys()) or str(given.get("quantizer")) in ALIKE
    even |= text is None and named is not None and not named.needs_hessian
    chosen = given.get("method", "uniform" if even or not _speaks(model) else METHOD)
    if text is not None:
        return given | {"method": chosen}
    if not _needs_text(given, chosen):
        return given | {"method": chosen, "calibration": NO_TEXT}
    if _speaks(model) and _has_tokenizer(model):
        return given | {"method": chosen, "calibration": BUNDLED}
    if "method" not in given:
        return given | {"method": "uniform", "calibration": NO_TEXT}
    return given if _sees_text(method(chosen).cost) else given | {"calibration": NO_TEXT}


def _needs_text(given: Mapping[str, Any], chosen: str) -> bool:
    """Whether anything of a run looks at text."""
    own, row = method(chosen), method(given.get("allocation", chosen))
    quantizer = QUANTIZERS.get(str(given.get("quantizer", own.quantizer)))
    cost = given.get("cost", row.cost)
    return (
        (quantizer is not None and quantizer.needs_hessian)
        or (_sees_text(cost) and "costs" not in given)
        or given.get("router", own.router) != "none"
        or given.get("tune", "none") != "none"
        or bool(given.get("compensate"))
    )


def _sees_text(cost: str | None) -> bool:
    """Whether a cost looks at more than weights; one that nobody knows is for others to complain of."""
    return cost in COSTS and make_cost(str(cost)).needs != "weights"


def _speaks(model: str | Path) -> bool:
    """Whether a model predicts tokens, by code of transformers; what cannot be read is for others to complain of."""
    try:
        source = open_source(model)
        return not brings_code(read_config(source / CONFIG_NAME)) and predicts_tokens(source)
    except MoeqError:
        return True


def _has_tokenizer(model: str | Path) -> bool:
    try:
        load_tokenizer(open_source(model))
    except MoeqError:
        return False
    return True

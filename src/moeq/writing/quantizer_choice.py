"""The quantizers that a recipe means, and their options."""

from dataclasses import replace
from typing import Any, Final

from moeq.errors import OptionError
from moeq.methods import method
from moeq.quantizers.base import Quantizer
from moeq.quantizers.registry import QUANTIZERS, make_quantizer
from moeq.recipe import Recipe

DENSE_QUANTIZER: Final = "rtn"
"""What rounds linears outside the experts without text (docs/decisions/0011)."""
HEARD_QUANTIZER: Final = "gptq"
"""What rounds them with it."""


def quantizer_options(recipe: Recipe, name: str) -> dict[str, Any]:
    """What `make_quantizer` is to be given for a quantizer; nothing for a name that nobody knows."""
    found = QUANTIZERS.get(name)
    return {} if found is None else {option: getattr(recipe, option) for option in found.options}


def chosen_quantizer(recipe: Recipe) -> Quantizer:
    """What rounds the experts.

    Raises:
        OptionError: nobody knows its name.
    """
    return make_quantizer(str(recipe.quantizer), **quantizer_options(recipe, str(recipe.quantizer)))


def settled(recipe: Recipe) -> Recipe:
    """`Recipe.settled`; down is fitted only where the quantizer sees text.

    Raises:
        OptionError: the recipe asks for that by name where it does not.
    """
    found = recipe.settled()
    quantizer = QUANTIZERS.get(str(found.quantizer))
    if quantizer is None or (quantizer.needs_hessian and found.text):
        return found
    if recipe.compensate:
        raise OptionError(
            f"{found.quantizer} sees no text that down could be fitted to",
            option="compensate",
            fix="use --quantizer gptq or trellis, with text",
        )
    return replace(found, compensate=False)


def dataless_quantizer(recipe: Recipe) -> Quantizer:
    """What rounds experts that see no text in a run which has some."""
    # Trellises and blocks are for their own quantizers, which can do without.
    own = {"trellis": "trellis", "ggml": "ggml-rtn", "ggml-rtn": "ggml-rtn"}
    name = own.get(str(recipe.quantizer), method(recipe.method).dataless)
    return make_quantizer(name, **quantizer_options(recipe, name))


def dense_name(recipe: Recipe) -> str:
    """The name of what rounds linears outside the experts without text."""
    return recipe.served.dataless or DENSE_QUANTIZER


def dense_quantizer(recipe: Recipe) -> Quantizer:
    """What rounds linears outside the experts without text."""
    return make_quantizer(dense_name(recipe), gain=recipe.gain)


def heard_quantizer(recipe: Recipe) -> Quantizer:
    """What rounds linears outside the experts whose inputs calibration saw."""
    name = recipe.served.quantizer or HEARD_QUANTIZER
    return make_quantizer(name, **quantizer_options(recipe, name))

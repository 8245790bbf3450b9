"""What several stages make of a recipe: calibration tokens, and the options of its quantizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moeq.calibration.tokens import TokenBatch, read_documents, sample_tokens
from moeq.errors import MoeqError, OptionError
from moeq.recipe import Recipe
from moeq.stages import quality

HELD_OUT = 8
"""Windows of calibration text kept aside to measure quality on."""
GAINED = ("rtn", "hqq", "gptq", "vector")
"""Quantizers that can match the gain of what they rounded."""


def quantizer_options(recipe: Recipe) -> dict[str, Any]:
    """What `moeq.quantizers.registry.make_quantizer` is to be given for the recipe's quantizer."""
    name = str(recipe.quantizer)
    options: dict[str, Any] = {"gain": recipe.gain} if name in GAINED else {}
    if name in ("gptq", "vector"):
        options |= {"act_order": recipe.act_order, "damp": recipe.damp}
    return options


def calibration_tokens(
    source: Path, recipe: Recipe, needed_by: str | None
) -> tuple[TokenBatch | None, TokenBatch | None]:
    """Calibration tokens, and a few windows after them that calibration will not see.

    Args:
        source: the checkpoint, for its tokenizer.
        recipe: names the text, and how much of it.
        needed_by: what cannot do without, or None.

    Raises:
        OptionError: no text was given, and it is needed.
        CalibrationError: the text is too short or cannot be read.
    """
    if recipe.calibration is None:
        if needed_by is not None:
            raise OptionError(
                f"{needed_by} needs calibration text", option="calibration", fix="give a file, or use hqq"
            )
        return None, None
    tokenizer = quality.load_tokenizer(source)
    documents = read_documents(recipe.calibration)
    tokens = sample_tokens(
        tokenizer, documents, recipe.nsamples, recipe.seqlen, recipe.seed, source=Path(recipe.calibration).name
    )
    try:
        more = sample_tokens(tokenizer, documents, recipe.nsamples + HELD_OUT, recipe.seqlen, recipe.seed)
    except MoeqError:
        return tokens, None
    return tokens, replace(more, ids_NT=more.ids_NT[recipe.nsamples :])

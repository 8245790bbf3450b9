"""The calibration tokens that a recipe means, and a few windows that calibration will not see."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moeq.calibration.rows import Template
from moeq.calibration.tokens import TokenBatch, read_documents, sample_tokens
from moeq.errors import MoeqError, OptionError
from moeq.recipe import Recipe
from moeq.runtime.load import load_tokenizer

HELD_OUT = 8
"""Windows of calibration text kept aside to measure quality on."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The chat template of a tokenizer, None if it has none."""
    if not tokenizer.chat_template:
        return None
    return lambda messages, tools: str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


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
    tokenizer = load_tokenizer(source)
    documents = read_documents(recipe.calibration, template=template_of(tokenizer))
    tokens = sample_tokens(
        tokenizer, documents, recipe.nsamples, recipe.seqlen, recipe.seed, source=Path(recipe.calibration).name
    )
    try:
        more = sample_tokens(tokenizer, documents, recipe.nsamples + HELD_OUT, recipe.seqlen, recipe.seed)
    except MoeqError:
        return tokens, None
    return tokens, replace(more, ids_NT=more.ids_NT[recipe.nsamples :])

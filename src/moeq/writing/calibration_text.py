"""The calibration tokens that a recipe means, and a few windows that calibration will not see."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moeq.calibration.rows import Message, Template
from moeq.calibration.texts import Text, interleaved, parse_texts, samples_of
from moeq.calibration.tokens import TokenBatch, read_documents, sample_tokens, token_hash
from moeq.errors import MoeqError, OptionError
from moeq.quantizers.base import Quantizer
from moeq.recipe import Recipe
from moeq.runtime.load import load_tokenizer

HELD_OUT = 8
"""Windows of calibration text kept aside to measure quality on."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The chat template of a tokenizer, None if it has none.

    What it writes begins without the token that the tokenizer itself puts before every text.
    """
    if not tokenizer.chat_template:
        return None
    marks = (tokenizer("")["input_ids"] and tokenizer.bos_token) or ""

    def template(messages: list[Message], tools: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)).removeprefix(marks)

    return template


def calibration_tokens(
    source: Path, recipe: Recipe, needed_by: str | None, instead: str = "", held_out: int = HELD_OUT
) -> tuple[TokenBatch | None, TokenBatch | None]:
    """Calibration tokens, and a few windows after them that calibration will not see.

    Args:
        source: the checkpoint, for its tokenizer.
        recipe: names the texts, and how much of them.
        needed_by: what cannot do without, or None.
        instead: what else the user can do, for the message.
        held_out: how many windows are kept aside; more if there are more texts.

    Raises:
        OptionError: no text was given, and it is needed; or the texts are named in a way that makes no sense.
        CalibrationError: a text is too short or cannot be read.
    """
    if recipe.text is None:
        if needed_by is not None:
            fix = "give a text" + (instead and f", or {instead}")
            raise OptionError(f"{needed_by} needs calibration text", option="calibration", fix=fix)
        return None, None
    texts = parse_texts(recipe.text)
    shares = tuple(text.share for text in texts)
    counts = samples_of(shares, recipe.nsamples)
    kept = samples_of(shares, max(held_out, len(texts)))
    tokenizer = load_tokenizer(source)
    batches, rests = [], []
    for text, count, more in zip(texts, counts, kept, strict=True):
        batch, rest = _sampled(tokenizer, text, recipe, count, more)
        batches.append(batch)
        rests.append(rest)
    rest = None if None in rests else _mixed([each for each in rests if each is not None], texts)
    return _mixed(batches, texts), rest


def tokens_for(source: Path, recipe: Recipe, quantizer: Quantizer) -> tuple[TokenBatch | None, TokenBatch | None]:
    """What `calibration_tokens` gives to rounding and to router tuning; raises as it does."""
    if quantizer.needs_hessian:
        return calibration_tokens(source, recipe, recipe.quantizer, "--quantizer hqq")
    return calibration_tokens(source, recipe, None if recipe.router == "none" else "router tuning", "--router none")


def _sampled(
    tokenizer: PreTrainedTokenizerBase, text: Text, recipe: Recipe, count: int, more: int
) -> tuple[TokenBatch, TokenBatch | None]:
    """Samples of one text, and the windows after them if it has any."""
    template = template_of(tokenizer)
    rendered = 0

    def counted(messages: list[Message], tools: Any) -> str:
        nonlocal rendered
        rendered += 1
        assert template is not None
        return template(messages, tools)

    documents = read_documents(text.source, template=None if template is None else counted)
    tokens = sample_tokens(tokenizer, documents, count, recipe.seqlen, recipe.seed, source=text.name)
    tokens = replace(tokens, domains=(replace(tokens.domains[0], conversations=rendered),))
    try:
        longer = sample_tokens(tokenizer, documents, count + more, recipe.seqlen, recipe.seed, source=text.name)
    except MoeqError:
        return tokens, None
    return tokens, replace(longer, ids_NT=longer.ids_NT[count:], domain_N=(0,) * more)


def _mixed(batches: list[TokenBatch], texts: tuple[Text, ...]) -> TokenBatch:
    """One batch with the samples of all, spread evenly."""
    order = interleaved(tuple(len(batch.ids_NT) for batch in batches))
    rows = [iter(batch.ids_NT) for batch in batches]
    ids_NT = torch.stack([next(rows[domain]) for domain in order])
    weighted = len({text.share for text in texts}) > 1
    names = (f"{text.name}:{text.share:g}" if weighted else text.name for text in texts)
    return TokenBatch(
        ids_NT=ids_NT,
        hash=token_hash(ids_NT),
        source=",".join(names),
        seed=batches[0].seed,
        domains=tuple(domain for batch in batches for domain in batch.domains),
        domain_N=order,
    )

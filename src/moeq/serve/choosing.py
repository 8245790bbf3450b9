"""How the next token is chosen, and how likely it was. Legend: V vocabulary."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """What a request says of sampling.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only so many of the likeliest; 0 for all.
        min_p: only tokens at least this likely, relative to the likeliest.
        repetition: logits of tokens of prompt and answer are divided by this (Keskar et al. 2019, section 4.1).
        presence: taken from the logits of tokens that the answer has.
        frequency: taken from them once for every time that it has them.
        bias: token -> added to its logit.
        seed: the same seed gives the same answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Likely:
    """A token with the natural logarithm of its probability, before anything was done to it.

    Attributes:
        token: the token.
        logprob: None for the first token of a prompt, which nothing comes before.
        top: the likeliest tokens with theirs, in falling order.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer."""

    def __init__(self, how: Choosing, device: torch.device) -> None:
        self._how = how
        self._random = torch.Generator(device).manual_seed(how.seed)
        steps: list[Any] = []
        if how.repetition != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(how.repetition))
        if how.temperature:
            steps.append(TemperatureLogitsWarper(how.temperature))
            if how.top_k:
                steps.append(TopKLogitsWarper(how.top_k))
            if how.top_p < 1:
                steps.append(TopPLogitsWarper(how.top_p))
            if how.min_p > 0:
                steps.append(MinPLogitsWarper(how.min_p))
        self._steps = LogitsProcessorList(steps)

    def next(self, logits_V: Tensor, ids: Sequence[int], prompt: int) -> int:
        """The next token.

        Args:
            logits_V: of the last position, float32.
            ids: prompt and answer so far.
            prompt: tokens of the prompt.
        """
        how, scores_V = self._how, logits_V.clone()
        if (how.presence or how.frequency) and len(ids) > prompt:
            said = Counter(ids[prompt:])
            tokens = torch.tensor(list(said), device=scores_V.device)
            counts = torch.tensor(list(said.values()), device=scores_V.device, dtype=scores_V.dtype)
            scores_V[tokens] -= how.presence + how.frequency * counts
        for token, bias in how.bias.items():
            scores_V[token] += bias
        if self._steps:
            seen = ids if how.repetition != 1 else ids[-1:]  # nothing else looks at it
            scores_V = self._steps(torch.tensor([seen], device=scores_V.device), scores_V[None])[0]
        if how.temperature:
            return int(torch.multinomial(scores_V.softmax(-1), 1, generator=self._random))
        return int(scores_V.argmax())


def likely(logits_V: Tensor, token: int, top: int) -> Likely:
    """How likely a token was, and the `top` likeliest."""
    logs_V = logits_V.log_softmax(-1)
    values, ids = logs_V.topk(top) if top else (logs_V[:0], logs_V[:0])
    pairs = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return Likely(token=token, logprob=float(logs_V[token]), top=pairs)

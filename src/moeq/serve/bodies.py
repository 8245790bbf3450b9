"""The bodies of answers, whole and in parts, as OpenAI's interface has them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from moeq.serve.choosing import Likely
from moeq.serve.engine import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all bodies of one answer begin with."""

    kind: Literal["text_completion", "chat.completion"]
    key: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        """Whether a conversation is answered, not a text continued."""
        return self.kind == "chat.completion"

    def body(self, choices: list[dict[str, Any]], *, part: bool) -> dict[str, Any]:
        """A body with these choices."""
        kind = f"{self.kind}.chunk" if part and self.chat else self.kind
        return {"id": self.key, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class Choice:
    """One of the answers of a request: what came of it so far."""

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase, text: str = "") -> None:
        self.index, self.finish = index, None
        self.first = text
        """What is shown before the answer: the prompt, when it is to be repeated."""
        self._tokenizer, self._offset = tokenizer, 0
        self._text: list[str] = [text]
        self.likely: list[Likely] = []

    def take(self, piece: Piece) -> Piece:
        """Note a piece, and give it back."""
        self._text.append(piece.text)
        self.likely += piece.likely
        self.finish = piece.finish or self.finish  # type: ignore[assignment]
        return piece

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._text)

    def chat_logprobs(self, facts: Sequence[Likely]) -> dict[str, Any] | None:
        """Of a conversation."""
        if not facts:
            return None

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._word(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                {**entry(fact.token, fact.logprob), "top_logprobs": [entry(*pair) for pair in fact.top]}
                for fact in facts
            ]
        }

    def text_logprobs(self, facts: Sequence[Likely]) -> dict[str, Any] | None:
        """Of a continued text; offsets count characters of the tokens, one after the other."""
        if not facts:
            return None
        words = [self._word(fact.token) for fact in facts]
        offsets = [self._offset + sum(map(len, words[:at])) for at in range(len(words))]
        self._offset = offsets[-1] + len(words[-1])
        return {
            "tokens": words,
            "token_logprobs": [fact.logprob for fact in facts],
            "top_logprobs": [self._top(fact) for fact in facts],
            "text_offset": offsets,
        }

    def _top(self, fact: Likely) -> dict[str, float] | None:
        """The likeliest tokens and the one that stands there; None at the beginning of a text."""
        if fact.logprob is None:
            return None
        found = {self._word(fact.token): fact.logprob}
        for token, value in fact.top:  # tokens may look alike: the likelier counts
            found.setdefault(self._word(token), value)
        return found

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def whole(head: Head, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
    """The body of a request that does not stream."""
    return {**head.body([_whole(head, choice) for choice in choices], part=False), "usage": usage}


def _whole(head: Head, choice: Choice) -> dict[str, Any]:
    common = {"index": choice.index, "finish_reason": choice.finish}
    if head.chat:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {**common, "message": message, "logprobs": choice.chat_logprobs(choice.likely)}
    return {**common, "text": choice.text, "logprobs": choice.text_logprobs(choice.likely)}


def opening(head: Head, choice: Choice) -> dict[str, Any] | None:
    """The first event of a choice, if it has one."""
    common: dict[str, Any] = {"index": choice.index, "finish_reason": None, "logprobs": None}
    if head.chat:
        return head.body([{**common, "delta": {"role": "assistant", "content": ""}}], part=True)
    return head.body([{**common, "text": choice.first}], part=True) if choice.first else None


def part(head: Head, choice: Choice, piece: Piece) -> dict[str, Any]:
    """The event of a piece."""
    common = {"index": choice.index, "finish_reason": piece.finish}
    if head.chat:
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        return head.body([{**common, "delta": delta, "logprobs": choice.chat_logprobs(piece.likely)}], part=True)
    return head.body([{**common, "text": piece.text, "logprobs": choice.text_logprobs(piece.likely)}], part=True)


def ending(head: Head, usage: dict[str, Any]) -> dict[str, Any]:
    """The event that tells of tokens, after all others."""
    return {**head.body([], part=True), "usage": usage}

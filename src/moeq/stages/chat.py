"""Talks with a model: answers come piece by piece, what was said before stays in the model's cache."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moeq.arch.gguf_source import open_source
from moeq.errors import OptionError
from moeq.runtime.ahead import Told
from moeq.runtime.growing import growing_cache
from moeq.runtime.load import context_length, load_any, load_tokenizer
from moeq.runtime.prefix import kept

SEEDS: Final = 1 << 30
"""How many seeds the answers of a conversation take theirs from."""
Show = Callable[[str], None]
"""Takes the next piece of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was said and answered once.

    Attributes:
        user: what was said.
        assistant: the answer.
        prompt_tokens: of the whole conversation before it.
        cached_tokens: of these, those that the model had not to read again.
        new_tokens: of the answer.
        seconds: until the answer was complete.
        first_seconds: until its first piece.
        stopped: it was interrupted.
    """

    user: str
    assistant: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    seconds: float
    first_seconds: float
    stopped: bool

    @property
    def tokens_per_second(self) -> float:
        """After the first piece, which waits for the prompt."""
        spent = self.seconds - self.first_seconds
        return (self.new_tokens - 1) / spent if self.new_tokens > 1 and spent > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReport:
    """A conversation; field names are those of the JSON document (docs/json.md)."""

    model: str
    template: bool
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: of one answer.
        temperature: 0 is greedy.
        seed: of sampling; each answer goes on from where the last one was.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"{self.max_new_tokens} is too small", option="max-new-tokens", fix="give at least 1")
        if not self.temperature >= 0:
            raise OptionError(f"{self.temperature} is negative", option="temperature", fix="give 0 for greedy, or more")

    def arguments(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What transformers' `generate` is told of it."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        how = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, "pad_token_id": pad, **how}


class Pieces(TextStreamer):
    """Hands on text as it is decoded; knows when the first piece came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.parts: list[str] = []
        self.tokens = 0
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            self.first = self.first or time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that no later token changes."""
        if text:
            self.parts.append(text)
            self._show(text)


class Chat:
    """A conversation with a loaded model.

    Without a chat template in its tokenizer a model continues text, so that is what it does: what was said and
    answered is one text that grows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> None:
        self.template = bool(tokenizer.chat_template)
        if system and not self.template:
            raise OptionError("the model has no chat template", option="system", fix="leave it out")
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling or Sampling()
        self._system = [{"role": "system", "content": system}] if system else []
        self._random = torch.Generator().manual_seed(self._sampling.seed)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._said: list[dict[str, str]] = []
        self._cache: Any = None
        self._read: list[int] = []

    def answer(self, text: str, show: Show) -> Turn:
        """The answer to `text`; `show` gets its pieces as they come.

        Ctrl-C ends the answer, not the conversation: what was said so far counts.

        Raises:
            OptionError: there is nothing to answer.
        """
        self._said.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except OptionError:
            self._said.pop()
            raise
        cached = kept(self._cache, self._read, ids)
        if not cached:
            self._cache, self._read = None, []
        pieces, started, stopped = Pieces(self._tokenizer, show), time.perf_counter(), False
        try:
            self._generate(ids, pieces)
        except KeyboardInterrupt:
            stopped = True
            pieces.end()
            self._cache, self._read = None, []
        seconds = time.perf_counter() - started
        answer = "".join(pieces.parts)
        self._said.append({"role": "assistant", "content": answer})
        return Turn(
            user=text,
            assistant=answer,
            prompt_tokens=len(ids),
            cached_tokens=cached,
            new_tokens=pieces.tokens,
            seconds=seconds,
            first_seconds=seconds if pieces.first is None else pieces.first - started,
            stopped=stopped,
        )

    def _generate(self, ids: list[int], pieces: Pieces) -> None:
        ids_1T = torch.tensor([ids], device=self._model.device)
        with torch.random.fork_rng(enabled=self._sampling.temperature > 0), torch.inference_mode():
            torch.manual_seed(int(torch.randint(SEEDS, (), generator=self._random)))
            done = self._model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                past_key_values=growing_cache(self._model) if self._cache is None else self._cache,
                return_dict_in_generate=True,
                streamer=pieces,
                **self._sampling.arguments(self._tokenizer),
            )
        self._cache, self._read = done.past_key_values, done.sequences[0].tolist()

    def _ids(self) -> list[int]:
        if self.template:
            found: Mapping[str, Any] = self._tokenizer.apply_chat_template(
                [*self._system, *self._said], add_generation_prompt=True, return_dict=True
            )
            return list(found["input_ids"])
        return list(self._tokenizer("".join(part["content"] for part in self._said))["input_ids"])

    def _fitting(self) -> list[int]:
        """The conversation as tokens; its oldest turns are left out when the model cannot hold all."""
        limit = context_length(self._model)
        ids = self._ids()
        while len(ids) + self._sampling.max_new_tokens > limit and len(self._said) > 2:
            del self._said[:2]
            ids = self._ids()
        if not ids:
            raise OptionError("there is nothing to answer", option="prompt", fix="say something")
        if len(ids) >= limit:
            raise OptionError(
                f"{len(ids)} tokens are more than the model can hold ({limit})", option="prompt", fix="say less"
            )
        return ids


def open_chat(
    model: str | Path,
    *,
    sampling: Sampling,
    system: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    compiled: Told | None = None,
) -> tuple[str, Chat]:
    """The directory of a model, and a conversation with it.

    Raises:
        OptionError: a system prompt for a model that has no place for one.
        CheckpointError, PackedError: the model cannot be loaded.
    """
    directory = open_source(model)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    loaded = load_any(directory, device, exact_activations=None, trust_remote_code=trust_remote_code, compiled=compiled)
    return str(directory), Chat(loaded, tokenizer, sampling, system)

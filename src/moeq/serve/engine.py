"""One thread that owns a model and answers many requests, a token of each in turn.

Nothing of the web is known here. A request that is cancelled is dropped before its next token. What a model has read
of the latest conversations stays in memory, so that a turn of a chat costs only what is new in it.
"""

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeq.runtime.growing import growing_cache
from moeq.runtime.load import context_length
from moeq.runtime.prefix import common, kept
from moeq.serve.choosing import Chooser, Choosing, Likely, likely
from moeq.serve.words import Words

Finish = Literal["stop", "length", "cancelled", "memory", "fault"]
"""Why an answer ended: it was complete, was long enough, was not wanted any more, or failed."""
CHUNK: Final = 512
"""Tokens of a prompt that are read before others get their turn."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What came of an answer at once.

    Attributes:
        text: more of its text, perhaps "".
        likely: its tokens, if asked for; with `echo` first those of the prompt.
        finish: set in the last piece.
    """

    text: str = ""
    likely: tuple[Likely, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One answer that is wanted.

    Attributes:
        ids: the prompt.
        max_tokens: of the answer; 0 only reads the prompt.
        choosing: how its tokens are chosen.
        stop: strings that end it.
        logprobs: so many likeliest tokens are told with each token; None tells nothing.
        echo: tell of the prompt's tokens too.
    """

    ids: tuple[int, ...]
    max_tokens: int
    choosing: Choosing = field(default_factory=Choosing)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False


class Job:
    """An answer in the making."""

    def __init__(self, ask: Ask, tell: Callable[[Piece], None]) -> None:
        self.ask, self.tell = ask, tell
        self.cancelled = False
        self.ids = list(ask.ids)
        """Prompt and answer."""
        self.reused = 0
        """Tokens of the prompt that had been read before."""
        self.cache: Any = None
        self.read = 0
        self.chooser: Chooser | None = None
        self.words: Words | None = None
        self.facts: list[Likely] = []

    @property
    def made(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[len(self.ask.ids) :]

    def cancel(self) -> None:
        """It is not wanted any more; may be called from any thread."""
        self.cancelled = True


class Engine:
    """Answers requests with one model; use it as a context."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, running: int = 8, conversations: int = 4
    ) -> None:
        """Make it.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            running: answers that are made in turns; others wait.
            conversations: how many finished ones stay in memory.
        """
        self.model, self.tokenizer = model, tokenizer
        self.limit = context_length(model)
        self.tokens = self.answers = 0
        eos = [model.generation_config.eos_token_id if model.generation_config else None, tokenizer.eos_token_id]
        self._ends = {int(i) for each in eos for i in (each if isinstance(each, list) else [each]) if i is not None}
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._running, self._conversations = running, conversations
        self._jobs: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._kept: deque[tuple[list[int], Any]] = deque(maxlen=conversations)
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="moeq-engine", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Make no more tokens; answers in the making end as cancelled."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    @property
    def load(self) -> int:
        """Answers that are made or wait."""
        return len(self._jobs) + len(self._waiting)

    def submit(self, ask: Ask, tell: Callable[[Piece], None]) -> Job:
        """Begin an answer; `tell` gets its pieces, in the engine's thread."""
        job = Job(ask, tell)
        with self._wake:
            if not self._stopped:
                self._waiting.append(job)
                self._wake.notify()
                return job
        tell(Piece(finish="cancelled"))
        return job

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._jobs or self._waiting or self._stopped):
                        self._wake.wait()
                    if self._stopped:
                        break
                    while self._waiting and len(self._jobs) < self._running:
                        self._jobs.append(self._waiting.popleft())
                for job in self._jobs[:]:
                    self._turn(job)
        for job in (*self._jobs, *self._waiting):
            self.answers += 1
            job.tell(Piece(finish="cancelled"))

    def _turn(self, job: Job) -> None:
        """A chunk of its prompt, or a token."""
        try:
            finish = "cancelled" if job.cancelled else self._step(job)
        except (MemoryError, torch.OutOfMemoryError):
            job.cache, finish = None, "memory"
            self._kept.clear()
        except Exception:  # the thread serves others: whatever a model raises ends one answer only
            log.exception("an answer failed")
            job.cache, finish = None, "fault"
        if finish is None:
            return
        self._jobs.remove(job)
        self.answers += 1
        if job.cache is not None and self._conversations:
            self._kept.append((job.ids, job.cache))
        job.cache = None
        job.tell(Piece(text=job.words.rest() if job.words else "", likely=tuple(job.facts), finish=finish))

    def _step(self, job: Job) -> Finish | None:
        ask = job.ask
        if job.words is None:
            job.words = Words(self.tokenizer, ask.stop)
            job.chooser = Chooser(ask.choosing, self.model.device)
            job.cache = self._begun(job)
            if ask.echo and ask.logprobs is not None:
                job.facts.append(Likely(token=ask.ids[0], logprob=None))
        assert job.chooser is not None
        logits_TV = self._read(job, job.ids[job.read : job.read + CHUNK])
        if job.read < len(ask.ids):
            return None
        whole = len(ask.ids) + ask.max_tokens
        if len(job.ids) >= whole:
            return "length"
        token = job.chooser.next(logits_TV[-1], job.ids, len(ask.ids))
        job.ids.append(token)
        self.tokens += 1
        if ask.logprobs is not None:
            job.facts.append(likely(logits_TV[-1], token, ask.logprobs))
        if token in self._ends:
            return "stop"
        text = job.words.add(token)
        if job.words.stopped or len(job.ids) >= whole:
            job.tell(Piece(text=text))
            return "stop" if job.words.stopped else "length"
        if text:
            job.tell(Piece(text=text, likely=tuple(job.facts)))
            job.facts.clear()
        return None

    def _read(self, job: Job, ids: list[int]) -> Tensor:
        """Logits after the tokens `ids`, float32: of all of them if the prompt is told of, else of the last."""
        every = job.ask.echo and job.ask.logprobs is not None and job.read < len(job.ask.ids)
        more = {"logits_to_keep": 0 if every else 1} if self._last_only else {}
        done = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=job.cache,
            use_cache=True,
            **more,
        )
        job.cache = done["past_key_values"]
        logits_TV: Tensor = done["logits"][0].float()
        begun, job.read = job.read, job.read + len(ids)
        if every:
            next_ids = job.ask.ids[begun + 1 : job.read + 1]
            job.facts += [
                likely(row_V, n, job.ask.logprobs or 0) for row_V, n in zip(logits_TV, next_ids, strict=False)
            ]
        return logits_TV

    def _begun(self, job: Job) -> Any:
        """A cache that holds the beginning of a prompt, or an empty one; `job.read` says how much.

        A conversation is taken up only by one that shares most of it: others that share its beginning go on too.
        """
        ids = job.ask.ids
        best = max(self._kept, key=lambda pair: common(pair[0], ids), default=None)
        if best is not None and not job.ask.echo and common(best[0], ids) > len(best[0]) // 2:
            self._kept.remove(best)
            job.read = job.reused = kept(best[1], best[0], ids)
            if job.read:
                return best[1]
        return growing_cache(self.model)

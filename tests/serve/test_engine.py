"""Answers of the engine are those of transformers' generate; turns, reuse, cancelling, faults change nothing."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeq.runtime.load import load_any, load_tokenizer
from moeq.serve import engine as engine_module
from moeq.serve.choosing import Choosing
from moeq.serve.engine import Ask, Engine, Job, Piece

GREEDY = Choosing(temperature=0.0)
TEXTS = ("The old man looked at the sea and", "In the beginning", "She said that the boy")


@pytest.fixture(scope="module")
def tokenizer(packed_demo: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(packed_demo)


@pytest.fixture(scope="module")
def model(packed_demo: Path) -> PreTrainedModel:
    return load_any(packed_demo, "cpu", dtype=torch.float32)


@pytest.fixture
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    with Engine(model, tokenizer) as engine:
        yield engine


class Answer:
    """Waits for the pieces of one answer."""

    def __init__(self, engine: Engine, ask: Ask) -> None:
        self.pieces: list[Piece] = []
        self._done = threading.Event()
        self.job: Job = engine.submit(ask, self._take)

    def _take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish is not None:
            self._done.set()

    def wait(self) -> "Answer":
        assert self._done.wait(60)
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def logprobs(self) -> list[Any]:
        return [fact for piece in self.pieces for fact in piece.likely]


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text)["input_ids"])


def test_answers_are_those_of_generate(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Several at once, in turns."""
    answers = [
        Answer(engine, Ask(ids=ids_of(tokenizer, text), max_tokens=12, choosing=GREEDY, logprobs=2)) for text in TEXTS
    ]
    for text, answer in zip(TEXTS, answers, strict=True):
        ids_1T = torch.tensor([ids_of(tokenizer, text)])
        done = model.generate(
            ids_1T, max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        made = done.sequences[0, ids_1T.shape[1] :].tolist()
        assert answer.wait().job.made == made
        assert answer.text == tokenizer.decode(made, skip_special_tokens=True)
        logs_TV = torch.cat(done.logits).log_softmax(-1)
        wanted = [float(row_V[token]) for row_V, token in zip(logs_TV, made, strict=True)]
        assert [fact.logprob for fact in answer.logprobs] == pytest.approx(wanted, abs=1e-4)
        assert [fact.top[0][0] for fact in answer.logprobs] == made
        assert all(len(fact.top) == 2 and fact.top[0][1] >= fact.top[1][1] for fact in answer.logprobs)


def test_the_prompt_is_told_of(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and read in chunks."""
    ids = ids_of(tokenizer, TEXTS[0] * 3)
    with torch.inference_mode():
        logs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(row_V[token]) for row_V, token in zip(logs_TV[:-1], ids[1:], strict=True)]
    for chunk in (512, 5):
        monkeypatch.setattr(engine_module, "CHUNK", chunk)
        answer = Answer(engine, Ask(ids=ids, max_tokens=0, logprobs=1, echo=True)).wait()
        first, *rest = answer.logprobs
        assert (first.token, first.logprob, answer.job.made) == (ids[0], None, [])
        assert [fact.token for fact in rest] == list(ids[1:])
        assert [fact.logprob for fact in rest] == pytest.approx(wanted, abs=1e-4)


def test_seeds_and_penalties(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(tokenizer, TEXTS[0])

    def made(**how: Any) -> list[int]:
        return Answer(engine, Ask(ids=ids, max_tokens=48, choosing=Choosing(**how))).wait().job.made

    assert made(seed=1) == made(seed=1)
    assert made(seed=1) != made(seed=2)
    greedy = made(temperature=0)
    assert made(seed=3, top_k=1) == made(seed=4, top_p=1e-6) == made(seed=5, min_p=1.0) == greedy
    assert len(set(greedy)) < 48  # it repeats itself
    assert len(set(made(temperature=0, frequency=100.0))) == 48
    assert len(set(made(temperature=0, presence=100.0))) == 48
    assert len(set(made(temperature=0, repetition=9.0))) > len(set(greedy))
    assert set(made(temperature=0, bias={7: 100.0})) == {7}


def test_what_was_read_is_not_read_again(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(tokenizer, TEXTS[0] * 4)
    first = Answer(engine, Ask(ids=ids, max_tokens=6, choosing=GREEDY)).wait()
    assert first.job.reused == 0
    longer = (*ids, *first.job.made, *ids_of(tokenizer, " and then"))
    second = Answer(engine, Ask(ids=longer, max_tokens=6, choosing=GREEDY)).wait()
    assert second.job.reused == len(ids) + 5  # the last token made was not read
    forked = (*ids[:-3], *ids_of(tokenizer, " a boy"))
    third = Answer(engine, Ask(ids=forked, max_tokens=6, choosing=GREEDY)).wait()
    assert third.job.reused == len(ids) - 3
    other = Answer(engine, Ask(ids=(*ids[:4], 9, 9), max_tokens=6, choosing=GREEDY)).wait()
    assert other.job.reused == 0  # it leaves a conversation alone that shares only its beginning with it
    with Engine(engine.model, tokenizer, conversations=0) as anew:
        for answer in (second, third):
            again = Answer(anew, answer.job.ask).wait()
            assert (again.job.made, again.job.reused) == (answer.job.made, 0)


def test_cancelled_answers_end(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    ask = Ask(ids=ids_of(tokenizer, TEXTS[0]), max_tokens=1500, choosing=Choosing(bias={0: -100.0}))
    answers = [Answer(engine, ask) for _ in range(12)]  # more than run at once
    for answer in answers:
        answer.job.cancel()
    for answer in answers:
        assert answer.wait().pieces[-1].finish == "cancelled"
    assert engine.load == 0


def test_a_fault_ends_one_answer_only(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(tokenizer, TEXTS[0])
    forward = engine.model.forward

    def failing(input_ids: torch.Tensor, **more: Any) -> Any:
        if int(input_ids[0, 0]) == 5:
            raise MemoryError
        if int(input_ids[0, 0]) == 6:
            raise ValueError("broken")
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(engine.model, "forward", failing)
    good = Answer(engine, Ask(ids=ids, max_tokens=8, choosing=GREEDY))
    large = Answer(engine, Ask(ids=(5, *ids), max_tokens=8))
    broken = Answer(engine, Ask(ids=(6, *ids), max_tokens=8))
    ends = [answer.wait().pieces[-1].finish for answer in (good, large, broken)]
    assert ends == ["length", "memory", "fault"]


def test_leaving_ends_what_is_begun(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with Engine(model, tokenizer) as engine:
        answer = Answer(engine, Ask(ids=ids_of(tokenizer, TEXTS[0]), max_tokens=1500, choosing=Choosing(bias={0: -99})))
    assert answer.wait().pieces[-1].finish == "cancelled"

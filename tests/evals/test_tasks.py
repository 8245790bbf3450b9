from pathlib import Path

import pytest
import torch
from torch import nn

from moeq.errors import CalibrationError, OptionError
from moeq.evals.tasks import MinimalPair, minimal_pairs, read_pairs, sentence_log_probs


def naive_score(model: nn.Module, ids: list[int]) -> float:
    with torch.inference_mode():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(1, len(ids)))


@pytest.fixture(scope="module")
def pairs(text_dir: Path) -> list[MinimalPair]:
    return read_pairs(text_dir / "blimp.jsonl")


def test_bundled_pairs(pairs: list[MinimalPair]) -> None:
    assert len(pairs) == 670
    assert {pair.field for pair in pairs} == {"morphology", "semantics", "syntax", "syntax_semantics"}
    assert not any(pair.good == pair.bad for pair in pairs)


def test_accuracy_matches_a_naive_loop(model: nn.Module, demo_tokenizer, pairs: list[MinimalPair]) -> None:
    some = pairs[::17]
    hits: dict[str, list[bool]] = {}
    for pair in some:
        good, bad = (naive_score(model, [0, *demo_tokenizer(text)["input_ids"]]) for text in (pair.good, pair.bad))
        hits.setdefault(pair.field, []).append(good > bad)
    got = minimal_pairs(model, demo_tokenizer, some, batch_size=7)
    assert got.pairs == len(some) == 40
    assert got.fields == {field: sum(found) / len(found) for field, found in hits.items()}
    assert got.accuracy == sum(map(sum, hits.values())) / 40
    assert got.stderr == pytest.approx((got.accuracy * (1 - got.accuracy) / 40) ** 0.5)


def test_accuracy_of_the_demo_model(model: nn.Module, demo_tokenizer, pairs: list[MinimalPair]) -> None:
    # What its makers measured on the same pairs.
    assert minimal_pairs(model, demo_tokenizer, pairs).accuracy == pytest.approx(0.543, abs=0.005)


def test_padding_changes_nothing(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 4096, (n,), generator=generator) for n in (9, 2, 30, 5, 5, 17)]
    wanted = [naive_score(model, row.tolist()) for row in rows]
    for batch_size in (1, 4, 6):
        assert sentence_log_probs(model, rows, batch_size=batch_size) == pytest.approx(wanted, rel=1e-4)


def test_a_tie_is_a_miss(model: nn.Module, demo_tokenizer) -> None:
    same = MinimalPair(field="none", good="The cat sleeps.", bad="The cat sleeps.")
    assert minimal_pairs(model, demo_tokenizer, [same]).accuracy == 0.0


class Characters:
    """A tokenizer that adds an end token of its own unless told not to."""

    def __init__(self, bos: int | None, eos: int | None) -> None:
        self.bos_token_id = bos
        self.eos_token_id = eos

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text] + [2] * add_special_tokens}


@pytest.mark.parametrize(("bos", "eos", "start"), [(1, 2, [1]), (None, 2, [2]), (0, None, [0]), (None, None, [])])
def test_start_token(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, bos: int | None, eos: int | None, start: list[int]
) -> None:
    from moeq.evals import tasks

    seen = []

    def scores(_model, rows, **_options):
        seen.extend(row.tolist() for row in rows)
        return [0.0] * len(rows)

    monkeypatch.setattr(tasks, "sentence_log_probs", scores)
    minimal_pairs(model, Characters(bos, eos), [MinimalPair(field="a", good="ab", bad="ba")])
    assert seen == [[*start, 97, 98], [*start, 98, 97]]


def test_nothing_to_score(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="'a' has nothing to score"):
        minimal_pairs(model, Characters(None, None), [MinimalPair(field="a", good="a", bad="ab")])
    with pytest.raises(CalibrationError, match="no minimal pairs"):
        minimal_pairs(model, Characters(1, 2), [])
    with pytest.raises(OptionError, match="batch-size"):
        sentence_log_probs(model, [torch.arange(3)], batch_size=0)


def test_progress_counts_sentences(model: nn.Module, demo_tokenizer, pairs: list[MinimalPair]) -> None:
    seen = []
    minimal_pairs(model, demo_tokenizer, pairs[:3], batch_size=4, progress=lambda *counts: seen.append(counts))
    assert seen == [(4, 6), (6, 6)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"field": "a", "sentence_good": "b"}', "line 1 lacks"),
        ('{"field": "a", "sentence_good": "b", "sentence_bad": 3}', "line 1 lacks"),
        ("[1]", "line 1 is not a JSON object"),
        ("\n", "no pairs"),
    ],
)
def test_bad_pair_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_pairs(path)
    assert caught.value.file == str(path)

"""Calibration on several texts: how they are named, shared out, mixed, and told of."""

import json
from pathlib import Path

import pytest
import torch

from moeq.calibration.texts import interleaved, parse_texts, samples_of
from moeq.calibration.tokens import read_documents, sample_tokens
from moeq.errors import CalibrationError, OptionError
from moeq.recipe import Recipe
from moeq.writing.calibration_text import HELD_OUT, calibration_tokens


def shares(given: str) -> dict[str, float]:
    return {text.name: text.share for text in parse_texts(given)}


def test_texts_and_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shares("a.txt") == {"a.txt": 1}
    assert shares("a.txt, b.jsonl") == {"a.txt": 0.5, "b.jsonl": 0.5}
    assert shares("a.txt:3,b.jsonl:1") == {"a.txt": 0.75, "b.jsonl": 0.25}
    assert shares("org/name:en:1,org/name:de:1") == {"name:en": 0.5, "name:de": 0.5}
    assert shares("x/a.txt,y/a.txt") == {"x/a.txt": 0.5, "y/a.txt": 0.5}
    assert shares("bundled") == {"bundled web": 0.5, "bundled mixture": 0.5}
    assert shares("bundled-mixture") == {"bundled mixture": 1}
    assert shares("bundled:0.5,a.txt:0.5") == {"bundled web": 0.25, "bundled mixture": 0.25, "a.txt": 0.5}
    Path("bundled-x").write_text("a name is a name")
    assert shares("bundled-x") == {"bundled-x": 1}
    Path("a,b:0.5").write_text("a name is a name")
    assert shares("a,b:0.5") == {"a,b:0.5": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.txt,./a.txt", "named twice"),
        ("a.txt:1,a.txt:2", "named twice"),
        ("a.txt:1,b.txt", "some texts have weights"),
        ("a.txt:0,b.txt:1", "weight 0"),
        ("a.txt:-1,b.txt:1", "'-1' is no weight of a.txt"),
        ("a.txt:nan", "'nan' is no weight"),
        ("a.txt:half,b.txt:half", "'half' is no weight"),
        ("a.txt,", "no name"),
        (",", "no name"),
        ("bundled-code", "no text called 'code'"),
        ("bundled,bundled-web", "bundled web is named twice"),
    ],
)
def test_texts_named_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    with pytest.raises(OptionError, match=message) as caught:
        parse_texts(given)
    assert caught.value.option == "calibration"
    assert caught.value.fix


@pytest.mark.parametrize("total", range(3, 40))
def test_shares_are_kept_and_spread(total: int) -> None:
    given = (0.6, 0.3, 0.1)
    counts = samples_of(given, total)
    assert sum(counts) == total
    assert min(counts) >= 1
    assert all(abs(count - total * share) <= 1 for count, share in zip(counts, given, strict=True))
    order = interleaved(counts)
    assert tuple(order.count(text) for text in range(3)) == counts
    half = order[: total // 2]
    assert all(abs(half.count(text) - count / 2) <= 1 for text, count in enumerate(counts))


def test_fewer_samples_than_texts() -> None:
    with pytest.raises(OptionError, match="2 samples cannot be taken from 3 texts"):
        samples_of((0.5, 0.25, 0.25), 2)


def test_documents_are_separated_once(demo_tokenizer) -> None:
    """A tokenizer that marks nothing gets its end-of-text token between documents; one that marks them gets none."""
    ids = sample_tokens(demo_tokenizer, ["ab", "ab", "ab"], 1, 6, seed=0).ids_NT[0].tolist()
    document = demo_tokenizer("ab")["input_ids"]
    assert ids == ([*document, demo_tokenizer.eos_token_id] * 3)[:6]

    class Marking:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, *(ord(letter) for letter in text)]}

    assert sample_tokens(Marking(), ["ab", "ab"], 1, 6, seed=0).ids_NT[0].tolist() == [1, 97, 98, 1, 97, 98]


def test_a_directory_of_texts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "deep" / "a.md").write_text("# deep")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"text": "y"}')
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["two\nlines", "x", "y", "# deep"]


def test_samples_of_two_texts(demo_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"why {i} " * 20}]} for i in range(200)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(json.dumps(row) for row in rows))
    plain = text_dir / "calibration.txt"
    recipe = Recipe(calibration=f"{plain}:3,{chat}:1", nsamples=8, seqlen=32)
    tokens, rest = calibration_tokens(demo_dir, recipe, None)
    assert tokens is not None
    assert rest is not None
    assert tokens.source == "calibration.txt:0.75,chat.jsonl:0.25"
    assert [(domain.name, domain.samples) for domain in tokens.domains] == [("calibration.txt", 6), ("chat.jsonl", 2)]
    assert tokens.domain_N == (0, 0, 1, 0, 0, 0, 1, 0) or sorted(tokens.domain_N) == [0] * 6 + [1] * 2
    assert rest.ids_NT.shape == (HELD_OUT, 32)
    alone, _ = calibration_tokens(demo_dir, recipe.replace(calibration=str(plain), nsamples=6), None)
    assert alone is not None
    chosen = torch.tensor(tokens.domain_N) == 0
    assert torch.equal(tokens.ids_NT[chosen], alone.ids_NT)
    seen = {tuple(row) for row in tokens.ids_NT.tolist()}
    assert not seen & {tuple(row) for row in rest.ids_NT.tolist()}


def test_a_text_that_is_too_short_is_named(demo_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    recipe = Recipe(calibration=f"{text_dir / 'calibration.txt'},{short}", nsamples=8, seqlen=32)
    with pytest.raises(CalibrationError, match=r"short\.txt") as caught:
        calibration_tokens(demo_dir, recipe, None)
    assert "at most 0" not in str(caught.value.fix)

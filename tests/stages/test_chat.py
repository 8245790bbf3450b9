"""Conversations: the cache changes nothing but the time, templates are applied, interrupts end an answer only."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeq import cli_chat
from moeq.cli_chat import Wrapped
from moeq.errors import OptionError
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import generate
from moeq.stages.chat import Chat, Sampling, open_chat

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def with_template(packed_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(packed_demo, out)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return out


def opened(directory: Path, sampling: Sampling = GREEDY, **more: Any) -> Chat:
    return open_chat(directory, sampling=sampling, device="cpu", **more)[1]


def test_the_cache_changes_nothing(with_template: Path) -> None:
    """Against a conversation that reads everything anew each time."""
    kept, anew = opened(with_template, system="Be brief."), opened(with_template, system="Be brief.")
    for text in ("The old man", "and the sea", "and the boy"):
        anew._cache = None
        a, b = kept.answer(text, lambda _: None), anew.answer(text, lambda _: None)
        assert (a.assistant, a.prompt_tokens, a.new_tokens) == (b.assistant, b.prompt_tokens, b.new_tokens)
        assert b.cached_tokens == 0
        assert a.cached_tokens > 0.5 * (a.prompt_tokens - 12) or text == "The old man"
    kept.forget()
    assert kept.answer("The old man", lambda _: None).cached_tokens == 0


def test_the_answer_is_that_of_the_template(with_template: Path) -> None:
    shown: list[str] = []
    turn = opened(with_template).answer("Hello", shown.append)
    tokenizer, model = load_tokenizer(with_template), load_any(with_template, "cpu", exact_activations=None)
    ids = tokenizer("user: Hello\nassistant:", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert turn.assistant == "".join(shown) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert turn.prompt_tokens == ids.shape[1]


def test_without_a_template_it_continues_text(packed_demo: Path) -> None:
    chat = opened(packed_demo)
    assert not chat.template
    first = chat.answer("The old man", lambda _: None)
    alone = generate.run(packed_demo, "The old man", max_new_tokens=6, device="cpu")
    assert first.assistant == alone.continuation
    with pytest.raises(OptionError, match="chat template"):
        opened(packed_demo, system="Be brief.")


def test_seeds(packed_demo: Path) -> None:
    hot = Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    texts = [[opened(packed_demo, hot).answer("The", lambda _: None).assistant for _ in range(2)] for _ in range(2)]
    assert texts[0][0] == texts[0][1] == texts[1][0]
    other = Sampling(max_new_tokens=12, temperature=1.5, seed=4)
    assert opened(packed_demo, other).answer("The", lambda _: None).assistant != texts[0][0]


def test_an_interrupt_ends_the_answer_only(packed_demo: Path) -> None:
    chat, shown = opened(packed_demo, Sampling(max_new_tokens=40, temperature=0.0)), []

    def stop(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    turn = chat.answer("The old man", stop)
    assert turn.stopped
    assert turn.assistant.startswith("".join(shown[:2]))
    assert turn.new_tokens < 40
    again = chat.answer(" and", lambda _: None)
    assert not again.stopped
    assert again.prompt_tokens > turn.prompt_tokens


def test_what_does_not_fit(packed_demo: Path) -> None:
    chat = opened(packed_demo, Sampling(max_new_tokens=4, temperature=0.0))
    with pytest.raises(OptionError, match="more than the model can hold"):
        chat.answer("word " * 5000, lambda _: None)
    with pytest.raises(OptionError, match="nothing to answer"):
        chat.answer("", lambda _: None)
    assert chat.answer("The old man", lambda _: None).assistant
    chat._model.config.max_position_embeddings = chat.answer(" and", lambda _: None).prompt_tokens + 8
    last = chat.answer(" so", lambda _: None)
    assert last.prompt_tokens < 10, "the oldest turns were left out"


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_wrong_sampling(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Sampling(**changes)


def test_the_command_reads_lines(packed_demo: Path) -> None:
    words = [sys.executable, "-m", "moeq.cli", "run", str(packed_demo), "--device", "cpu", "--temperature", "0"]
    words += ["--max-new-tokens", "5"]
    said = subprocess.run(
        words, input="The old\n\n/clear\nThe old\n/exit\nno\n", capture_output=True, text=True, check=True
    )
    first, second = said.stdout.splitlines()[0], said.stdout.splitlines()[-1]
    assert first.strip()
    assert said.stdout.endswith(second + "\n")
    assert said.stderr == ""
    found = subprocess.run([*words, "--json"], input="The old\n and", capture_output=True, text=True, check=True)
    document = json.loads(found.stdout)
    assert [turn["user"] for turn in document["turns"]] == ["The old", " and"]
    assert document["turns"][1]["cached_tokens"] > 0


@pytest.mark.parametrize("size", [1, 3, 50])
def test_answers_are_broken_between_words(size: int) -> None:
    text = "The old man\nlooked at  the sea and said incomprehensibilities to it."
    shown: list[str] = []
    words = Wrapped(12, shown.append)
    for at in range(0, len(text), size):
        words.add(text[at : at + size])
    words.end()
    lines = "".join(shown).split("\n")
    assert lines == ["The old man", "looked at  ", "the sea and ", "said ", "incomprehensibilities", "to it."]
    plain: list[str] = []
    Wrapped(None, plain.append).add(text)
    assert plain == [text]


def test_the_end_of_input_ends_the_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After Ctrl-D the shell's prompt stood behind ours."""

    def nothing(_: str = "") -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nothing)
    assert list(cli_chat._lines(person=True)) == list(cli_chat._lines(person=False)) == []
    assert capsys.readouterr().err == "\n"

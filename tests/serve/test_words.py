"""Text of tokens as they come is the text of all of them, but for stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from moeq.serve.words import Words

TEXTS = ("The old man and the sea.", "naïve café — 😀👩‍👩‍👧 日本語", " \n\n  spaces ", "a" * 40)


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    words, found = Words(tokenizer, stop), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        found.append(words.add(token))
        if words.stopped:
            return found, True
    return [*found, words.rest()], words.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(demo_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    found, stopped = pieces(demo_tokenizer, text)
    ids = demo_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(found) == demo_tokenizer.decode(ids, skip_special_tokens=True)
    assert not stopped
    assert not any("�" in piece for piece in found)


@given(text=st.text(alphabet="abé😀 .", max_size=30), stop=st.text(alphabet="abé😀 .", min_size=1, max_size=4))
def test_nothing_of_a_stop_string_is_shown(demo_tokenizer: PreTrainedTokenizerBase, text: str, stop: str) -> None:
    ids = demo_tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = demo_tokenizer.decode(ids, skip_special_tokens=True)
    found, stopped = pieces(demo_tokenizer, text, (stop,))
    assert stopped == (stop in whole)
    assert "".join(found) == whole.partition(stop)[0]

"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What a decoder puts where the bytes of a character are not all there yet."""


class Words:
    """Text of one answer, token after token.

    A token alone has no text: it may be a part of a character, and many tokenizers join words by what stands before.
    So a few tokens before are decoded with it, and what they give by themselves is taken away.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from = self._shown = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; `stopped` says that a stop string came."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._shown])
        text = self._decode(self._ids[self._from :])
        if text.endswith(UNFINISHED) and len(self._ids) - self._shown < 8:
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return self._free(text[len(before) :])

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._from : self._shown])
        text = self._held + self._decode(self._ids[self._from :])[len(before) :]
        self._held, self._shown = "", len(self._ids)
        return self._cut(text)

    def _free(self, text: str) -> str:
        """Text up to what may be the beginning of a stop string."""
        text = self._cut(self._held + text)
        if self.stopped:
            return text
        most = max(map(len, self._stop), default=1) - 1
        sizes = range(min(most, len(text)), 0, -1)
        held = next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _cut(self, text: str) -> str:
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

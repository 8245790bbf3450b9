"""The conversation that `moeq run` holds in a terminal, or with whatever stdin is."""

import contextlib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator

from moeq.errors import OptionError
from moeq.stages.chat import Chat, Turn

HELP = "/clear forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"
PROMPT = "> "


def converse(chat: Chat, *, silent: bool) -> tuple[Turn, ...]:
    """Answer line after line of stdin until it ends; prints nothing if `silent`."""
    person = sys.stdin.isatty() and not silent
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back
        if not chat.template:
            _say("no chat template: the model continues your text")
        _say(HELP)
    turns = []
    for line in _lines(person):
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                break
            case "/clear":
                chat.forget()
                continue
            case "/help":
                _say(HELP)
                continue
        words = Wrapped(
            _columns() if person else None, lambda text: None if silent else print(text, end="", flush=True)
        )
        try:
            turn = chat.answer(line, words.add)
        except OptionError as error:
            print(error, file=sys.stderr)
            continue
        words.end()
        turns.append(turn)
        if not silent:
            print(flush=True)
            if person:
                _say(_facts(turn))
    return tuple(turns)


class Wrapped:
    """Text that comes in pieces, broken between words where a terminal would break inside of them."""

    def __init__(self, columns: int | None, show: Callable[[str], None]) -> None:
        """Make it; without `columns` nothing is broken."""
        self._columns, self._show = columns, show
        self._column, self._word = 0, ""

    def add(self, text: str) -> None:
        """Show what is complete of the text."""
        if self._columns is None:
            self._show(text)
            return
        *whole, self._word = re.split(r"(?<=\s)|(?=\s)", self._word + text)
        for word in whole:
            self._place(word)

    def end(self) -> None:
        """Show the rest."""
        self._place(self._word)
        self._word = ""

    def _place(self, word: str) -> None:
        if word == "\n":
            self._column = 0
        elif self._columns is not None and self._column and self._column + len(word) > self._columns:
            self._show("\n")
            self._column = 0
            word = word.lstrip(" ")
        if word:
            self._show(word)
            self._column += 0 if word == "\n" else len(word)


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _say(text: str) -> None:
    """A line that is not the model's."""
    print(textwrap.fill(text, _columns()), file=sys.stderr)


def _lines(person: bool) -> Iterator[str]:
    while True:
        try:
            line = input(PROMPT if person else "")
        except EOFError:
            if person:  # the shell's prompt would stand behind ours
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # at the prompt: an empty line, as in shells
            print(file=sys.stderr)
            if not person:
                return
            continue
        yield line


def _facts(turn: Turn) -> str:
    facts = [f"{turn.new_tokens} tokens", f"{turn.tokens_per_second:.1f} tokens/s", f"first {turn.first_seconds:.2f} s"]
    return f"[{', '.join(facts)}{', stopped' if turn.stopped else ''}]"

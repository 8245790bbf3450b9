"""The conversation that `moeq run` holds in a terminal, or with whatever stdin is."""

import contextlib
import sys
from collections.abc import Iterator

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
        print("" if chat.template else "no chat template: the model continues your text", file=sys.stderr)
        print(HELP, file=sys.stderr)
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
                print(HELP, file=sys.stderr)
                continue
        try:
            turn = chat.answer(line, lambda text: None if silent else print(text, end="", flush=True))
        except OptionError as error:
            print(error, file=sys.stderr)
            continue
        turns.append(turn)
        if not silent:
            print(flush=True)
            if person:
                print(_facts(turn), file=sys.stderr)
    return tuple(turns)


def _lines(person: bool) -> Iterator[str]:
    while True:
        try:
            line = input(PROMPT if person else "")
        except EOFError:
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

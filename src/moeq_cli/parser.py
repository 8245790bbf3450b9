"""argparse, kinder: one line for a mistake, with what was probably meant; help with groups and examples."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final, NoReturn

CHOICES: Final = re.compile(r"argument (.*): invalid choice: '(.*)' \(choose from (.*)\)")
UNKNOWN: Final = "unrecognized arguments: "
ENOUGH: Final = 0.6
"""Likeness from which a word is offered instead of another."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are short and suggest."""

    def __init__(self, **options: Any) -> None:
        usual: dict[str, Any] = {"allow_abbrev": False, "formatter_class": _formatter}
        super().__init__(**usual | options)
        self.verbs: dict[str, argparse.ArgumentParser] = {}
        """Verb -> its parser, for the parser of all verbs."""
        self._words: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and what was meant, in two lines."""
        words = self._words
        verb = self.verbs.get(words[0]) if words and message.startswith(UNKNOWN) else None
        parser = verb or self
        self.exit(2, f"{parser.prog}: {_kinder(message, parser)}\nusage: {usage(parser)}  ({parser.prog} --help)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; remembers the words for messages."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)


class Version(argparse.Action):
    """Prints the version of the installed package, which is looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, and exit."""
        print(f"moeq {version('moeq')}")
        parser.exit()


def _formatter(prog: str, **more: Any) -> argparse.HelpFormatter:
    """Colours where there are people to see them; loaded when somebody asks for help."""
    from rich_argparse import RawDescriptionRichHelpFormatter

    return RawDescriptionRichHelpFormatter(prog, **more)


def _kinder(message: str, parser: argparse.ArgumentParser) -> str:
    """A message of argparse with a suggestion."""
    if found := CHOICES.fullmatch(message):
        what, word, listed = found.groups()
        choices = [choice.strip("' ") for choice in listed.split(",")]
        close = difflib.get_close_matches(word, choices, 1, ENOUGH)
        guess = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(choices)}"
        return f"{what} {word!r} is not known; {guess}"
    if message.startswith(UNKNOWN):
        known = [name for action in parser._actions for name in action.option_strings]
        word = message.removeprefix(UNKNOWN).split()[0].partition("=")[0]
        close = difflib.get_close_matches(word, known, 1, ENOUGH) if word.startswith("-") else []
        if not word.startswith("-"):
            return f"{message.removeprefix(UNKNOWN)!r} is one argument too many"
        return f"there is no option {word}" + (f"; did you mean {close[0]}?" if close else "")
    return message


def usage(parser: argparse.ArgumentParser) -> str:
    """A call with what is required; options are below, in their groups."""
    positional = [action.metavar or action.dest.upper() for action in parser._actions if not action.option_strings]
    required = [action for action in parser._actions if action.option_strings and action.required]
    words = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in required]
    return " ".join([parser.prog, *map(str, positional), *words, "[options]"])

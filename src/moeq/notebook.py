"""How results show themselves in notebooks. Pure functions; no torch, no files."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = "text-align:left;padding:2px 12px 2px 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Some rows.

    Attributes:
        title: above them.
        header: names of the columns.
        rows: as long as the header each.
        picture: SVG, shown before the rows.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    picture: str = ""


class Shows(ABC):
    """A result that notebooks show as tables."""

    __slots__ = ()

    @abstractmethod
    def tables(self) -> Iterator[Table]:
        """What is shown, in order."""
        ...

    def _repr_html_(self) -> str:
        return "".join(_html(table) for table in self.tables())


def _html(table: Table) -> str:
    rows = [_row(table.header, "th")] if table.header else []
    rows += [_row(row, "td") for row in table.rows]
    body = f"<table>{''.join(rows)}</table>" if rows else ""
    return f"<p><b>{escape(table.title)}</b></p>{table.picture}{body}"


def _row(cells: Iterable[Any], tag: str) -> str:
    return "<tr>" + "".join(f'<{tag} style="{STYLE}">{escape(_text(cell))}</{tag}>' for cell in cells) + "</tr>"


def _text(cell: Any) -> str:
    return "" if cell is None else f"{cell:.5g}" if isinstance(cell, float) else str(cell)

"""Tables and numbers as text. Pure functions; no torch, no files."""

from collections.abc import Callable, Sequence

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def human_bytes(size: int) -> str:
    """A size in decimal units with three significant digits at least: "999 B", "8.83 MB", "1234 PB"."""
    value, unit = float(size), 0
    # 999.5 would be printed as "1000": move on to the next unit before rounding gets there.
    while unit + 1 < len(UNITS) and abs(value) >= (1000 if unit == 0 else 999.5):
        value /= 1000
        unit += 1
    if unit == 0:
        return f"{size} B"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {UNITS[unit]}"


def human_number(value: float) -> str:
    """A measured value with five significant digits, never in exponent notation unless it is tiny."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A GitHub-flavoured table; columns whose cells are all numbers are aligned to the right.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    cells = _cells(header, rows, _escape)
    marks = ["---:" if right else "---" for right in _numeric(cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], marks, *cells[1:]])


def plain_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table for a terminal: columns two spaces apart, numbers aligned to the right.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    cells = _cells(header, rows, _one_line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = _numeric(cells)
    lines = []
    for row in cells:
        columns = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if to_right else c.ljust(w) for c, w, to_right in columns).rstrip())
    return "\n".join(lines)


def _cells(header: Sequence[str], rows: Sequence[Sequence[object]], clean: Callable[[object], str]) -> list[list[str]]:
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells")
    return [[clean(cell) for cell in row] for row in (header, *rows)]


def _numeric(cells: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each column holds numbers only, a unit or percent sign behind them allowed; blanks do not count."""
    body = list(zip(*cells[1:], strict=True)) if len(cells) > 1 else [()] * len(cells[0])
    return [any(column) and all(_is_number(cell) for cell in column if cell) for column in body]


def _is_number(cell: str) -> bool:
    words = cell.rstrip("%").split(" ")
    if len(words) > 2 or (len(words) == 2 and words[1] not in UNITS):
        return False
    try:
        float(words[0].replace(",", ""))
    except ValueError:
        return False
    return True


def _one_line(cell: object) -> str:
    return " ".join(str(cell).split())


def _escape(cell: object) -> str:
    return _one_line(cell).replace("\\", "\\\\").replace("|", "\\|")

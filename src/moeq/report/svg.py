"""What all pictures share: a document that is readable on light and dark pages, text that cannot break it, colours.

Every picture paints its own background, so its text stays readable even where a page and the reader's system
disagree about dark mode. Light colours are attributes, for viewers without CSS; dark ones are a media query.
"""

import re
from collections.abc import Iterable

SURFACE, INK, MUTED, RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
DARK = (
    "@media(prefers-color-scheme:dark){.s{fill:#0d1117}.i{fill:#f0f6fc}.m{fill:#9198a1}"
    ".r{stroke:#3d444d}.c{stroke:#0d1117}}"
)
"""Classes: s surface, i ink, m muted ink, r rules, c cuts in the colour of the surface."""

WIDTH_COLOURS = {
    1: "#f5ed81",
    2: "#b2de80",
    3: "#69ca8b",
    4: "#0cb198",
    5: "#0c9199",
    6: "#047293",
    7: "#025291",
    8: "#2a2e7c",
}
"""Code bits -> colour: equal steps of lightness in OKLCH (0.93 to 0.35), hue from yellow to blue.

Lightness alone tells neighbours apart, so the order survives every kind of colour blindness and a grey printer.
"""

SERIES_COLOURS = ("#1f77c9", "#d9580d", "#0a8f6c", "#b0459a", "#8a7400", "#6a5acd")
"""Colours of curves, each at least 3:1 against the light and the dark surface; markers differ as well."""

FONT = 'font-family="system-ui,-apple-system,\'Segoe UI\',sans-serif" font-size="11"'
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ENTITIES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord('"'): "&quot;"}


def escape(text: str) -> str:
    """`text` on one line, legal as content or attribute value of XML 1.0."""
    return " ".join(_ILLEGAL.sub("", text).split()).translate(_ENTITIES)


def label(x: float, y: float, text: str, *, anchor: str = "start", style: str = "i") -> str:
    """One line of text with its baseline at `y`; `style` is a class of `DARK`."""
    colour = MUTED if style == "m" else INK
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{number(x)}" y="{number(y)}" class="{style}" fill="{colour}"{at}>{escape(text)}</text>'


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def document(width: int, height: int, title: str, description: str, body: Iterable[str]) -> str:
    """A whole SVG document.

    Args:
        width: of the picture, in pixels; it shrinks with the page.
        height: of the picture, in pixels.
        title: the headline, which is also what screen readers say first.
        description: the content in words.
        body: elements.
    """
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="t d" {FONT}>',
        f'<title id="t">{escape(title)}</title>',
        f'<desc id="d">{escape(description)}</desc>',
        f"<style>{DARK}</style>",
        f'<rect class="s" fill="{SURFACE}" width="{width}" height="{height}"/>',
        f'<text x="16" y="22" class="i" fill="{INK}" font-size="13" font-weight="600">{escape(title)}</text>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"

"""The report as one page that needs no network. Pure functions; no torch, no packages but what draws the charts."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

from moeq.report.svg import SERIES_COLOURS, WIDTH_COLOURS, escape

EXPORTS: Final = "window.moeqCharts = { embed: vegaEmbed };"
"""What page.js finds of the library."""
NO_BITS: Final = "#d8dee4"
"""Colour of what was dropped."""


def page(
    checkpoints: Sequence[Mapping[str, Any]], compared: Mapping[str, Any] | None, library: str, version: str
) -> str:
    """The page.

    Args:
        checkpoints: what `moeq.stages.report.facts_of` gives of each.
        compared: what `moeq.stages.compare` measured, or None.
        library: JavaScript that puts vega and vega-embed where page.js looks for them.
        version: moeq's.
    """
    data = {
        "checkpoints": list(checkpoints),
        "compared": compared,
        "widths": [(0, NO_BITS), *WIDTH_COLOURS.items()],
        "series": list(SERIES_COLOURS),
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "@TITLE@": escape(str(checkpoints[0]["name"])),
        "@VERSION@": escape(version),
        "@STYLE@": _file("page.css"),
        # No text of a checkpoint can end the element it stands in.
        "@DATA@": text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        "@LIBRARY@": library.replace("</script", "<\\/script"),
        "@SCRIPT@": _file("page.js"),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], _file("page.html"))


def _file(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")

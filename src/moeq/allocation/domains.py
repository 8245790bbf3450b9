"""Costs measured text by text, and combined so that no text pays for another.

A sum over all tokens lets the text with the largest gradients decide. Here each text has a table of its own, divided by
what rounding everything to a middle width costs that text; what the texts have to say is then combined unit by unit.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from moeq.artifacts import CostTable
from moeq.calibration.tokens import TokenBatch, token_hash

COMBINED: Final = ("mean", "worst", "pooled")
"""How texts are combined: the mean, the largest of all texts for each unit, or all tokens in one sum."""


def by_text(tokens: TokenBatch) -> tuple[TokenBatch, ...]:
    """The samples of each text as a batch of their own."""
    found = []
    for number, domain in enumerate(tokens.domains):
        chosen = [at for at, text in enumerate(tokens.domain_N) if text == number]
        ids_NT = tokens.ids_NT[chosen]
        found.append(
            replace(
                tokens,
                ids_NT=ids_NT,
                hash=token_hash(ids_NT),
                source=domain.name,
                domains=(replace(domain, samples=len(chosen)),),
                domain_N=(0,) * len(chosen),
            )
        )
    return tuple(found)


def combined(tables: Sequence[CostTable], names: Sequence[str], shares: Sequence[float], how: str) -> CostTable:
    """One table of several, in the units of their mean.

    Args:
        tables: of the same units and candidates, one for each text.
        names: of the texts.
        shares: of the texts; they add up to 1. They weigh in the mean only.
        how: "mean" or "worst".
    """
    first = tables[0]
    scales = [_scale(table) for table in tables]
    unit = float(np.dot(scales, shares))

    def together(rows: Sequence[Sequence[Sequence[float]]]) -> tuple[tuple[float, ...], ...]:
        if not len(rows[0]):
            return ()
        parts = np.stack([np.array(each) / scale for each, scale in zip(rows, scales, strict=True)])
        whole = parts.max(0) if how == "worst" else np.tensordot(shares, parts, 1)
        return tuple(tuple(map(float, row)) for row in unit * whole)

    statistics = {
        f"{name} of {text}": values
        for text, table in zip(names, tables, strict=True)
        for name, values in table.statistics.items()
    }
    if "tokens" in first.statistics:
        statistics["tokens"] = tuple(map(sum, zip(*(table.statistics["tokens"] for table in tables), strict=True)))
    found = replace(
        first,
        costs=together([table.costs for table in tables]),
        dense_costs=together([table.dense_costs for table in tables]),
        statistics=statistics,
    )
    found.validate()
    return found


def _scale(table: CostTable) -> float:
    """What a text loses by a middle width everywhere; 1 if it loses nothing."""
    middle = len(table.candidates) // 2
    return sum(row[middle] for row in table.costs) or 1.0

"""Costs measured text by text, and combined so that no text pays for another.

A sum over all tokens lets the text with the largest gradients decide. Here each text has a table of its own, divided by
what rounding everything to a middle width costs that text; what the texts have to say is then combined unit by unit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.artifacts import CostTable
from moeq.calibration.tokens import TokenBatch, token_hash
from moeq.costs.component_table import ComponentFacts, ComponentTable, ProjectionCosts

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


class ComponentsOfTexts:
    """Costs of components of several texts as those of one: bases, energies and curves depend on no text.

    Args:
        tables: of the same bases, one for each text.
        shares: of the texts; they add up to 1.
        how: "mean" or "worst".
    """

    def __init__(self, tables: Sequence[ComponentTable], shares: Sequence[float], how: str) -> None:
        self._tables, self._shares, self._how = tables, shares, how
        places = [(index, name) for index, layer in enumerate(tables[0].facts.drop) for name in layer]
        middle = len(tables[0].candidates) // 2
        self._scales = []
        for table in tables:
            parts = [table.layer(*place) for place in places]
            lost = sum(float(part.weight_EH.double().sum() * part.curve_C[middle]) for part in parts)
            self._scales.append(lost or 1.0)
        self._unit = float(np.dot(self._scales, shares))

    def layers(self) -> Iterator[dict[str, ProjectionCosts]]:
        """Every layer, in order; made anew each time."""
        for index, layer in enumerate(self._tables[0].facts.drop):
            yield {name: self._part(index, name) for name in layer}

    def facts(self) -> ComponentFacts:
        """What is said of them, but for the provenance."""
        first = self._tables[0].facts
        return replace(
            first,
            drop=tuple({name: self._dropping(index, name) for name in layer} for index, layer in enumerate(first.drop)),
            spread=tuple({name: part.spread for name, part in layer.items()} for layer in self.layers()),
            tokens=tuple(
                tuple(map(sum, zip(*counts, strict=True)))
                for counts in zip(*(table.facts.tokens for table in self._tables), strict=True)
            ),
        )

    def _part(self, index: int, name: str) -> ProjectionCosts:
        parts = [table.layer(index, name) for table in self._tables]
        errors = [part.errors_EHC for part in parts if part.errors_EHC is not None]
        return replace(
            parts[0],
            weight_EH=self._together([part.weight_EH for part in parts]),
            errors_EHC=self._together(errors) if errors else None,
        )

    def _together(self, values: Sequence[Tensor]) -> Tensor:
        scaled = [value.double() / scale for value, scale in zip(values, self._scales, strict=True)]
        if self._how == "worst":
            whole = torch.stack(scaled).amax(0)
        else:
            whole = sum((share * value for share, value in zip(self._shares, scaled, strict=True)), torch.tensor(0.0))
        return (self._unit * whole).float()

    def _dropping(self, index: int, name: str) -> float:
        """All components together over all apart, summed over texts on their scales."""
        apart = [
            share * float(table.weights(index, name).sum(dtype=np.float64)) / scale
            for table, share, scale in zip(self._tables, self._shares, self._scales, strict=True)
        ]
        harms = [table.facts.drop[index][name] for table in self._tables]
        return float(np.dot(harms, apart) / sum(apart)) if sum(apart) else float(np.mean(harms))


def _scale(table: CostTable) -> float:
    """What a text loses by a middle width everywhere; 1 if it loses nothing."""
    middle = len(table.candidates) // 2
    return sum(row[middle] for row in table.costs) or 1.0

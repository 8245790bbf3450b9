"""The methods: named settings of one pipeline, as data.

A method says which cost ranks the units, which solver spends the budget, how weights are stored and
which quantizer rounds them when the user names none. A new method is a row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeq.errors import OptionError
from moeq.layouts.base import part
from moeq.spec import BITS, TRELLISES, VECTORS


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row.

    Attributes:
        unit: "none" (no choice is made per unit), "expert", "matrix" or "component".
        cost: name of the cost that ranks units, or None.
        cost_options: options of the cost that differ from its defaults.
        solver: name of the solver, or None: fill the budget in storage order.
        scope: "global": one program over the whole model; "layer": each layer gets its share of the budget.
        candidates: code widths that a unit may get; wider ones are added when the budget leaves room for them.
        shares: minimum shares of widths in every layer, see `moeq.solvers.shares`.
        layout: storage layout.
        quantizer: the quantizer used when calibration text is given.
        dataless: the quantizer used when it is not.
        compensate: whether down is fitted to what rounded gate and up answer, where there is text.
        router: loss that routers are tuned with after packing, or "none".
        chooses: whether several recipes are tried and the best one is taken (`moeq.stages.auto`).
        paper: options that make of it what its paper has, where that is something else.
    """

    unit: str
    cost: str | None = None
    cost_options: Mapping[str, Any] = field(default_factory=dict)
    solver: str | None = None
    scope: str = "global"
    candidates: tuple[int, ...] = ()
    shares: str = "none"
    layout: str = "grouped"
    quantizer: str = "gptq"
    dataless: str = "hqq"
    compensate: bool = False
    router: str = "none"
    chooses: bool = False
    paper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> str:
        """The layout of the specs that matrices get."""
        found: str = part(self.layout, "shape").RECORDS
        return found

    @property
    def alone(self) -> bool:
        """Whether a matrix is stored by itself: nothing is shared between experts, so that no text is needed."""
        return self.unit != "component" and not self.own_options

    @property
    def own_options(self) -> tuple[str, ...]:
        """Options of a recipe that mean something for the layout of this method alone."""
        found: tuple[str, ...] = part(self.layout, "shape").OPTIONS
        return found


OWN_LEVELS = {"vector": tuple(VECTORS), "trellis": tuple(TRELLISES), "ggml": BITS, "ggml-rtn": BITS}
"""Quantizer -> widths at which it has a level set of its own."""
AUTO_LEVELS = {bits: ("half" if bits <= 2 else "asym") for bits in BITS}
"""Width -> what was measured best per stored byte among level sets of single weights."""
GEMQ = Method(
    unit="matrix",
    cost="fisher",
    solver="auto",
    candidates=(1, 2, 3),
    shares="c2c3",
    quantizer="trellis",
    paper={
        "unit": "expert",
        "quantizer": "gptq",
        "router": "task",
        "cost_options": "perturb=paper,floor=0,samples=0,tokens=0,texts=pooled",
    },
)
METHODS = {
    "auto": replace(GEMQ, paper={}, compensate=True, chooses=True),
    "uniform": Method(unit="none"),
    "pmq": Method(
        unit="expert", cost="output-error", solver="auto", scope="layer", candidates=(1, 2, 3), shares="c2c3"
    ),
    "alphaq": Method(unit="matrix", cost="spectral-tail", solver="auto", candidates=(1, 2, 3, 4)),
    "bitsmoe": Method(
        unit="component",
        cost="spectral-energy",
        solver="threshold",
        candidates=(0, 1, 2, 3, 4, 6, 8),
        layout="spectral",
        quantizer="gptq",
        dataless="rtn",
        paper={"quantizer": "alternating", "cost_options": "joint=false,drop=1,importance=routing"},
    ),
    "tileq": Method(
        unit="none",
        layout="tiled",
        paper={
            "rank": "32",
            "tile_options": "grid=paper,scales=expert,alpha=2.4,placement=literal,factors=deflation,refits=0,"
            "frequency=false,rotation=expert",
        },
    ),
    "gemq": GEMQ,
}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        OptionError: there is none.
    """
    if name not in METHODS:
        raise OptionError(f"unknown method {name!r}", option="method", fix=f"choose one of {', '.join(METHODS)}")
    return METHODS[name]

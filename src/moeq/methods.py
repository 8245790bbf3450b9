"""The methods: named settings of one pipeline, as data.

A method says which cost ranks the units, which solver spends the budget, how weights are stored and
which quantizer rounds them when the user names none. A new method is a row here.
"""

from dataclasses import dataclass

from moeq.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row.

    Attributes:
        unit: "none" (no choice is made per unit), "expert" or "matrix".
        cost: name of the cost that ranks units, or None.
        solver: name of the solver, or None: fill the budget in storage order.
        layout: storage layout.
        quantizer: the quantizer used when calibration text is given.
        dataless: the quantizer used when it is not.
    """

    unit: str
    cost: str | None
    solver: str | None
    layout: str
    quantizer: str
    dataless: str


METHODS = {
    "uniform": Method(unit="none", cost=None, solver=None, layout="grouped", quantizer="gptq", dataless="hqq"),
}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        OptionError: there is none.
    """
    if name not in METHODS:
        raise OptionError(f"unknown method {name!r}", option="method", fix=f"choose one of {', '.join(METHODS)}")
    return METHODS[name]

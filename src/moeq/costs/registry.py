"""All costs by name."""

import inspect
from collections.abc import Callable
from typing import Any, Final

from moeq.costs.base import Cost
from moeq.costs.fisher import Fisher
from moeq.costs.output_error import OutputError
from moeq.costs.spectral_energy import SpectralEnergy
from moeq.costs.spectral_tail import SpectralTail
from moeq.costs.weight_error import WeightError
from moeq.errors import OptionError

COSTS: Final[dict[str, Callable[..., Cost | SpectralEnergy]]] = {
    "spectral-tail": SpectralTail,
    "weight-error": WeightError,
    "fisher": Fisher,
    "output-error": OutputError,
    "spectral-energy": SpectralEnergy,
}


def make_cost(name: str, **options: Any) -> Cost | SpectralEnergy:
    """The cost `name`, made with `options`.

    Raises:
        OptionError: no such cost, or it has no such option, or not with this value.
    """
    if name not in COSTS:
        raise OptionError(f"no cost is called {name!r}", option="cost", fix=f"choose one of {', '.join(COSTS)}")
    make = COSTS[name]
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            choices = f"its options are {', '.join(known)}" if known else "it has no options"
            raise OptionError(f"cost {name} does not know {option!r}", option=option, fix=choices)
    return make(**options)

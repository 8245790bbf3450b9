"""Squared rounding error of the weights: the plainest cost, no data and no model of the noise.

Legend: U units, C candidates, M matrices of a layer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeq.costs.base import Asked, LayerCosts, LayerView
from moeq.costs.matrices import dataless_quantizer, each_matrix, energy, rounding_error
from moeq.costs.options import check_switch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    errors_UC: NDArray[np.float64]
    energy_U: NDArray[np.float64]


class WeightError:
    """||W - W_hat||^2 of every unit under every candidate.

    An expert's cost is the sum over its matrices.

    Args:
        quantizer: what rounds, by name; it must need no data.
        relative: divide by ||W||^2 of the unit; units of zeros cost nothing.

    Raises:
        OptionError: no such quantizer, or it needs calibration.
    """

    __slots__ = ("_layers", "_quantizer", "needs", "relative")

    def __init__(self, *, quantizer: str = "rtn", relative: bool = False) -> None:
        check_switch("relative", relative)
        self.needs = "weights"
        self.relative = relative
        self._quantizer = dataless_quantizer(quantizer)
        self._layers: dict[int, _Measured] = {}

    def visit(self, view: LayerView, asked: Asked | None) -> None:
        """Round every matrix to every candidate; see `moeq.costs.base.Cost`."""
        del asked

        def measure(expert: int, projection: str, w_NK: Tensor) -> tuple[float, ...]:
            del expert, projection
            errors = (rounding_error(w_NK, self._quantizer, spec) for spec in view.candidates)
            return energy(w_NK), *errors

        rows = np.array(each_matrix(view, measure), dtype=np.float64)
        sums = rows.reshape(view.num_units, -1, rows.shape[1]).sum(1)
        self._layers[view.index] = _Measured(errors_UC=sums[:, 1:], energy_U=sums[:, 0])

    def take(self, other: "WeightError") -> None:
        """See `moeq.costs.base.WeightsCost`."""
        self._layers.update(other._layers)

    def result(self) -> list[LayerCosts]:
        """Costs, and the statistic `energy`, ||W||^2 of each unit."""
        return [self._costs(self._layers[index]) for index in sorted(self._layers)]

    def _costs(self, measured: _Measured) -> LayerCosts:
        costs_UC = measured.errors_UC
        if self.relative:
            energy_U1 = measured.energy_U[:, np.newaxis]
            costs_UC = np.divide(costs_UC, energy_U1, out=np.zeros_like(costs_UC), where=energy_U1 > 0)
        return LayerCosts(costs_UC=costs_UC, statistics={"energy": measured.energy_U})

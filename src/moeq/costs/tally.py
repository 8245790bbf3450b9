"""What costs that are summed over tokens keep of a layer between batches.

Legend: U units, C candidates, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from moeq.arch import hooks
from moeq.costs.base import Asked, LayerCosts, LayerView
from moeq.errors import CalibrationError

Floats = NDArray[np.float64]


class Tally:
    """Sums over the batches of one layer, float64, whatever the inputs are.

    Args:
        view: the layer.
        names: of the tables to sum up.

    Attributes:
        tables: name -> (U, C) sums.
        tokens_E: routed tokens.
        weight_E: sums of routing weights.
        asked: tokens of all batches.
    """

    __slots__ = ("_index", "_per_expert", "asked", "tables", "tokens_E", "weight_E")

    def __init__(self, view: LayerView, names: tuple[str, ...]) -> None:
        self._index = view.index
        self._per_expert = view.num_units // view.layer.num_experts
        self.tables = {name: np.zeros((view.num_units, len(view.candidates))) for name in names}
        self.tokens_E, self.weight_E = np.zeros((2, view.layer.num_experts))
        self.asked = 0

    def count(self, asked: Asked) -> None:
        """Count a batch's tokens."""
        num_experts = len(self.tokens_E)
        order, counts = hooks.by_expert(asked.index_Tk, num_experts)
        weights = asked.weights_Tk.reshape(-1)[order].double().split([*counts, order.numel() - sum(counts)])
        self.asked += len(asked.x_TH)
        self.tokens_E += np.array(counts)
        self.weight_E += np.array([float(part.sum()) for part in weights[:num_experts]])

    def per_unit(self, values_E: Floats) -> Floats:
        """A number per expert as a number per unit, (U,)."""
        return np.repeat(values_E, self._per_expert)

    def shrunk(self, name: str, floor: float) -> Floats:
        """Table `name` with what few tokens cannot tell filled in from the layer.

        With n routed tokens, the mean per token becomes (sum + floor * m) / (n + floor), m being the mean per token of
        all units of the same place within their experts, and the new sum is that times max(n, floor). Units that are
        like the others keep their sums once they have `floor` tokens.

        Args:
            name: of the table.
            floor: tokens that the layer's mean counts as; 0 changes nothing.
        """
        sums_UC = self.tables[name]
        if not floor:
            return sums_UC
        sums_EPC = sums_UC.reshape(len(self.tokens_E), self._per_expert, -1)
        tokens_E11 = self.tokens_E.reshape(-1, 1, 1)
        mean_PC = sums_EPC.sum(0) / max(1.0, self.tokens_E.sum())
        mean_EPC: Floats = (sums_EPC + floor * mean_PC) / (tokens_E11 + floor)
        return (mean_EPC * np.maximum(tokens_E11, floor)).reshape(sums_UC.shape)

    def layer_costs(self, costs_UC: Floats, statistics: dict[str, Floats]) -> LayerCosts:
        """What a cost hands back, once it is known to be finite.

        Raises:
            CalibrationError: it is not.
        """
        if not np.isfinite(costs_UC).all():
            raise CalibrationError(
                f"MoE layer {self._index} has costs that are not finite",
                fix="run the model in float32: its activations or gradients leave the range of its dtype",
            )
        return LayerCosts(costs_UC=costs_UC, statistics=statistics)

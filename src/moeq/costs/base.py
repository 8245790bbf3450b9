"""The seam of all costs: layers in, predicted harm of every unit under every candidate out.

Linears outside the experts have costs of their own kind (`LinearCost`), in the units of the experts' costs.

Legend: T tokens, H hidden, k experts per token, N output rows, K input columns, U units, C candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeq.calibration.tap import Asked, Heard
from moeq.model_parts import MoeLayer
from moeq.spec import QuantSpec

__all__ = ["Asked", "Cost", "Heard", "LayerCosts", "LayerView", "LinearCost", "LinearView", "ReadMatrix", "WeightsCost"]

ReadMatrix = Callable[[int, str], Tensor]
"""(expert, projection) -> weights (N, K)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerView:
    """The experts of one layer, as a cost sees them.

    Attributes:
        index: MoE layer, as in the Inventory.
        layer: its shapes.
        read: the weights that will be rounded: the original's.
        candidates: the specs a unit may get.
        unit: "expert" or "matrix".
        device: where to compute.
    """

    index: int
    layer: MoeLayer
    read: ReadMatrix
    candidates: Sequence[QuantSpec]
    unit: str
    device: torch.device

    @property
    def num_units(self) -> int:
        """Units of this layer."""
        return self.layer.num_experts * (len(self.layer.projections) if self.unit == "matrix" else 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCosts:
    """What a cost says of one layer, units in storage order.

    Attributes:
        costs_UC: predicted harm, float64.
        statistics: name -> (U,) float64.
    """

    costs_UC: NDArray[np.float64]
    statistics: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class Cost(Protocol):
    """Predicts harm.

    Attributes:
        needs: "weights", "activations" or "gradients": what `visit` must be given.
    """

    needs: str

    def visit(self, view: LayerView, asked: Asked | None) -> None:
        """Look at one layer: once if `needs` is "weights", else once for each batch of sequences.

        Batches come in order; the layers of a batch come in any order. `asked` is None exactly if
        `needs` is "weights".

        Raises:
            TensorError: weights that are not finite.
        """
        ...

    def result(self) -> list[LayerCosts]:
        """The costs of all layers, by layer index; called once, after the last visit."""
        ...


@runtime_checkable
class WeightsCost(Cost, Protocol):
    """A cost that needs weights alone, and whose layers may therefore be seen by several processes."""

    def take(self, other: Any) -> None:
        """Take over what another one, made with the same options, saw of other layers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearView:
    """One linear outside the experts, as a cost sees it.

    Attributes:
        path: its module path.
        block: path of its decoder block.
        read: the weights (N, K) that will be rounded: the original's.
        candidates: the specs it may get.
        device: where to compute.
    """

    path: str
    block: str
    read: Callable[[], Tensor]
    candidates: Sequence[QuantSpec]
    device: torch.device


class LinearCost(Protocol):
    """Predicts harm of rounding linears outside the experts.

    Attributes:
        needs: "weights" or "gradients", as the cost of the experts that it goes with.
    """

    needs: str

    def visit(self, view: LinearView, heard: Heard | None) -> None:
        """Look at one linear: once if `needs` is "weights" (`heard` is None), else once for each call of it.

        Calls of the linears of one block come together.
        """
        ...

    def result(self, num_tokens: int) -> dict[str, tuple[float, ...]]:
        """path -> harm under each candidate, of the linears visited, after `num_tokens` tokens of text."""
        ...

"""What the writers of layouts are told."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from moeq.artifacts import Inventory, Plan
from moeq.checkpoint.read import Reader
from moeq.costs.component_table import ComponentTable
from moeq.errors import TensorError
from moeq.fleet import HERE, Fleet
from moeq.format.records import decode_matrix, dequantize, pack_matrix
from moeq.layouts.tiled.shape import TileOptions
from moeq.model_parts import DenseLinear, MatrixSource
from moeq.quantizers.base import QuantizedMatrix, Quantizer
from moeq.spec import QuantSpec, Unit

TINY: Final = 2.0**-18
"""Below it a float16 has fewer than six bits: it is off by up to 1 %."""


NOTHING: Final = 2.0**-60
"""Weights below it are those of something that nobody trained."""


def weights_digest(weights_NK: Tensor) -> str:
    """sha256 of decoded float32 weights."""
    return hashlib.sha256(memoryview(weights_NK.contiguous().view(-1).numpy())).hexdigest()  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Everything that packing needs to know.

    Attributes:
        inventory: the source.
        plan: the spec of every unit.
        reader: the source's tensors.
        partial: where the files go.
        quantizer: rounds the experts.
        dense_quantizer: rounds the other linears; needs no data.
        heard_quantizer: rounds those of them whose inputs calibration saw, None for `dense_quantizer`.
        device: where rounding is done.
        table: the costs that a plan of components came from, for their bases.
        gain: match the gain of components' scales.
        damp: damping of Hessians, in mean diagonals.
        compensate: down is fitted to what rounded gate and up answer (docs/decisions/0030).
        tiles: choices of the tiled layout.
        seed: of everything random.
        fleet: who rounds.
        noted: unit -> digest of its rounded weights, filled for a few units of each layer; what
            `verify` compares the reloaded model with.
        heard: path -> record of linears that were rounded with text and are not yet written.
    """

    inventory: Inventory
    plan: Plan
    reader: Reader
    partial: Path
    quantizer: Quantizer
    dense_quantizer: Quantizer
    device: torch.device
    table: ComponentTable | None = None
    gain: bool = True
    damp: float = 0.1
    compensate: bool = False
    tiles: TileOptions = field(default_factory=TileOptions)
    seed: int = 0
    fleet: Fleet = HERE
    heard_quantizer: Quantizer | None = None
    noted: dict[Unit, str] = field(default_factory=dict)
    heard: dict[str, Tensor] = field(default_factory=dict)

    def settle(self, unit: Unit, rounded: QuantizedMatrix) -> Tensor:
        """The matrix record of a rounded expert matrix.

        Raises:
            TensorError: the weights are so small that their scales do not fit float16.
        """
        layer = self.inventory.layers[unit.layer]
        spec = self.plan.spec(unit, layer.projections)
        parts = (rounded.codes_NK, rounded.scale_NG, rounded.zero_NG)
        self._check_scales(unit, rounded.scale_NG.abs().amax(1) if spec.in_blocks else rounded.scale_NG)
        if unit.expert in (0, layer.num_experts - 1):
            self.noted[unit] = weights_digest(dequantize(*parts, spec))
        return pack_matrix(*parts, spec)

    def _check_scales(self, unit: Unit, scale_NG: Tensor) -> None:
        """A scale below `TINY` is off by more than it should be, and zero stands for weights only if all are zero."""
        sizes = scale_NG.float().abs()
        if float(sizes.amin()) >= TINY:
            return
        layer = self.inventory.layers[unit.layer]
        largest = float(self.matrix(unit).float().abs().amax())
        if largest < NOTHING or float(sizes.amax()) >= TINY * 2**6:  # or rows that hardly count beside others
            return
        raise TensorError(
            f"the weights are so small (at most {largest:.2g}) that float16 scales would lose them",
            tensor=layer.sources[unit.projection].tensor(unit.expert),
            fix="multiply these weights by a power of two, and what follows or precedes them by its inverse",
        )

    def matrix(self, unit: Unit) -> Tensor:
        """The source weights (N, K) of a unit."""
        layer = self.inventory.layers[unit.layer]
        return self.reader.matrix(layer.sources[unit.projection], unit.expert, layer.shapes[unit.projection])

    def matrices(self, layer: int) -> Callable[[int, str], Tensor]:
        """(expert, projection) -> the source weights (N, K) of a layer."""
        return partial(self._of_layer, layer)

    def _of_layer(self, layer: int, expert: int, name: str) -> Tensor:
        return self.matrix(Unit(layer=layer, expert=expert, projection=name))

    def dense_spec(self, linear: DenseLinear) -> QuantSpec:
        """How a packed linear outside the experts is stored."""
        return self.plan.specs[self.plan.dense[linear.path]]

    def dense_record(self, linear: DenseLinear) -> tuple[Tensor, QuantSpec]:
        """The matrix record of a linear outside the experts."""
        known = self.heard.get(linear.path)
        return self._rounded(linear, self.dense_quantizer, None) if known is None else known, self.dense_spec(linear)

    def hear(self, linear: DenseLinear, hessian_KK: Tensor) -> None:
        """Round a linear outside the experts by the second moments of its inputs; `heard` keeps the record."""
        assert self.heard_quantizer is not None
        self.heard[linear.path] = self._rounded(linear, self.heard_quantizer, hessian_KK)

    def dense_weights(self, linear: DenseLinear, dtype: torch.dtype) -> Tensor:
        """What a packed linear outside the experts decodes to."""
        record, spec = self.dense_record(linear)
        return decode_matrix(record, spec, linear.shape, dtype)

    def _rounded(self, linear: DenseLinear, quantizer: Quantizer, hessian_KK: Tensor | None) -> Tensor:
        spec = self.dense_spec(linear)
        source = MatrixSource(name=linear.source, stacked=False)
        weights = self.reader.matrix(source, 0, linear.shape).to(self.device)
        rounded = quantizer.quantize(weights, spec, hessian_KK)
        return pack_matrix(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)

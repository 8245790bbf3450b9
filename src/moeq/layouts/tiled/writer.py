"""Packs layers of the layout "tiled": shared factors of all experts first, then every residual (TileQ).

The factors of a projection need the weights of all experts of the layer at once, in float32, and a scaled copy: 2 x 0.8
GB for 128 experts of 768 x 2048. One projection is in memory at a time. Residuals are those of the factors as they are
stored, so an error of the factors is not lost.

Legend: E experts, M x N grid, I inputs, O outputs, R rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from moeq.calibration import experts as calibration
from moeq.calibration.experts import Survey
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture
from moeq.format.records import dequantize
from moeq.layouts.grouped.writer import record_table, round_records
from moeq.layouts.job import Job
from moeq.layouts.layer_writer import Blob, Calibrated, LayerWriter
from moeq.layouts.tiled.shape import FACTOR, TileForm
from moeq.layouts.tiled.stored import Codes, Sides, build_tile_table, pack_sides
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec, Unit
from moeq.transforms import placement, rotation, tiles
from moeq.transforms.tiles import Blocks, Factors, Grid

FLOOR: Final = 1e-2
"""Least share of the mean that an expert's token count has in the fit, so that none is left out."""
INPUT_FLOOR: Final = 1e-4
"""Least mean square of an input in the fit, in means over all inputs."""


class TileRounding:
    """Rounds one layer, for `moeq.calibration.experts.quantize_experts` or without data.

    Args:
        job: what to pack.
        layer: index of the layer.
        survey: the sizes of the experts' inputs; None treats all inputs alike.
    """

    def __init__(self, job: Job, layer: int, survey: Survey | None = None) -> None:
        self._job, self._layer = job, layer
        self._shape = job.inventory.layers[layer]
        self._sides = {name: _make(job, layer, name, survey) for name in self._shape.projections}

    def sides(self) -> Tensor:
        """The sides of all projections, as they are stored."""
        return torch.cat([sides.data for sides in self._sides.values()])

    def round(
        self, expert: int, weights: dict[str, Tensor], hessian_II: Tensor | None
    ) -> dict[str, calibration.Rounded]:
        """See `moeq.calibration.experts.Round`."""
        done = {}
        for name, weight in weights.items():
            unit = Unit(layer=self._layer, expert=expert, projection=name)
            spec = self._job.plan.spec(unit, self._shape.projections)
            sides = self._sides[name]
            w_OI = weight.float().to(self._job.device)
            low_OI = sides.low_rank(expert) if sides.form.rank else None
            rest_OI = w_OI if low_OI is None else w_OI - low_OI.to(w_OI.device)
            order_I, moment_II = sides.order(expert), hessian_II
            if order_I is not None:
                turn = (order_I.to(rest_OI.device), sides.form.block, sides.form.plain)
                rest_OI = rotation.rotate(rest_OI, *turn)
                moment_II = None if hessian_II is None else rotation.rotated_hessian(hessian_II, *turn)
            part = self._job.quantizer.quantize(rest_OI, spec, moment_II)
            decode = partial(_restored, part, spec, sides.form, order_I, low_OI)
            done[name] = calibration.Rounded(stored=part, decode=decode)
        return done

    def records(self) -> Iterator[memoryview]:
        """The residuals' records in storage order, rounded without data."""
        for expert in range(self._shape.num_experts):
            for name in self._shape.projections:
                unit = Unit(layer=self._layer, expert=expert, projection=name)
                stored = self.round(expert, {name: self._job.matrix(unit)}, None)[name].stored
                record = self._job.settle(unit, stored)
                yield memoryview(record.numpy())  # type: ignore[arg-type]


def _restored(
    part: QuantizedMatrix,
    spec: QuantSpec,
    form: TileForm,
    order_I: Tensor | None,
    low_OI: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Q D^T plus what the factors give, as `moeq.layouts.tiled.reference.TiledLayer.dense`."""
    w_OI = dequantize(part.codes_NK, part.scale_NG, part.zero_NG, spec)
    if order_I is not None:
        w_OI = rotation.unrotate(w_OI, order_I, form.block, form.plain)
    return (w_OI if low_OI is None else w_OI + low_OI).to(dtype)


def round_factor(factor: Tensor) -> tuple[Codes, Tensor]:
    """Rows of a factor as they are stored, and what they stand for."""
    rounded = make_quantizer("rtn").quantize(factor.contiguous(), FACTOR, None)
    decoded = dequantize(rounded.codes_NK, rounded.scale_NG, None, FACTOR)
    return (rounded.codes_NK, rounded.scale_NG), decoded.to(factor.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Seen:
    """What the experts' inputs look like to a projection.

    Attributes:
        mean_EI: mean |x|.
        square_EI: mean x^2.
        count_E: share of the tokens, in means.
    """

    mean_EI: Tensor
    square_EI: Tensor
    count_E: Tensor


def _make(job: Job, layer: int, name: str, survey: Survey | None) -> Sides:
    """Place the experts, fit the factors and choose the permutations of one projection."""
    shape = job.inventory.layers[layer]
    form = job.plan.tiles[layer][name]
    units = [Unit(layer=layer, expert=expert, projection=name) for expert in range(shape.num_experts)]
    if not form.has_cells and form.orders == "none":
        empty = torch.zeros(0, dtype=torch.uint8)
        return Sides(data=empty, form=form, num_experts=len(units), shape=shape.shapes[name])
    w_EOI = torch.stack([job.matrix(unit).float().to(job.device) for unit in units])
    seen = _seen(w_EOI, name, survey)
    grid = placement.in_order(len(units), (form.rows, form.columns))
    factors, scale_EI = None, None
    if form.rank:
        grid, factors, scale_EI = fit(job, w_EOI, form, seen)
    orders = None
    if form.orders != "none":
        orders = _orders(w_EOI, form, grid, factors, scale_EI, seen)
    data = pack_sides(
        form,
        shape.shapes[name],
        torch.tensor([grid.row_E, grid.column_E]).T,
        None if factors is None else (factors.stored_inputs, factors.stored_outputs),
        scale_EI if form.scales == "expert" else None,
        orders,
    )
    return Sides(data=data, form=form, num_experts=len(units), shape=shape.shapes[name])


def _seen(w_EOI: Tensor, name: str, survey: Survey | None) -> _Seen:
    if survey is None:
        ones_EI = w_EOI.new_ones(len(w_EOI), w_EOI.shape[2])
        return _Seen(mean_EI=ones_EI, square_EI=ones_EI, count_E=ones_EI[:, 0])
    count_E = torch.tensor(survey.counts, dtype=torch.float32)
    count_E = (count_E / count_E.mean().clamp(min=1)).clamp(min=FLOOR).to(w_EOI.device)
    square_EI = survey.square[name].to(w_EOI.device)
    floor = (INPUT_FLOOR * square_EI.mean()).clamp(min=torch.finfo(square_EI.dtype).tiny)
    return _Seen(mean_EI=survey.mean[name].to(w_EOI.device), square_EI=square_EI.clamp(min=floor), count_E=count_E)


def fit(job: Job, w_EOI: Tensor, form: TileForm, seen: _Seen) -> tuple[Grid, Factors, Tensor | None]:
    """Cells, rounded factors, and the experts' own scales if they are stored."""
    options = job.tiles
    if form.scales == "expert":
        scale_EI = torch.stack([tiles.input_scale(mean_I, options.alpha) for mean_I in seen.mean_EI]).half().float()
        weight_EI = scale_EI.square()
    else:
        weight_EI = (seen.square_EI / seen.square_EI.mean()) ** options.alpha
        scale_EI = weight_EI.sqrt()
    if options.frequency:
        weight_EI = weight_EI * seen.count_E.unsqueeze(1)
    grid = _place(job, w_EOI, form, scale_EI)
    if form.scales != "expert":
        scale_EI = _pooled(weight_EI, grid).sqrt()
    blocks = Blocks(w_EOI.transpose(1, 2) * scale_EI.unsqueeze(2), grid)
    if options.factors == "deflation":
        found = tiles.deflated_factors(blocks, form.rank, lambda x: round_factor(x)[1], seed=job.seed)
    else:
        found = tiles.svd_factors(blocks, form.rank, seed=job.seed)
    if form.scales == "expert":
        return grid, tiles.refit(w_EOI, found, weight_EI, grid, round_factor, rounds=0), scale_EI
    scale_MI = scale_EI.new_ones(form.rows, scale_EI.shape[1])
    scale_MI[list(grid.row_E)] = scale_EI
    folded = Factors(inputs_MRI=found.inputs_MRI / scale_MI.unsqueeze(1), outputs_NRO=found.outputs_NRO)
    return grid, tiles.refit(w_EOI, folded, weight_EI, grid, round_factor, rounds=options.refits), None


def _place(job: Job, w_EOI: Tensor, form: TileForm, scale_EI: Tensor) -> Grid:
    options, shape, experts = job.tiles, (form.rows, form.columns), len(w_EOI)
    if shape == (experts, experts) or options.placement == "order" or 1 in shape:
        return placement.in_order(experts, shape)  # nothing to choose where a side is shared by all or by none
    if options.placement == "random":
        grid = placement.at_random(experts, shape, job.seed)
    else:
        found = placement.sketch(w_EOI.transpose(1, 2) * scale_EI.unsqueeze(2), max(1, form.rank // 2), job.seed)
        if options.placement == "literal":
            grid = placement.literal(found, shape, job.seed)
        else:
            grid = placement.matched(found, shape, form.rank, job.seed)
    if not options.swaps:
        return grid
    return placement.swapped(w_EOI.transpose(1, 2) * scale_EI.unsqueeze(2), grid, form.rank, options.swaps, job.seed)


def _pooled(value_EI: Tensor, grid: Grid) -> Tensor:
    """The mean of each grid row's members, for each of them, (E, I)."""
    row_E = torch.tensor(grid.row_E, device=value_EI.device)
    sum_MI = value_EI.new_zeros(grid.rows, value_EI.shape[1]).index_add(0, row_E, value_EI)
    return (sum_MI / torch.bincount(row_E, minlength=grid.rows).clamp(min=1).unsqueeze(1))[row_E]


def _orders(
    w_EOI: Tensor, form: TileForm, grid: Grid, factors: Factors | None, scale_EI: Tensor | None, seen: _Seen
) -> Tensor:
    """The permutations of all owners, (owners, I)."""
    magnitude_EI = torch.empty_like(seen.square_EI)
    for expert, w_OI in enumerate(w_EOI):
        rest_OI: Any = w_OI
        if factors is not None:
            low_OI = factors.expert(grid.row_E[expert], grid.column_E[expert])
            rest_OI = w_OI - (low_OI if scale_EI is None else low_OI / scale_EI[expert])
        magnitude_EI[expert] = rest_OI.abs().mean(0)
    owner_E = {"layer": (0,) * len(w_EOI), "tile": grid.row_E, "expert": tuple(range(len(w_EOI)))}[form.orders]
    orders = torch.arange(w_EOI.shape[2]).repeat(form.order_owners(len(w_EOI)), 1)
    for owner in set(owner_E):
        members = [expert for expert, found in enumerate(owner_E) if found == owner]
        orders[owner] = rotation.importance_order(magnitude_EI[members].mean(0), seen.square_EI[members].mean(0)).cpu()
    return orders


class TiledWriter(LayerWriter):
    """Writes one layer."""

    def __init__(self, job: Job, layer: int) -> None:
        self._job, self._layer = job, layer

    def plain(self) -> tuple[Blob, ...]:
        """Residuals as they are rounded, and the sides."""
        rounding = TileRounding(self._job, self._layer)
        return rounding.records(), rounding.sides()

    def calibrated(self, experts: nn.Module, capture: Capture, pool: SpillPool) -> Calibrated:
        """Sides from what the experts were asked, then residuals as records."""
        job, layer = self._job, self._layer
        shape = job.inventory.layers[layer]
        seen = calibration.survey(shape, job.matrices(layer), experts, capture, job.device)
        rounding = TileRounding(job, layer, seen)
        y_TH, blob, counts = round_records(job, layer, experts, capture, pool, rounding.round)
        return Calibrated(y_TH=y_TH, counts=counts, blobs=(blob, rounding.sides()))

    def tables(self) -> tuple[Tensor, ...]:
        """Where residuals and sides lie."""
        layer = self._job.inventory.layers[self._layer]
        sides = build_tile_table(self._job.plan.tiles[self._layer], layer.num_experts, layer.shapes)
        return record_table(self._job, self._layer), sides


WRITER: Final = TiledWriter

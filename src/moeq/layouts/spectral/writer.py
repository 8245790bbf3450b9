"""Packs layers of the layout "spectral": components of each width into their slab, rounded one expert at a time.

Legend: E experts, H hidden size = directions, I expert width, n components, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from moeq.calibration import experts as calibration
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture
from moeq.calibration.workers import in_order
from moeq.format.records import dequantize, pack_matrix
from moeq.layouts.job import Job, weights_digest
from moeq.layouts.layer_writer import Blob, Calibrated, LayerWriter
from moeq.layouts.spectral.shape import (
    SLAB_WIDTHS,
    Form,
    SpectralShape,
    Widths,
    basis_spec,
    blob_bytes,
    kept_directions,
    slab_rows,
)
from moeq.layouts.spectral.stored import build_spectral_table, pack_basis, pack_map, packed_order
from moeq.quantizers import component_gptq
from moeq.quantizers.base import QuantizedMatrix, Quantizer
from moeq.quantizers.registry import make_quantizer
from moeq.spec import Unit
from moeq.transforms import shared_basis


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Basis:
    """A projection's basis as it is stored.

    Attributes:
        rows: all directions, as in the table of costs.
        scale_HG: their scales, or None.
        decoded_HH: what they stand for, float32.
        inverse_HH: for `shared_basis.components`.
    """

    rows: Tensor
    scale_HG: Tensor | None
    decoded_HH: Tensor
    inverse_HH: Tensor


def read_basis(job: Job, layer: int, projection: str) -> Basis:
    """The basis that the costs were measured in."""
    assert job.table is not None
    costs = job.table.layer(layer, projection)
    spec = basis_spec(job.table.facts.basis_bits)
    if spec is None:
        decoded_HH = costs.rows.float()
    else:
        assert costs.scale_HG is not None
        decoded_HH = dequantize(costs.rows, costs.scale_HG, None, spec)
    decoded_HH = decoded_HH.to(job.device)
    return Basis(
        rows=costs.rows,
        scale_HG=costs.scale_HG,
        decoded_HH=decoded_HH,
        inverse_HH=shared_basis.inverse_of(decoded_HH),
    )


def component_records(job: Job, layer: int) -> Iterator[memoryview]:
    """The blob of a layer, part by part; components are rounded without data."""
    shape = job.inventory.layers[layer]
    widths = job.plan.widths(layer, shape)
    form = job.plan.form
    for name in shape.projections:
        basis = read_basis(job, layer, name)
        widths_EH = widths[name]

        def work(expert: int, name: str = name, basis: Basis = basis, widths_EH: Widths = widths_EH) -> Rounded:
            unit = Unit(layer=layer, expert=expert, projection=name)
            p_HI = shared_basis.components(job.matrix(unit), basis.inverse_HH, name)
            return round_plainly(job, p_HI, widths_EH[expert], form)

        collected = Slabs(job, layer, name, widths)
        for expert, rounded in enumerate(in_order(work, shape.num_experts, job.device)):
            collected.add(expert, rounded)
        for part in collected.parts(basis):
            yield memoryview(part.numpy())  # type: ignore[arg-type]


Rounded = dict[int, QuantizedMatrix]
"""Width -> the components of one expert that have it, by direction."""


def round_plainly(
    job: Job,
    p_HI: Tensor,
    widths_H: Widths,
    form: Form,
    hessian_II: Tensor | None = None,
    quantizer: Quantizer | None = None,
) -> Rounded:
    """Round the components of one expert to their widths, each as a row of its own.

    Args:
        job: its quantizer rounds, unless another is given.
        p_HI: the components.
        widths_H: their widths.
        form: how they are stored.
        hessian_II: sum of z z^T over the inputs of down, for quantizers that need it.
        quantizer: instead of the job's.
    """
    quantizer = quantizer or job.quantizer
    rounded = {}
    for width in SLAB_WIDTHS:
        chosen = torch.from_numpy((widths_H == width).nonzero()[0])
        if len(chosen):
            part_nI = p_HI.index_select(0, chosen.to(p_HI.device))
            rounded[width] = quantizer.quantize(part_nI, form.slabs[width], hessian_II)
    return rounded


class Slabs:
    """Collects the rounded components of one projection of a layer, expert after expert."""

    def __init__(self, job: Job, layer: int, projection: str, widths: dict[str, Widths]) -> None:
        self._job, self._layer, self._projection = job, layer, projection
        self._widths = widths
        self._parts: dict[int, list[QuantizedMatrix]] = {width: [] for width in SLAB_WIDTHS}

    def add(self, expert: int, rounded: Rounded) -> None:
        """Take the components of the next expert."""
        for width, part in rounded.items():
            self._parts[width].append(part)
        job = self._job
        if expert in (0, job.inventory.layers[self._layer].num_experts - 1):
            unit = Unit(layer=self._layer, expert=expert, projection=self._projection)
            inner = job.inventory.layers[self._layer].shapes["down"][1]
            job.noted[unit] = weights_digest(decoded(rounded, job.plan.form, inner))

    def parts(self, basis: Basis) -> Iterator[Tensor]:
        """The records of the projection, in the order of the blob."""
        form = self._job.plan.form
        kept_H = torch.from_numpy(kept_directions(self._widths, joint=form.joint)[self._projection])
        if not (form.joint and self._projection == "up"):
            scale_RG = None if basis.scale_HG is None else basis.scale_HG[kept_H]
            yield pack_basis(basis.rows[kept_H].contiguous(), scale_RG, form.basis_bits)
        widths_EH = self._widths[self._projection]
        yield pack_map(widths_EH[:, kept_H.numpy()])
        for width, rows in slab_rows(widths_EH).items():
            if rows:
                parts = self._parts.pop(width)
                zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
                yield pack_matrix(
                    torch.cat([part.codes_NK for part in parts]),
                    torch.cat([part.scale_NG for part in parts]),
                    torch.cat(zeros) if zeros else None,
                    form.slabs[width],
                )


class ComponentRounding:
    """Rounds the components of one layer with error feedback, for `moeq.calibration.experts.quantize_experts`."""

    def __init__(self, job: Job, layer: int) -> None:
        shape = job.inventory.layers[layer]
        self._job, self._layer = job, layer
        self._form = job.plan.form
        self._widths = job.plan.widths(layer, shape)
        self._bases = {name: read_basis(job, layer, name) for name in shape.projections}
        self._slabs = {name: Slabs(job, layer, name, self._widths) for name in shape.projections}
        self._scales = make_quantizer("rtn", gain=job.gain)

    def round(self, expert: int, weights: dict[str, Tensor], hessian_KK: Tensor) -> dict[str, calibration.Rounded]:
        """See `moeq.calibration.experts.Round`."""
        done = {}
        for name, weight in weights.items():
            basis = self._bases[name]
            p_HI = shared_basis.components(weight, basis.inverse_HH, name)
            widths_H = self._widths[name][expert]
            if name == "down":
                rounded = round_plainly(self._job, p_HI, widths_H, self._form, hessian_KK)
            else:
                hessian_RR = basis.decoded_HH @ hessian_KK @ basis.decoded_HH.T
                rounded = self._feedback(p_HI, widths_H, hessian_RR)
            factor_nI = decoded(rounded, self._form, p_HI.shape[1])
            decode = partial(_restored, factor_nI, widths_H, basis, name)
            done[name] = calibration.Rounded(stored=rounded, decode=decode)
        return done

    def _feedback(self, p_HI: Tensor, widths_H: Widths, hessian_RR: Tensor) -> Rounded:
        if not bool(hessian_RR.any()):
            return round_plainly(self._job, p_HI, widths_H, self._form, None, self._scales)
        return component_gptq.round_components(
            p_HI, widths_H, self._form.slabs, hessian_RR, scales=self._scales, damp=self._job.damp
        )

    def sink(self, expert: int, projection: str, rounded: Rounded) -> None:
        """Take what was rounded, expert after expert."""
        self._slabs[projection].add(expert, rounded)

    def parts(self) -> Iterator[Tensor]:
        """The records of the layer, in the order of its blob."""
        for name, slabs in self._slabs.items():
            yield from slabs.parts(self._bases[name])


def decoded(rounded: Rounded, form: Form, inner: int) -> Tensor:
    """What rounded components stand for, (n, I) float32: by falling width, then by direction, as they are stored."""
    parts = [
        dequantize(part.codes_NK, part.scale_NG, part.zero_NG, form.slabs[width])
        for width, part in sorted(rounded.items(), reverse=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, inner)


def _restored(factor_nI: Tensor, widths_H: Widths, basis: Basis, projection: str, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) that components in stored order stand for."""
    factor_nI = factor_nI.to(basis.decoded_HH.device)
    basis_nH = basis.decoded_HH[torch.from_numpy(packed_order(widths_H)).to(factor_nI.device)]
    return (basis_nH.T @ factor_nI if projection == "down" else factor_nI.T @ basis_nH).to(dtype)


class SpectralWriter(LayerWriter):
    """Writes one layer."""

    def __init__(self, job: Job, layer: int) -> None:
        self._job, self._layer = job, layer

    def plain(self) -> tuple[Blob, ...]:
        """The parts of the blob as they are rounded."""
        return (component_records(self._job, self._layer),)

    def calibrated(self, experts: nn.Module, capture: Capture, pool: SpillPool) -> Calibrated:
        """Components with error feedback."""
        job, shape = self._job, self._job.inventory.layers[self._layer]
        rounding = ComponentRounding(job, self._layer)
        task = calibration.ExpertsTask(
            layer=shape,
            read=job.matrices(self._layer),
            round=rounding.round,
            sink=rounding.sink,
            device=job.device,
            compensate=job.compensate,
        )
        y_TH, counts = calibration.quantize_experts(task, experts, capture)
        size = blob_bytes(job.plan.form, job.plan.widths(self._layer, shape), *shape.shapes["down"])
        blob = pool.empty((size,), torch.uint8)
        start = 0
        for part in rounding.parts():
            blob[start : start + part.numel()] = part
            start += part.numel()
        return Calibrated(y_TH=y_TH, counts=counts, blobs=(blob,))

    def tables(self) -> tuple[Tensor, ...]:
        """Where the parts lie."""
        layer = self._job.inventory.layers[self._layer]
        hidden, inner = layer.shapes["down"]
        shape = SpectralShape(projections=layer.projections, num_experts=layer.num_experts, hidden=hidden, inner=inner)
        return (build_spectral_table(self._job.plan.form, self._job.plan.widths(self._layer, layer), shape),)


WRITER: Final = SpectralWriter

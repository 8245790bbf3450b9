"""Packed layers and experts modules for the tests of kernels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq.components import Form, basis_spec, kept_directions, slab_rows
from moeq.format.packing import pack_matrix
from moeq.format.spectral import SpectralShape, build_spectral_table, pack_basis, pack_map, parse_spectral_table
from moeq.kernels.packed import PackedLayer, PackedMatrix, kernel_facts
from moeq.kernels.rows import spectral_facts
from moeq.kernels.spectral import SpectralLayer, read_layer
from moeq.quantizers.rtn import Rtn
from moeq.spec import QuantSpec, sections, stored_bytes

SpecOf = Callable[[int, int], QuantSpec]
"""(expert, position of the projection) -> how its matrix is stored."""


def random_record(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Any codes, scales and zeros that a checkpoint could have."""
    record = torch.randint(0, 256, (stored_bytes(spec, shape),), generator=generator).byte()
    where = sections(spec, shape)
    offset, size = where.scales
    scale = (torch.rand(size // 2, generator=generator) + 0.5) / (2**spec.bits * shape[1] ** 0.5)
    record[offset : offset + size] = scale.half().view(torch.uint8)
    if spec.levels == "asym16":
        offset, size = where.zeros
        zero = torch.rand(size // 2, generator=generator) * 2**spec.bits
        record[offset : offset + size] = zero.half().view(torch.uint8)
    return record


def packed(weights: Tensor, spec: QuantSpec) -> Tensor:
    rounded = Rtn().quantize(weights, spec, None)
    return pack_matrix(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)


def packed_matrix(shape: tuple[int, int], spec: QuantSpec, device: torch.device) -> PackedMatrix:
    """A random matrix."""
    record = packed(torch.randn(shape), spec).to(device)
    return PackedMatrix(record=record, spec=spec, shape=shape, facts=kernel_facts([[(0, spec)]], [shape], device))


def packed_layer(
    num_experts: int, hidden: int, inner: int, spec_of: SpecOf, device: torch.device, *, gated: bool = True
) -> PackedLayer:
    """A layer of random experts, with its facts."""
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not gated:
        del shapes["gate"]
    records, entries, offset = [], [], 0
    for expert in range(num_experts):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = spec_of(expert, position)
            records.append(packed(torch.randn(shape) * shape[1] ** -0.5, spec))
            row.append((offset, spec))
            offset += records[-1].numel()
        entries.append(tuple(row))
    facts = kernel_facts(entries, list(shapes.values()), device)
    data = torch.cat(records).to(device)
    return PackedLayer(data=data, entries=tuple(entries), shapes=shapes, facts=facts)


def spectral_layer(
    widths: dict[str, np.ndarray], form: Form, hidden: int, inner: int, device: torch.device
) -> SpectralLayer:
    """A layer of random components of these widths, (E, H), with its facts."""
    num_experts = len(widths["down"])
    shape = SpectralShape(projections=tuple(widths), num_experts=num_experts, hidden=hidden, inner=inner)
    kept = kept_directions(widths, joint=form.joint)
    parts = []
    for name, widths_EH in widths.items():
        rank = int(kept[name].sum())
        if not (form.joint and name == "up"):
            rows, spec = torch.randn(rank, hidden) * hidden**-0.5, basis_spec(form.basis_bits)
            parts.append(pack_basis(rows, None, 16) if spec is None or not rank else packed(rows, spec))
        parts.append(pack_map(widths_EH[:, kept[name]]))
        for width, count in slab_rows(widths_EH).items():
            if count:
                parts.append(packed(torch.randn(count, inner) * inner**-0.5, form.slabs[width]))
    data, table = torch.cat(parts), build_spectral_table(form, widths, shape)
    layer = read_layer(data.to(device), parse_spectral_table(table, shape, data.numel()), shape, "layer")
    facts = spectral_facts(layer.entries, layer.widths, layer.starts, shape, device)
    return replace(layer, facts=facts)


def mixtral(hidden: int, inner: int, num_experts: int, hidden_act: str = "silu") -> nn.Module:
    """A module with plain gating; its own weights are not looked at."""
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        hidden_act=hidden_act,
    )
    return MixtralExperts(config)


def relative_error(answer: Tensor, wanted: Tensor) -> float:
    """|answer - wanted| / |wanted|, over all numbers."""
    return ((answer.float() - wanted.float()).norm() / wanted.float().norm()).item()

"""What kernels for spectral layers are asked before they are believed (`moeq.layouts.known_answers`)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.layouts.known_answers import (
    HIDDEN,
    INNER,
    LOUD,
    Case,
    Cases,
    Experts,
    Gated,
    calls,
    expert_cases,
    record_of,
    seeded,
    ways_of,
)
from moeq.layouts.spectral import cpu, gpu, reference
from moeq.layouts.spectral.facts import spectral_facts
from moeq.layouts.spectral.reference import SpectralLayer, read_layer
from moeq.layouts.spectral.shape import Form, SpectralShape, Widths, basis_bytes, basis_spec, kept_directions, slab_rows
from moeq.layouts.spectral.stored import build_spectral_table, pack_basis, pack_map, parse_spectral_table
from moeq.spec import BITS, GROUP_SIZES, QuantSpec


def layers() -> dict[str, SpectralLayer]:
    """A shared basis of 8 bits, and float16 bases of each projection's own."""
    return {"basis of 8 bits": _spectral(5, 8, joint=True), "basis of 16 bits": _spectral(3, 16, joint=False)}


def _spectral(num_experts: int, basis_bits: int, *, joint: bool) -> SpectralLayer:
    generator = seeded(basis_bits)
    slabs = {
        bits: QuantSpec(
            bits=bits, group_size=GROUP_SIZES[at % 4], levels=("half", "asym", "sym")[at % 3], layout="spectral"
        )
        for at, bits in enumerate(BITS)
    }
    form = Form(basis_bits=basis_bits, joint=joint, slabs=slabs)
    shape = SpectralShape(projections=("gate", "up", "down"), num_experts=num_experts, hidden=HIDDEN, inner=INNER)
    # Of 40 directions, those of the width 0 are dropped, and no expert keeps the last one.
    choices = np.array([0, *BITS, 2, 3, 4], dtype=np.uint8)
    widths: dict[str, Widths] = {}
    for at, name in enumerate(shape.projections):
        widths[name] = np.zeros((num_experts, HIDDEN), dtype=np.uint8)
        for expert in range(num_experts):
            widths[name][expert, :39] = choices[(np.arange(39) * 3 + 5 * expert + at) % len(choices)]
    kept = kept_directions(widths, joint=joint)
    parts = []
    for name, widths_EH in widths.items():
        rank = int(kept[name].sum())
        if not (joint and name == "up"):
            parts.append(_basis(basis_bits, rank, generator))
        parts.append(pack_map(widths_EH[:, kept[name]]))
        for bits, rows in slab_rows(widths_EH).items():
            if rows:
                parts.append(record_of(slabs[bits], (rows, INNER), generator, LOUD))
    data, table = torch.cat(parts), build_spectral_table(form, widths, shape)
    return read_layer(data, parse_spectral_table(table, shape, data.numel()), shape, "self-test")


def _basis(bits: int, rank: int, generator: torch.Generator) -> Tensor:
    spec = basis_spec(bits)
    if spec is not None:
        return record_of(spec, (rank, HIDDEN), generator)
    rows = torch.randn(rank, HIDDEN, generator=generator, dtype=torch.float32) * HIDDEN**-0.5
    record = pack_basis(rows, None, bits)
    assert record.numel() == basis_bytes(bits, rank, HIDDEN)
    return record


def _spectral_cases(path: str, device: torch.device) -> Iterator[Case]:
    module = Gated()
    for position, (name, layer) in enumerate(layers().items()):
        call = calls(layer.num_experts)
        wanted_TH = reference.experts(module, layer, call.x_TH.double(), call.index_Tk, call.weights_Tk)
        if path == "triton":
            facts = spectral_facts(layer.entries, layer.widths, layer.starts, layer.shape, device)
            there = replace(layer, data=layer.data.to(device), facts=facts)
        else:
            there = replace(layer, tables=reference.spectral_tables(layer))

        def kernel(exact: bool | None, there: SpectralLayer = there) -> Experts:
            run = gpu.run_experts if path == "triton" else cpu.experts
            return partial(run, module, replace(there, exact=exact))

        def wanted(rounds: bool, wanted_TH: Tensor = wanted_TH) -> tuple[Tensor, bool]:
            return wanted_TH, not rounds  # what kernels round is not only activations

        # Many tokens are left to the reference on CPUs.
        ways = ways_of(path, position, many=path == "triton")
        yield from expert_cases(name, call, device, ways, kernel, wanted)


CASES: Final[Mapping[str, Cases]] = {"spectral": _spectral_cases}
LATE_CASES: Final[Mapping[str, Cases]] = {}
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {"spectral": ("decode",)}

"""What kernels for grouped layers and linears are asked before they are believed (`moeq.layouts.known_answers`)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from moeq import native
from moeq.format import records
from moeq.kernels.facts import KernelFacts, kernel_facts
from moeq.layouts.grouped import cpu, gpu, reference, stored
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.layouts.known_answers import (
    EXACT,
    HIDDEN,
    INNER,
    Case,
    Cases,
    Experts,
    Gated,
    SpecOf,
    calls,
    expert_cases,
    record_of,
    rounded,
    seeded,
    ways_of,
)
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, TRELLISES, VECTORS, WHOLE_ROW, QuantSpec

ODD_WIDTHS: Final = (8, 32, 60, 72, 128, 264)
"""Inputs of linears beside `HIDDEN`: all lengths of what is left behind whole vectors, and none."""
COMPILED_WIDTHS: Final = (4, 6, 8)
"""Widths of linears that are tested where each costs a compilation: those that `--dense-bits` has. Layers of experts
have all widths."""


def matrices() -> dict[str, PackedMatrix]:
    """Matrices of every width, level set and group size, and of many lengths of rows."""
    generator = seeded(1)
    found = {}
    for at, bits in enumerate(BITS):
        # Powers of two and the others meet all level sets and group sizes in turn.
        spec = QuantSpec(bits=bits, group_size=GROUP_SIZES[(at + 2) % 4], levels=SCALAR_LEVELS[at % 4])
        group = "whole rows" if spec.group_size == WHOLE_ROW else f"groups of {spec.group_size}"
        for columns in (HIDDEN, ODD_WIDTHS[at % len(ODD_WIDTHS)]):
            shape = 40, columns
            name = f"{bits} bits {spec.levels} in {group} of {columns} inputs"
            found[name] = PackedMatrix(record=record_of(spec, shape, generator), spec=spec, shape=shape)
    return found


def codebook_matrices() -> dict[str, PackedMatrix]:
    """Matrices of every kind of codebook, one with more than one block down, and of many lengths of rows."""
    generator = seeded(2)
    found = {}
    for bits in VECTORS:
        spec = _codebook_spec(bits)
        for at, columns in enumerate((*ODD_WIDTHS, HIDDEN)):
            shape = 264 if at == len(ODD_WIDTHS) else 40, columns
            name = f"codebooks of {bits} bits of {columns} inputs"
            found[name] = PackedMatrix(record=record_of(spec, shape, generator), spec=spec, shape=shape)
    return found


def trellis_matrices() -> dict[str, PackedMatrix]:
    """Trellises of every width and group size, and of many lengths of rows."""
    generator = seeded(6)
    found = {}
    for bits in TRELLISES:
        for at, columns in enumerate((*ODD_WIDTHS, HIDDEN)):
            if (at + bits) % 3 and at < len(ODD_WIDTHS):
                continue  # every length meets some width
            spec = _trellis_spec(bits, at)
            shape = 150 if at == len(ODD_WIDTHS) else 40, columns
            name = f"trellis of {bits} bits of {columns} inputs"
            found[name] = PackedMatrix(record=record_of(spec, shape, generator), spec=spec, shape=shape)
    return found


def trellis_layers() -> dict[str, PackedLayer]:
    """A layer of trellises of every kind, and one where they lie beside all others."""
    widths = tuple(TRELLISES)
    return {
        "trellises": _grouped(3, lambda e, p: _trellis_spec(widths[(e + p) % len(widths)], e + p), 7),
        "trellises and others": _grouped(
            5, lambda e, p: _trellis_spec(widths[e % len(widths)], e) if p == e % 3 else _mixed(e, p), 8
        ),
    }


def layers() -> dict[str, PackedLayer]:
    """Everything mixed in one layer, and a layer with groups of 128 and whole rows alone."""
    return {"mixed groups": _grouped(7, _mixed, 3), "groups of 128": _grouped(3, _plain, 4)}


def codebook_layers() -> dict[str, PackedLayer]:
    """A layer of codebooks of every kind."""
    widths = tuple(VECTORS)
    return {"codebooks": _grouped(3, lambda e, p: _codebook_spec(widths[(e + p) % len(widths)]), 5)}


def _mixed(expert: int, position: int) -> QuantSpec:
    cycle = 3 * expert + position
    return QuantSpec(
        bits=BITS[cycle % len(BITS)], group_size=GROUP_SIZES[cycle % 4], levels=SCALAR_LEVELS[(cycle + expert) % 4]
    )


def _plain(expert: int, position: int) -> QuantSpec:
    cycle = 3 * expert + position
    group_size = WHOLE_ROW if cycle % 4 == 3 else 128
    return QuantSpec(bits=BITS[cycle % len(BITS)], group_size=group_size, levels=SCALAR_LEVELS[(cycle + expert) % 4])


def _codebook_spec(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=WHOLE_ROW, levels="vector")


def _trellis_spec(bits: int, at: int) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=GROUP_SIZES[at % 4], levels="trellis")


def _grouped(num_experts: int, spec_of: SpecOf, seed: int) -> PackedLayer:
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    generator = seeded(seed)
    records, entries, offset = [], [], 0
    for expert in range(num_experts):
        row = []
        for position, shape in enumerate(shapes.values()):
            spec = spec_of(expert, position)
            records.append(record_of(spec, shape, generator))
            row.append((offset, spec))
            offset += records[-1].numel()
        entries.append(tuple(row))
    return PackedLayer(data=torch.cat(records), entries=tuple(entries), shapes=shapes)


def rounded_linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """The reference, on inputs that are rounded as kernels for CPUs round them."""
    return reference.linear(rounded(x_SK), matrix)


def _decode_cases() -> Iterator[Case]:
    for name, matrix in (matrices() | codebook_matrices() | trellis_matrices()).items():
        record, spec, shape = matrix.record, matrix.spec, matrix.shape
        for dtype in native.DTYPES:
            w_NK = records.decode_in_chunks(record, spec, shape, dtype).double()
            yield Case(
                name=f"{name}, {str(dtype).removeprefix('torch.')}",
                answer=partial(native.decode_matrix, record, spec, shape, dtype),
                wanted=w_NK,
                tolerance=EXACT,
            )


def _linear_cases(path: str, matrices: dict[str, PackedMatrix], device: torch.device) -> Iterator[Case]:
    if path == "triton":
        matrices = {name: each for name, each in matrices.items() if each.spec.bits in COMPILED_WIDTHS}
    for position, (layer, matrix) in enumerate(matrices.items()):
        x_SK = calls(3, matrix.shape[1]).x_TH
        facts = _facts((((0, matrix.spec),),), [matrix.shape], device) if path == "triton" else None
        there = replace(matrix, record=matrix.record.to(device), facts=facts)
        for way in ways_of(path, position):
            wanted_SN = (rounded_linear if way.rounds else reference.linear)(x_SK.double(), matrix)
            for count in way.counts:
                x = x_SK[:count].to(device, way.dtype)
                kernel = gpu.run_linear if path == "triton" else cpu.linear
                yield Case(
                    name=f"{layer}, {way.name}, {count} tokens",
                    answer=partial(kernel, x, replace(there, exact=way.exact)),
                    wanted=wanted_SN[:count],
                    tolerance=way.tolerance(alike=True),
                )


def _grouped_cases(path: str, layers: dict[str, PackedLayer], device: torch.device) -> Iterator[Case]:
    module = Gated()
    for position, (name, layer) in enumerate(layers.items()):
        call = calls(layer.num_experts)
        inputs = call.x_TH.double(), call.index_Tk, call.weights_Tk
        there = ready(path, layer, device)

        def kernel(exact: bool | None, there: PackedLayer = there) -> Experts:
            run = gpu.run_experts if path == "triton" else cpu.experts
            return partial(run, module, replace(there, exact=exact))

        def wanted(
            rounds: bool, layer: PackedLayer = layer, inputs: tuple[Tensor, Tensor, Tensor] = inputs
        ) -> tuple[Tensor, bool]:
            linear = rounded_linear if rounds else reference.linear
            return reference.experts(module, layer, *inputs, linear=linear), True

        yield from expert_cases(name, call, device, ways_of(path, position), kernel, wanted)


def ready(path: str, layer: PackedLayer, device: torch.device) -> PackedLayer:
    """The layer on a device, with what its kernels want to know."""
    if path == "native":
        return replace(layer, table=stored.table_of(layer.entries))
    facts = _facts(layer.entries, list(layer.shapes.values()), device)
    return replace(layer, data=layer.data.to(device), facts=facts)


def _facts(entries: stored.Entries, shapes: list[tuple[int, int]], device: torch.device) -> KernelFacts:
    # `device_facts` has none on a CPU, where only triton's interpreter wants them.
    return kernel_facts(entries, shapes, device)


CASES: Final[Mapping[str, Cases]] = {
    "decode": lambda *_: _decode_cases(),
    "linear": lambda path, device: _linear_cases(path, matrices(), device),
    "grouped": lambda path, device: _grouped_cases(path, layers(), device),
}
"""Subject -> its calls. "decode" is weights from bytes, which all of the native path builds on."""


def _codebook_cases(path: str, device: torch.device) -> Iterator[Case]:
    yield from _linear_cases(path, codebook_matrices(), device)
    yield from _grouped_cases(path, codebook_layers(), device)


def _trellis_cases(path: str, device: torch.device) -> Iterator[Case]:
    yield from _linear_cases(path, trellis_matrices(), device)
    yield from _grouped_cases(path, trellis_layers(), device)


LATE_CASES: Final[Mapping[str, Cases]] = {"codebooks": _codebook_cases, "trellis": _trellis_cases}
"""Those that come after the subjects of all layouts."""
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("decode",),
    "grouped": ("decode", "linear"),
    "codebooks": ("decode", "linear", "grouped"),
    "trellis": ("decode", "linear", "grouped"),
}
"""Subject -> others that its calls on a CPU also run through."""

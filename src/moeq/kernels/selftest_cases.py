"""The calls that the self-tests of compiled kernels make, and what the torch reference answers to them in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from moeq import native
from moeq.format import blob, packing
from moeq.kernels import (
    cpu,
    cpu_layouts,
    gpu,
    gpu_spectral,
    gpu_tiled,
    known_layers,
    packed,
    reference,
    rows,
    spectral,
    tiled,
)
from moeq.kernels.packed import KernelFacts, PackedLayer, PackedMatrix
from moeq.kernels.spectral import SpectralLayer
from moeq.kernels.tiled import TiledLayer

EXACT: Final = 1e-4
"""Most that an answer in float32 may be off: hundreds of its roundings."""
SAME_ROUNDING: Final = 1e-2
"""If the reference rounds activations to 8 bits as well: those few may differ that lie between two codes."""
ROUNDED: Final = 6e-2
"""If it does not, or if answers are computed in bfloat16: about twice what is found."""
RUN: Final = 128
"""Activations that share a scale of 8 bits."""
FEW: Final = (1, 5)
"""Tokens of the calls of few; calls of many have `known_layers.TOKENS`."""
COMPILED_WIDTHS: Final = (4, 6, 8)
"""Widths of linears that are tested where each costs a compilation: those that `--dense-bits` has. Layers of experts
have all widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One answer, computed when it is asked for.

    Attributes:
        name: what it is an answer to.
        answer: the path's, any dtype, any device; None if it refuses.
        wanted: the reference's, of the same shape, float64, on the CPU.
        tolerance: see `moeq.kernels.selftest.Check`.
    """

    name: str
    answer: Callable[[], Tensor | None]
    wanted: Tensor
    tolerance: float


def cases(path: str, subject: str, device: torch.device) -> Iterator[Case]:
    """The calls of one subject, in the order in which they build on each other; arguments as `selftest.run`."""
    if subject == "decode":
        yield from _decode_cases()
    elif subject == "linear":
        yield from _linear_cases(path, known_layers.matrices(), device)
    elif subject == "grouped":
        yield from _grouped_cases(path, known_layers.grouped_layers(), device)
    elif subject == "spectral":
        yield from _spectral_cases(path, device)
    elif subject == "tiled":
        yield from _tiled_cases(path, device)
    else:
        yield from _linear_cases(path, known_layers.codebook_matrices(), device)
        yield from _grouped_cases(path, known_layers.codebook_layers(), device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One way to call a layer.

    Attributes:
        name: what is special about it.
        dtype: of the inputs.
        exact: as in `PackedLayer`.
        rounds: whether activations are rounded to 8 bits.
        counts: numbers of tokens.
    """

    name: str
    dtype: torch.dtype
    exact: bool | None
    rounds: bool
    counts: tuple[int, ...]

    def tolerance(self, alike: bool) -> float:
        """Most that answers may be off; `alike` if the reference rounds what the path rounds."""
        if self.rounds:
            return SAME_ROUNDING if alike else ROUNDED
        return EXACT if self.dtype == torch.float32 else ROUNDED


def _ways(path: str, position: int, *, many: bool = True) -> tuple[_Way, ...]:
    """The calls of the layer at a position; few or many tokens in turn where every layer costs a compilation."""
    more = (known_layers.TOKENS,) if many else ()
    if path == "triton":
        counts = FEW if position % 2 == 0 else (known_layers.TOKENS,)
        return (_Way(name="bfloat16", dtype=torch.bfloat16, exact=None, rounds=False, counts=counts),)
    return (
        _Way(name="float32", dtype=torch.float32, exact=True, rounds=False, counts=(*FEW, *more)),
        _Way(name="float32 in 8 bits", dtype=torch.float32, exact=False, rounds=True, counts=FEW),
        _Way(name="bfloat16 in 8 bits", dtype=torch.bfloat16, exact=None, rounds=True, counts=FEW),
        _Way(name="bfloat16", dtype=torch.bfloat16, exact=None, rounds=False, counts=more),
    )


def _rounded(x_SK: Tensor) -> Tensor:
    """What kernels for CPUs make of activations: 8 bits, in runs that share a scale."""
    runs = nn.functional.pad(x_SK, (0, -x_SK.shape[1] % RUN)).view(len(x_SK), -1, RUN)
    top = runs.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((runs * (127 / top)).round() * (top / 127)).view(len(x_SK), -1)[:, : x_SK.shape[1]]


def _rounded_linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    return reference.linear(_rounded(x_SK), matrix)


def _decode_cases() -> Iterator[Case]:
    for name, matrix in (known_layers.matrices() | known_layers.codebook_matrices()).items():
        record, spec, shape = matrix.record, matrix.spec, matrix.shape
        for dtype in native.DTYPES:
            w_NK = packing.decode_in_chunks(record, spec, shape, dtype).double()
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
        x_SK = known_layers.calls(3, matrix.shape[1]).x_TH
        facts = _facts((((0, matrix.spec),),), [matrix.shape], device) if path == "triton" else None
        there = replace(matrix, record=matrix.record.to(device), facts=facts)
        for way in _ways(path, position):
            wanted_SN = (_rounded_linear if way.rounds else reference.linear)(x_SK.double(), matrix)
            for count in way.counts:
                x = x_SK[:count].to(device, way.dtype)
                kernel = gpu.run_linear if path == "triton" else cpu.linear
                yield Case(
                    name=f"{layer}, {way.name}, {count} tokens",
                    answer=partial(kernel, x, replace(there, exact=way.exact)),
                    wanted=wanted_SN[:count],
                    tolerance=way.tolerance(alike=True),
                )


Experts = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(x, choices, weights) -> the answer of a layer."""


def _expert_cases(
    name: str, call: known_layers.Calls, device: torch.device, ways: tuple[_Way, ...],
    kernel: Callable[[bool | None], Experts], wanted: Callable[[bool], tuple[Tensor, bool]],
) -> Iterator[Case]:  # fmt: skip
    """The calls of a layer of experts.

    Args:
        name: of the layer.
        call: its inputs.
        device: where the kernels are.
        ways: to call it.
        kernel: exact -> what is tested.
        wanted: (activations are rounded) -> the reference's answers to all tokens, and whether it rounds as well.
    """
    answers = {rounds: wanted(rounds) for rounds in {way.rounds for way in ways}}
    for way in ways:
        wanted_TH, alike = answers[way.rounds]
        for count in way.counts:
            x_TH = call.x_TH[:count].to(device, way.dtype)
            routed = call.index_Tk[:count].to(device), call.weights_Tk[:count].to(device)
            yield Case(
                name=f"{name}, {way.name}, {count} tokens",
                answer=partial(kernel(way.exact), x_TH, *routed),
                wanted=wanted_TH[:count],
                tolerance=way.tolerance(alike),
            )


def _grouped_cases(path: str, layers: dict[str, PackedLayer], device: torch.device) -> Iterator[Case]:
    module = known_layers.Gated()
    for position, (name, layer) in enumerate(layers.items()):
        call = known_layers.calls(layer.num_experts)
        inputs = call.x_TH.double(), call.index_Tk, call.weights_Tk
        there = _ready(path, layer, device)

        def kernel(exact: bool | None, there: PackedLayer = there) -> Experts:
            run = gpu.run_experts if path == "triton" else cpu.experts
            return partial(run, module, replace(there, exact=exact))

        def wanted(
            rounds: bool, layer: PackedLayer = layer, inputs: tuple[Tensor, Tensor, Tensor] = inputs
        ) -> tuple[Tensor, bool]:
            linear = _rounded_linear if rounds else reference.linear
            return reference.experts(module, layer, *inputs, linear=linear), True

        yield from _expert_cases(name, call, device, _ways(path, position), kernel, wanted)


def _spectral_cases(path: str, device: torch.device) -> Iterator[Case]:
    module = known_layers.Gated()
    for position, (name, layer) in enumerate(known_layers.spectral_layers().items()):
        call = known_layers.calls(layer.num_experts)
        wanted_TH = spectral.experts(module, layer, call.x_TH.double(), call.index_Tk, call.weights_Tk)
        if path == "triton":
            facts = rows.spectral_facts(layer.entries, layer.widths, layer.starts, layer.shape, device)
            there = replace(layer, data=layer.data.to(device), facts=facts)
        else:
            there = replace(layer, tables=spectral.spectral_tables(layer))

        def kernel(exact: bool | None, there: SpectralLayer = there) -> Experts:
            run = gpu_spectral.run_experts if path == "triton" else cpu_layouts.spectral_experts
            return partial(run, module, replace(there, exact=exact))

        def wanted(rounds: bool, wanted_TH: Tensor = wanted_TH) -> tuple[Tensor, bool]:
            return wanted_TH, not rounds  # what kernels round is not only activations

        # Many tokens are left to the reference on CPUs.
        ways = _ways(path, position, many=path == "triton")
        yield from _expert_cases(name, call, device, ways, kernel, wanted)


def _tiled_cases(path: str, device: torch.device) -> Iterator[Case]:
    module = known_layers.Gated()
    for position, (name, layer) in enumerate(known_layers.tiled_layers().items()):
        call = known_layers.calls(layer.residual.num_experts)
        inputs = call.x_TH.double(), call.index_Tk, call.weights_Tk
        there = known_layers.on(layer, device)
        there = replace(there, residual=_ready(path, there.residual, device))
        if path == "triton":
            there = replace(there, facts={side: rows.side_facts(sides) for side, sides in there.sides.items()})

        def kernel(exact: bool | None, there: TiledLayer = there) -> Experts:
            run = gpu_tiled.run_experts if path == "triton" else cpu_layouts.tiled_experts
            return partial(run, module, replace(there, residual=replace(there.residual, exact=exact)))

        def wanted(
            rounds: bool, layer: TiledLayer = layer, inputs: tuple[Tensor, Tensor, Tensor] = inputs
        ) -> tuple[Tensor, bool]:
            # Inputs of the factors are rounded by the kernels, not by the reference.
            linear = _rounded_linear if rounds else reference.linear
            return tiled.experts(module, layer, *inputs, linear=linear), not rounds

        yield from _expert_cases(name, call, device, _ways(path, position), kernel, wanted)


def _ready(path: str, layer: PackedLayer, device: torch.device) -> PackedLayer:
    """The layer on a device, with what its kernels want to know."""
    if path == "native":
        return replace(layer, table=blob.table_of(layer.entries))
    facts = _facts(layer.entries, list(layer.shapes.values()), device)
    return replace(layer, data=layer.data.to(device), facts=facts)


def _facts(entries: blob.Entries, shapes: list[tuple[int, int]], device: torch.device) -> KernelFacts:
    # `device_facts` has none on a CPU, where only triton's interpreter wants them.
    return packed.kernel_facts(entries, shapes, device)

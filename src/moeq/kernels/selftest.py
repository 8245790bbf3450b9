"""Known-answer tests of compiled kernels on the machine where they are about to be used.

Every kernel was tested where it was written; whether this compiler, driver and processor make the same of it is found
out here, in milliseconds on a CPU and with a few compilations on a GPU. What a path answers for tiny layers
(`moeq.kernels.known_layers`) is compared with the torch reference in float64 on the CPU, which no compiled kernel of
ours takes part in: not even the one that decodes takes float64.

`moeq.kernels.trust` decides when to ask, and remembers what came out.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
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

PATHS: Final = ("native", "triton")
"""C++ kernels on CPUs, Triton kernels on GPUs."""
SUBJECTS: Final = ("decode", "linear", "grouped", "spectral", "tiled", "codebooks")
"""What is tested on its own. "decode" is weights from bytes, which all of the native path builds on."""
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
class Check:
    """What came out of one self-test.

    Attributes:
        path: one of `PATHS`.
        subject: one of `SUBJECTS`.
        device: torch's name of it.
        error: the largest distance of a token's answer from the right one, as a share of the latter's length, where
            it came closest to `tolerance`; None if there was no number.
        tolerance: what it may be at most.
        seconds: that the test took, compilation included.
        failure: what is wrong, None if nothing is. It holds no path of this machine.
    """

    path: str
    subject: str
    device: str
    error: float | None
    tolerance: float
    seconds: float
    failure: str | None

    @property
    def ok(self) -> bool:
        """Whether the answers are right."""
        return self.failure is None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One answer, computed when it is asked for.

    Attributes:
        name: what it is an answer to.
        answer: the path's, any dtype, any device; None if it refuses.
        wanted: the reference's, of the same shape, float64, on the CPU.
        tolerance: see `Check.tolerance`.
    """

    name: str
    answer: Callable[[], Tensor | None]
    wanted: Tensor
    tolerance: float


def subjects(path: str, device: torch.device) -> tuple[str, ...]:
    """What the path computes on a device; nothing where its compiler, or the right kind of processor, is missing."""
    if path == "native":
        return SUBJECTS if device.type == "cpu" and native.available() else ()
    if not gpu.AVAILABLE or device.type not in ("cuda", "cpu"):  # on a CPU in triton's interpreter
        return ()
    if device.type == "cuda" and torch.cuda.get_device_properties(device).major < gpu.AMPERE:
        return ()
    found = [subject for subject in SUBJECTS if subject not in ("decode", "codebooks")]
    return (*found, "codebooks") if _codebooks_have_facts() else tuple(found)


def run(path: str, device: torch.device, wanted: tuple[str, ...] | None = None) -> tuple[Check, ...]:
    """Test a path on a device; no failure of a kernel raises.

    Args:
        path: one of `PATHS`.
        device: "cpu" for the native path; a CUDA device for Triton, or "cpu" in triton's interpreter.
        wanted: of `subjects(path, device)`, None for all of them.
    """
    found = subjects(path, device)
    return tuple(_check(path, subject, device) for subject in found if wanted is None or subject in wanted)


def _check(path: str, subject: str, device: torch.device) -> Check:
    started = time.perf_counter()
    error: float | None = 0.0
    tolerance, failure = EXACT, None
    # Whatever the caller has switched on: neither its devices nor its dtypes nor its gradients are ours.
    with torch.no_grad(), torch.device("cpu"), torch.autocast(device.type, enabled=False):
        try:
            cases = _cases(path, subject, device)
            if device.type == "cuda":
                cases = _compiled(list(cases))
            for case in cases:
                found, failure = _judge(case)
                if failure is not None or found / case.tolerance >= (error or 0.0) / tolerance:
                    error, tolerance = found if math.isfinite(found) else None, case.tolerance
                if failure is not None:
                    break
        except torch.OutOfMemoryError:
            error, failure = None, OUT_OF_MEMORY
        except Exception as problem:  # whatever a compiler or a driver makes of it: the reference serves
            error, failure = None, _words(problem)
    seconds = time.perf_counter() - started
    return Check(
        path=path, subject=subject, device=str(device), error=error, tolerance=tolerance, seconds=seconds,
        failure=failure,
    )  # fmt: skip


def _compiled(cases: list[_Case]) -> Iterator[_Case]:
    """The cases, whose kernels are compiled side by side before the first one runs."""
    launch = import_module("moeq.kernels.triton_launch")  # needs triton, an optional dependency
    with launch.compiling(os.cpu_count() or 1):
        for case in cases:
            case.answer()
    yield from cases


OUT_OF_MEMORY: Final = "there was no memory left for the test"
"""The failure that says nothing about the kernels, so that it is not remembered."""


def _judge(case: _Case) -> tuple[float, str | None]:
    """The error of an answer, and what is wrong with it."""
    answer = case.answer()
    if answer is None:
        return math.nan, f"{case.name}: the kernels refuse the call"
    answer = answer.detach().to("cpu", torch.float64)
    if answer.shape != case.wanted.shape:
        return math.nan, f"{case.name}: the answer has the shape {list(answer.shape)}"
    if not bool(answer.isfinite().all()):
        return math.nan, f"{case.name}: answers are not finite"
    lengths = case.wanted.norm(dim=1)
    # A token that nobody answers is compared with the others.
    errors = (answer - case.wanted).norm(dim=1) / lengths.clamp(min=0.1 * float(lengths.mean()))
    error = float(errors.max())
    if error <= case.tolerance:
        return error, None
    return error, f"{case.name}: answers are off by {error:.2g} of their length, {case.tolerance:.2g} is allowed"


def _words(problem: Exception) -> str:
    """An exception in one line, of whose paths only names of files are left: it goes into reports of bugs."""
    text = " ".join(str(problem).split())[:300]
    return f"{type(problem).__name__}: {_PATH.sub(_file_name, text)}"


_PATH: Final = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\",:]+){2,}[/\\]?")


def _file_name(path: re.Match[str]) -> str:
    last = re.split(r"[/\\]", path.group().rstrip("/\\"))[-1]
    return last if "." in last else "(path)"


def _cases(path: str, subject: str, device: torch.device) -> Iterator[_Case]:
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


def _decode_cases() -> Iterator[_Case]:
    for name, matrix in (known_layers.matrices() | known_layers.codebook_matrices()).items():
        record, spec, shape = matrix.record, matrix.spec, matrix.shape
        for dtype in native.DTYPES:
            w_NK = packing.decode_in_chunks(record, spec, shape, dtype).double()
            yield _Case(
                name=f"{name}, {str(dtype).removeprefix('torch.')}",
                answer=partial(native.decode_matrix, record, spec, shape, dtype),
                wanted=w_NK,
                tolerance=EXACT,
            )


def _linear_cases(path: str, matrices: dict[str, PackedMatrix], device: torch.device) -> Iterator[_Case]:
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
                yield _Case(
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
) -> Iterator[_Case]:  # fmt: skip
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
            yield _Case(
                name=f"{name}, {way.name}, {count} tokens",
                answer=partial(kernel(way.exact), x_TH, *routed),
                wanted=wanted_TH[:count],
                tolerance=way.tolerance(alike),
            )


def _grouped_cases(path: str, layers: dict[str, PackedLayer], device: torch.device) -> Iterator[_Case]:
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


def _spectral_cases(path: str, device: torch.device) -> Iterator[_Case]:
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


def _tiled_cases(path: str, device: torch.device) -> Iterator[_Case]:
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


@cache
def _codebooks_have_facts() -> bool:
    """Whether kernels on GPUs take codebooks: whether `device_facts` makes facts for them."""
    layer = known_layers.codebook_layers()["codebooks"]
    nowhere = torch.empty(0, dtype=torch.uint8, device="meta")
    return packed.device_facts(nowhere, layer.entries, list(layer.shapes.values())) is not None

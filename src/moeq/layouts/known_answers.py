"""What compiled kernels are asked before they are believed: tiny layers with fixed bytes, and the calls of them.

Any bytes are codes, so nothing is rounded here and no quantizer is needed. Every layout has its layers and calls in its
file `known`, by subject (`CASES`); together they have every width, level set and group size, ragged rows, widths mixed
in one layer, and groups of 128 alone, for which kernels are specialised. The torch reference answers in float64.

Legend: T tokens, k experts per token, S tokens of one expert, H hidden, I expert width, N output rows, K input columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from torch import Tensor, nn

from moeq.spec import QuantSpec, sections, stored_bytes

HIDDEN: Final = 244
INNER: Final = 104
"""Both are ragged, with more than half a block of 128 behind the last whole one: vectors reach into it."""
TOKENS: Final = 33
"""So many that kernels choose another tile, or decode first, than for few."""
TOP_K: Final = 2
LOUD: Final = 4.0
"""Length of rows that few others are added to, so that their part of an answer is not lost in its rounding."""
EXACT: Final = 1e-4
"""Most that an answer in float32 may be off: hundreds of its roundings."""
SAME_ROUNDING: Final = 1e-2
"""If the reference rounds activations to 8 bits as well: those few may differ that lie between two codes."""
ROUNDED: Final = 6e-2
"""If it does not, or if answers are computed in bfloat16: about twice what is found."""
RUN: Final = 128
"""Activations that share a scale of 8 bits."""
FEW: Final = (1, 5)
"""Tokens of the calls of few; calls of many have `TOKENS`."""

SpecOf = Callable[[int, int], QuantSpec]
"""(expert, position of the projection) -> how its matrix is stored."""
Experts = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(x, choices, weights) -> the answer of a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One answer, computed when it is asked for.

    Attributes:
        name: what it is an answer to.
        answer: the path's, any dtype, any device; None if it refuses.
        wanted: the reference's, of the same shape, float64, on the CPU.
        tolerance: see `moeq.layouts.selftest.Check`.
    """

    name: str
    answer: Callable[[], Tensor | None]
    wanted: Tensor
    tolerance: float


Cases = Callable[[str, torch.device], Iterator[Case]]
"""(path, device) -> the calls of one subject, in the order in which they build on each other; see `selftest.run`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
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


def ways_of(path: str, position: int, *, many: bool = True) -> tuple[Way, ...]:
    """The calls of the layer at a position; few or many tokens in turn where every layer costs a compilation."""
    more = (TOKENS,) if many else ()
    if path == "triton":
        counts = FEW if position % 2 == 0 else (TOKENS,)
        return (Way(name="bfloat16", dtype=torch.bfloat16, exact=None, rounds=False, counts=counts),)
    return (
        Way(name="float32", dtype=torch.float32, exact=True, rounds=False, counts=(*FEW, *more)),
        Way(name="float32 in 8 bits", dtype=torch.float32, exact=False, rounds=True, counts=FEW),
        Way(name="bfloat16 in 8 bits", dtype=torch.bfloat16, exact=None, rounds=True, counts=FEW),
        Way(name="bfloat16", dtype=torch.bfloat16, exact=None, rounds=False, counts=more),
    )


@final
class Gated(nn.Module):
    """A family's experts module with down(silu(gate) * up) and no weights."""

    has_bias = False
    has_post_expert_norm = False
    is_concatenated = True

    def _apply_gate(self, fused: Tensor) -> Tensor:
        gate, up = fused.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calls:
    """Inputs of a layer.

    Attributes:
        x_TH: float32 numbers that bfloat16 has too, so that inputs are the same in every dtype.
        index_Tk: the choices, int64; the second token's last is of an expert that does not exist.
        weights_Tk: their weights, float32.
    """

    x_TH: Tensor
    index_Tk: Tensor
    weights_Tk: Tensor


def calls(num_experts: int, width: int = HIDDEN) -> Calls:
    """Inputs of `TOKENS` tokens of a width, for a layer of this many experts."""
    generator = seeded(num_experts)
    # So large that gates lie where SiLU is curved.
    x_TH = (4 * torch.randn(TOKENS, width, generator=generator, dtype=torch.float32)).bfloat16().float()
    index_Tk = (torch.arange(TOKENS).unsqueeze(1) + torch.tensor([0, 1])) % num_experts
    index_Tk[1, 1] = num_experts
    weights_Tk = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float32) + 0.1
    return Calls(x_TH=x_TH, index_Tk=index_Tk, weights_Tk=weights_Tk)


def seeded(seed: int) -> torch.Generator:
    """Random numbers that are always the same."""
    return torch.Generator().manual_seed(seed)


def record_of(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator, length: float = 0.5) -> Tensor:
    """Any codes, and scales and zeros that a checkpoint could have: rows come out about as long as `length`."""
    record = torch.randint(0, 256, (stored_bytes(spec, shape),), generator=generator, dtype=torch.int64).byte()
    where = sections(spec, shape)
    offset, size = where.scales
    # What codes, or entries of codebooks and trellises, are about as large as.
    top = 80 if spec.codebooks is not None else 50 if spec.history else 2**spec.bits
    scale = (
        (torch.rand(size // 2, generator=generator, dtype=torch.float32) + 0.5) * 2 * length / (top * shape[1] ** 0.5)
    )
    record[offset : offset + size] = scale.half().view(torch.uint8)
    if spec.levels == "asym16":
        offset, size = where.zeros
        zero = torch.rand(size // 2, generator=generator, dtype=torch.float32) * 2**spec.bits
        record[offset : offset + size] = zero.half().view(torch.uint8)
    return record


def rounded(x_SK: Tensor) -> Tensor:
    """What kernels for CPUs make of activations: 8 bits, in runs that share a scale."""
    runs = nn.functional.pad(x_SK, (0, -x_SK.shape[1] % RUN)).view(len(x_SK), -1, RUN)
    top = runs.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((runs * (127 / top)).round() * (top / 127)).view(len(x_SK), -1)[:, : x_SK.shape[1]]


def expert_cases(
    name: str, call: Calls, device: torch.device, ways: tuple[Way, ...],
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

"""Quantizes the experts of one layer from the tokens routed to them, a few experts in memory at a time.

Legend: T tokens of the run, S tokens of one expert, H hidden, I expert width, N output rows, K input columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeq.arch import hooks
from moeq.calibration import crew
from moeq.calibration.crew import Asked, Crew, Done
from moeq.calibration.moments import second_moment
from moeq.calibration.stream import Capture
from moeq.calibration.workers import in_order
from moeq.format.records import dequantize
from moeq.model_parts import MoeLayer
from moeq.quantizers.base import QuantizedMatrix, Quantizer
from moeq.spec import QuantSpec

CHUNK_TOKENS = 2048
"""Tokens of an expert that are worked on together."""
STEP_TOKENS = 256
MIN_TOKENS = 256
"""Statistics of an expert with fewer routed tokens are filled up with tokens of the whole layer."""
RIDGE = 0.3
"""What down may change by is held back as if every input had this many mean squares more."""

ReadMatrix = Callable[[int, str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """One rounded matrix.

    Attributes:
        stored: what will be packed: a `QuantizedMatrix`, or components of several widths.
        decode: the weights (N, K) that it stands for, in a dtype, on the CPU.
    """

    stored: Any
    decode: Callable[[torch.dtype], Tensor]


Round = Callable[[int, dict[str, Tensor], Tensor], dict[str, Rounded]]
"""(expert, weights (N, K) by projection, sum of x x^T over the inputs that they share) -> projection -> rounded."""
Sink = Callable[[int, str, Any], None]
"""Takes (expert, projection, what is to be stored) in storage order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertsTask:
    """What to do with one layer.

    Attributes:
        layer: its shapes.
        read: (expert, projection) -> the source weights (N, K); threads call it.
        round: rounds matrices of an expert; threads call it.
        sink: takes what was rounded, in storage order.
        device: where the work is done.
        compensate: down is fitted to what rounded gate and up answer, before it is rounded.
        crew: who rounds, None for threads of this process; `read` and `round` can then be pickled.
    """

    layer: MoeLayer
    read: ReadMatrix
    round: Round
    sink: Sink
    device: torch.device
    compensate: bool = False
    crew: Crew | None = None


def grouped(layer: MoeLayer, specs: Sequence[Sequence[QuantSpec]], quantizer: Quantizer) -> Round:
    """Rounds each matrix to its spec.

    Args:
        layer: its shapes.
        specs: expert -> projection (storage order) -> spec.
        quantizer: rounds a matrix given the second moments of its inputs; threads call it.
    """

    return partial(_grouped, layer, specs, quantizer)


def _grouped(
    layer: MoeLayer,
    specs: Sequence[Sequence[QuantSpec]],
    quantizer: Quantizer,
    expert: int,
    given: dict[str, Tensor],
    hessian_KK: Tensor,
) -> dict[str, Rounded]:
    mine = dict(zip(layer.projections, specs[expert], strict=True))
    names, weights = list(given), list(given.values())
    if len({mine[name] for name in names}) == 1 and _rows_are_apart(mine[names[0]]):
        parts = _in_one_go(weights, mine[names[0]], quantizer, hessian_KK)
    else:
        parts = [quantizer.quantize(w, mine[name], hessian_KK) for name, w in zip(names, weights, strict=True)]
    return {
        name: Rounded(stored=part, decode=partial(_decoded, part, mine[name]))
        for name, part in zip(names, parts, strict=True)
    }


def _rows_are_apart(spec: QuantSpec) -> bool:
    """Whether rows that follow a matrix have nothing to do with it: codebooks are of blocks, histories go on."""
    return spec.codebooks is None and not spec.history


def _in_one_go(
    weights: list[Tensor], spec: QuantSpec, quantizer: Quantizer, hessian_KK: Tensor
) -> list[QuantizedMatrix]:
    """Round matrices of one spec together, since rows do not influence each other."""
    joint = quantizer.quantize(torch.cat(weights) if len(weights) > 1 else weights[0], spec, hessian_KK)
    parts = []
    start = 0
    for weight in weights:
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        zero = None if joint.zero_NG is None else joint.zero_NG[rows]
        parts.append(QuantizedMatrix(codes_NK=joint.codes_NK[rows], scale_NG=joint.scale_NG[rows], zero_NG=zero))
    return parts


def _decoded(part: QuantizedMatrix, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    return dequantize(part.codes_NK, part.scale_NG, part.zero_NG, spec, dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Route:
    """The tokens that one expert answers.

    Attributes:
        token_S: their positions.
        weight_S: their routing weights, float32.
    """

    token_S: Tensor
    weight_S: Tensor


def quantize_experts(task: ExpertsTask, experts: nn.Module, capture: Capture) -> tuple[Tensor, list[int]]:
    """Round every expert of a layer and compute what the rounded experts answer.

    The down projection's statistics come from the rounded gate and up projections: these are the
    inputs it will see. Gate and up share one Hessian. An expert with fewer than `MIN_TOKENS` routed
    tokens borrows tokens from the whole layer, evenly spaced, so that its Hessian never vanishes.

    Returns:
        y_TH: the layer's output, in the dtype of the inputs.
        counts: routed tokens of each expert (before borrowing).
    """
    num_experts = task.layer.num_experts
    num_tokens = capture.x_TH.shape[0]
    routes = _routes(capture, num_experts)
    seen_by = None
    if capture.stats_Tk is not None:
        width = capture.stats_Tk.shape[-1]
        seen_by = [chosen // width for chosen in _choices(capture.stats_Tk, num_experts)]

    asked = [
        Asked(
            expert=expert,
            seen=_fill_up(torch.arange(num_tokens) if seen_by is None else seen_by[expert], num_tokens),
            routed=route.token_S,
        )
        for expert, route in enumerate(routes)
    ]
    results: Iterator[Done]
    if task.crew is None:
        work = partial(_quantize_expert, task, experts, capture.x_TH)
        results = in_order(lambda expert: work(asked[expert]), num_experts, task.device)
    else:
        alone = partial(_quantize_expert, replace(task, sink=_nothing, crew=None), hooks.alone(experts))
        results = crew.rounded(task.crew, alone, capture.x_TH, asked)
    y_TH = torch.zeros(capture.x_TH.shape, dtype=torch.float32)
    for expert, done in enumerate(results):
        for projection, stored in done.stored.items():
            task.sink(expert, projection, stored)
        _add_answers(y_TH, routes[expert], done.answers)
    return y_TH.to(capture.x_TH.dtype), [len(route.token_S) for route in routes]


def _nothing(*_: Any) -> None:
    """The sink of who only rounds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What the experts of a layer see at full precision.

    Attributes:
        mean: projection -> mean |x| of each input, (E, K) float32.
        square: projection -> mean x^2, (E, K) float32.
        counts: routed tokens of each expert (before borrowing).
    """

    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    counts: list[int]


def survey(layer: MoeLayer, read: ReadMatrix, experts: nn.Module, capture: Capture, device: torch.device) -> Survey:
    """The sizes of the inputs of every projection; experts with few tokens borrow some, as in `quantize_experts`."""
    num_tokens = len(capture.x_TH)
    routes = _routes(capture, layer.num_experts)

    def work(expert: int) -> tuple[Tensor, Tensor]:
        seen = _fill_up(routes[expert].token_S, num_tokens)
        weights = {name: read(expert, name).to(device, capture.x_TH.dtype) for name in layer.projections[:-1]}
        x_2H = _sizes((capture.x_TH.index_select(0, chunk), len(chunk)) for chunk in seen.split(CHUNK_TOKENS))
        return x_2H, _sizes(_inner(experts, expert, capture.x_TH, seen, weights, device))

    found = list(in_order(work, layer.num_experts, device))
    shared, inner = (torch.stack([pair[side] for pair in found]) for side in (0, 1))
    by_name = {name: inner if name == "down" else shared for name in layer.projections}
    return Survey(
        mean={name: both_E2K[:, 0] for name, both_E2K in by_name.items()},
        square={name: both_E2K[:, 1] for name, both_E2K in by_name.items()},
        counts=[len(route.token_S) for route in routes],
    )


def _sizes(chunks: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Mean |x| and mean x^2 over the first rows of chunks, (2, K) float32 on the CPU."""
    total: Tensor | None = None
    rows = 0
    for chunk, count in chunks:
        x_SK = chunk[:count].float()
        part = torch.stack([x_SK.abs().sum(0), x_SK.square().sum(0)]).cpu()
        total = part if total is None else total + part
        rows += count
    assert total is not None
    return total / rows


def _routes(capture: Capture, num_experts: int) -> list[_Route]:
    top_k = capture.index_Tk.shape[-1]
    flat_weights = capture.weights_Tk.reshape(-1)
    return [
        _Route(token_S=chosen // top_k, weight_S=flat_weights[chosen].float())
        for chosen in _choices(capture.index_Tk, num_experts)
    ]


def _choices(index_Tk: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """Where each expert stands in the flattened choices."""
    order, counts = hooks.by_expert(index_Tk, num_experts)
    return order[: sum(counts)].split(counts)


def _fill_up(seen: Tensor, num_tokens: int) -> Tensor:
    wanted = min(MIN_TOKENS, num_tokens) - seen.numel()
    if wanted <= 0:
        return seen
    borrowed = torch.linspace(0, num_tokens - 1, wanted).long()
    return torch.cat([seen, borrowed])


def _quantize_expert(task: ExpertsTask, experts: nn.Module, x_TH: Tensor, asked: Asked) -> Done:
    """Round one expert's matrices with the tokens that its statistics see, answer the routed ones."""
    expert, seen, routed = asked.expert, asked.seen, asked.routed
    projections = task.layer.projections
    source = {name: task.read(expert, name).to(task.device) for name in projections}
    down_HI = source.pop("down")
    hessian = second_moment(
        ((x_TH.index_select(0, chunk), len(chunk)) for chunk in seen.split(CHUNK_TOKENS)), task.device
    )
    rounded = task.round(expert, source, hessian)
    weights = {name: done.decode(x_TH.dtype).to(task.device) for name, done in rounded.items()}
    z_SI = _inner(experts, expert, x_TH, seen, weights, task.device)
    # Natural routing sees exactly the routed tokens: their activations serve both purposes.
    shared = torch.equal(seen, routed)
    if shared or task.compensate:
        z_SI = list(z_SI)
    hessian = second_moment(z_SI, task.device)
    if task.compensate:
        wanted_SI = _inner(
            experts, expert, x_TH, seen, {name: w.to(x_TH.dtype) for name, w in source.items()}, task.device
        )
        down_HI = _compensated(down_HI, zip(wanted_SI, z_SI, strict=True), hessian)
    rounded |= task.round(expert, {"down": down_HI}, hessian)
    if not shared:
        z_SI = _inner(experts, expert, x_TH, routed, weights, task.device)
    answers = _answers(experts, expert, z_SI, rounded["down"].decode(x_TH.dtype).to(task.device))
    return Done(stored={name: rounded[name].stored for name in projections}, answers=answers)


def _compensated(
    down_HI: Tensor, chunks: Iterable[tuple[tuple[Tensor, int], tuple[Tensor, int]]], hessian_II: Tensor
) -> Tensor:
    """The down that answers to rounded gate and up what the original answers to the original ones.

    Least squares: the minimum over D of sum ||W z - (W + D) z'||^2 + r ||D||^2, where z is what down would see and z'
    what it will see; D = W (sum (z - z') z'^T) (sum z' z'^T + r)^-1. r is `RIDGE` mean diagonals (decision 0030).

    Args:
        down_HI: W.
        chunks: rows of z and z', chunk by chunk, each with how many of the rows count.
        hessian_II: sum z' z'^T.
    """
    ridge = RIDGE * float(hessian_II.diagonal().mean())
    if not (ridge > 0 and math.isfinite(ridge)):
        return down_HI
    lost_II = torch.zeros_like(hessian_II)
    for (z_SI, count), (rounded_SI, _) in chunks:
        rounded = rounded_SI[:count].float()
        lost_II.addmm_((z_SI[:count].float() - rounded).T, rounded)
    damped_II = hessian_II + ridge * torch.eye(len(hessian_II), device=hessian_II.device)
    factor_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed) or not bool(torch.isfinite(lost_II).all()):
        return down_HI
    return down_HI.float() + down_HI.float() @ torch.cholesky_solve(lost_II.T, factor_II).T


def _inner(
    experts: nn.Module, expert: int, x_TH: Tensor, tokens: Tensor, weights: dict[str, Tensor], device: torch.device
) -> Iterable[tuple[Tensor, int]]:
    """Inputs of the down projection for some tokens, chunk by chunk: (rows, I) and how many of the rows count.

    Rows come in few different numbers. Experts have all sorts of token counts, and a matrix product of a new shape
    leaves compiled code behind, which over hundreds of experts cuts the memory between it into unusable pieces.
    """
    for chunk in tokens.split(CHUNK_TOKENS):
        count = len(chunk)
        rows = min(1 << max(count - 1, 0).bit_length(), -(-count // STEP_TOKENS) * STEP_TOKENS)
        x_SH = x_TH.index_select(0, functional.pad(chunk, (0, rows - count))).to(device)
        gate_SI = x_SH @ weights["gate"].T if "gate" in weights else None
        yield hooks.activation(experts, expert, gate_SI, x_SH @ weights["up"].T), count


def _answers(experts: nn.Module, expert: int, z_SI: Iterable[tuple[Tensor, int]], down_HI: Tensor) -> list[Tensor]:
    """What one expert answers, chunk by chunk, on the CPU."""
    return [hooks.finish(experts, expert, chunk_SI @ down_HI.T)[:count].cpu() for chunk_SI, count in z_SI]


def _add_answers(y_TH: Tensor, route: _Route, answers: list[Tensor]) -> None:
    """Add one expert's answers, weighted, to the layer's output."""
    start = 0
    for answer_SH in answers:
        part = slice(start, start + len(answer_SH))
        start = part.stop
        y_TH.index_add_(0, route.token_S[part], answer_SH * route.weight_S[part].unsqueeze(-1))


def replay_experts(
    layer: MoeLayer, read: ReadMatrix, experts: nn.Module, capture: Capture, device: torch.device
) -> tuple[Tensor, list[int]]:
    """What experts with the weights of `read` (already rounded) answer; same arithmetic as `quantize_experts`.

    Returns:
        y_TH and counts, as `quantize_experts`.
    """
    routes = _routes(capture, layer.num_experts)

    def work(expert: int) -> list[Tensor]:
        weights = {name: read(expert, name).to(device, capture.x_TH.dtype) for name in layer.projections}
        z_SI = _inner(experts, expert, capture.x_TH, routes[expert].token_S, weights, device)
        return _answers(experts, expert, z_SI, weights["down"])

    y_TH = torch.zeros(capture.x_TH.shape, dtype=torch.float32)
    for route, answers in zip(routes, in_order(work, layer.num_experts, device), strict=True):
        _add_answers(y_TH, route, answers)
    return y_TH.to(capture.x_TH.dtype), [len(route.token_S) for route in routes]

"""Quantizes the experts of one layer from the tokens routed to them, one expert in memory at a time.

Legend: T tokens of the run, S tokens of one expert, H hidden, I expert width, N output rows, K input columns.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.artifacts import MoeLayer
from moeq.calibration.stream import Capture
from moeq.format.packing import dequantize
from moeq.quantizers.base import QuantizedMatrix, Quantizer
from moeq.spec import QuantSpec

CHUNK_TOKENS = 8192
MIN_TOKENS = 256
"""Statistics of an expert with fewer routed tokens are filled up with tokens of the whole layer."""

ReadMatrix = Callable[[int, str], Tensor]
Sink = Callable[[int, str, QuantizedMatrix], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertsTask:
    """What to do with one layer.

    Attributes:
        layer: its shapes.
        specs: expert -> projection (storage order) -> spec.
        read: (expert, projection) -> the source weights (N, K).
        quantizer: rounds a matrix given the second moments of its inputs.
        sink: takes (expert, projection, rounded matrix) in storage order.
        device: where the work is done.
    """

    layer: MoeLayer
    specs: Sequence[Sequence[QuantSpec]]
    read: ReadMatrix
    quantizer: Quantizer
    sink: Sink
    device: torch.device


def quantize_experts(task: ExpertsTask, experts: nn.Module, capture: Capture) -> tuple[Tensor, list[int]]:
    """Round every expert of a layer and compute what the rounded experts answer.

    The down projection's statistics come from the rounded gate and up projections: these are the
    inputs it will see. Gate and up share one Hessian. An expert with fewer than `MIN_TOKENS` routed
    tokens borrows tokens from the whole layer, evenly spaced, so that its Hessian never vanishes.

    Returns:
        y_TH: the layer's output, in the dtype of the inputs.
        counts: routed tokens of each expert (before borrowing).
    """
    num_tokens, hidden = capture.x_TH.shape
    order, counts = hooks.by_expert(capture.index_Tk, task.layer.num_experts)
    top_k = capture.index_Tk.shape[-1]
    flat_weights = capture.weights_Tk.reshape(-1)
    stats_order, stats_counts = (
        (order, counts) if capture.stats_Tk is None else hooks.by_expert(capture.stats_Tk, task.layer.num_experts)
    )
    y_TH = torch.zeros(num_tokens, hidden, dtype=torch.float32)
    start = stats_start = 0
    for expert in range(task.layer.num_experts):
        choices = order[start : start + counts[expert]]
        start += counts[expert]
        routed = choices // top_k
        if capture.stats_Tk is None:
            seen = torch.arange(num_tokens)
        else:
            seen = stats_order[stats_start : stats_start + stats_counts[expert]] // capture.stats_Tk.shape[-1]
            stats_start += stats_counts[expert]
        answer = _quantize_expert(task, experts, expert, capture.x_TH, _fill_up(seen, num_tokens), routed)
        y_TH.index_add_(0, routed, answer.float() * flat_weights[choices].float().unsqueeze(-1))
    return y_TH.to(capture.x_TH.dtype), counts


def _fill_up(seen: Tensor, num_tokens: int) -> Tensor:
    wanted = min(MIN_TOKENS, num_tokens) - seen.numel()
    if wanted <= 0:
        return seen
    borrowed = torch.linspace(0, num_tokens - 1, wanted).long()
    return torch.cat([seen, borrowed])


def _quantize_expert(
    task: ExpertsTask, experts: nn.Module, expert: int, x_TH: Tensor, seen: Tensor, routed: Tensor
) -> Tensor:
    """Round one expert's matrices, hand them to the sink, answer its routed tokens (S, H)."""
    projections = task.layer.projections
    specs = dict(zip(projections, task.specs[expert], strict=True))
    dtype = x_TH.dtype
    hessian = _second_moment((x_TH[chunk] for chunk in seen.split(CHUNK_TOKENS)), task.device)
    rounded: dict[str, Tensor] = {}

    def settle(projection: str, quantized: QuantizedMatrix) -> None:
        spec = specs[projection]
        task.sink(expert, projection, quantized)
        parts = (quantized.codes_NK, quantized.scale_NG, quantized.zero_NG)
        rounded[projection] = dequantize(*parts, spec, dtype).to(task.device)

    inputs = [projection for projection in projections if projection != "down"]
    for projection, quantized in _quantize_inputs(task, expert, inputs, specs, hessian):
        settle(projection, quantized)

    def inner(tokens: Tensor) -> Tensor:
        x_SH = x_TH[tokens].to(task.device)
        gate_SI = x_SH @ rounded["gate"].T if "gate" in rounded else None
        return hooks.activation(experts, expert, gate_SI, x_SH @ rounded["up"].T)

    # Natural routing sees exactly the routed tokens: their activations serve both purposes.
    shared = seen.numel() == routed.numel() and bool((seen == routed).all())
    z_SI = [inner(chunk) for chunk in seen.split(CHUNK_TOKENS)]
    hessian = _second_moment(z_SI, task.device)
    settle("down", task.quantizer.quantize(task.read(expert, "down").to(task.device), specs["down"], hessian))
    if not shared:
        z_SI = [inner(chunk) for chunk in routed.split(CHUNK_TOKENS)]
    down_HI = rounded["down"]
    return torch.cat([hooks.finish(experts, expert, chunk @ down_HI.T).cpu() for chunk in z_SI])


def _quantize_inputs(
    task: ExpertsTask, expert: int, projections: list[str], specs: dict[str, QuantSpec], hessian: Tensor
) -> list[tuple[str, QuantizedMatrix]]:
    """Round gate and up; in one go when their specs agree, since rows do not influence each other."""
    weights = [task.read(expert, projection).to(task.device) for projection in projections]
    if len({specs[projection] for projection in projections}) > 1:
        return [
            (projection, task.quantizer.quantize(weight, specs[projection], hessian))
            for projection, weight in zip(projections, weights, strict=True)
        ]
    joint = task.quantizer.quantize(torch.cat(weights), specs[projections[0]], hessian)
    result = []
    start = 0
    for projection, weight in zip(projections, weights, strict=True):
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        zero = None if joint.zero_NG is None else joint.zero_NG[rows]
        result.append(
            (
                projection,
                QuantizedMatrix(codes_NK=joint.codes_NK[rows], scale_NG=joint.scale_NG[rows], zero_NG=zero),
            )
        )
    return result


def _second_moment(chunks: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum over tokens of x x^T, (K, K) float32."""
    total: Tensor | None = None
    for chunk in chunks:
        x_SK = chunk.to(device, torch.float32)
        if total is None:
            total = x_SK.T @ x_SK
        else:
            total.addmm_(x_SK.T, x_SK)
    assert total is not None
    return total


def replay_experts(
    layer: MoeLayer, read: ReadMatrix, experts: nn.Module, capture: Capture, device: torch.device
) -> tuple[Tensor, list[int]]:
    """What experts with the weights of `read` (already rounded) answer; same arithmetic as `quantize_experts`.

    Returns:
        y_TH and counts, as `quantize_experts`.
    """
    num_tokens, hidden = capture.x_TH.shape
    order, counts = hooks.by_expert(capture.index_Tk, layer.num_experts)
    flat_weights = capture.weights_Tk.reshape(-1)
    y_TH = torch.zeros(num_tokens, hidden, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        choices = order[start : start + count]
        start += count
        routed = choices // capture.index_Tk.shape[-1]
        weights = {name: read(expert, name).to(device, capture.x_TH.dtype) for name in layer.projections}
        parts = []
        for chunk in routed.split(CHUNK_TOKENS):
            x_SH = capture.x_TH[chunk].to(device)
            gate_SI = x_SH @ weights["gate"].T if "gate" in weights else None
            inner_SI = hooks.activation(experts, expert, gate_SI, x_SH @ weights["up"].T)
            parts.append(hooks.finish(experts, expert, inner_SI @ weights["down"].T).cpu())
        y_TH.index_add_(0, routed, torch.cat(parts).float() * flat_weights[choices].float().unsqueeze(-1))
    return y_TH.to(capture.x_TH.dtype), counts

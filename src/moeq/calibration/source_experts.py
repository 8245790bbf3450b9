"""Routed experts whose weights are read from the source one matrix at a time, forward and backward.

Legend: T tokens, k experts per token, S tokens of one expert, H hidden, I expert width, N output rows, K input columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.model_parts import MoeLayer

ReadMatrix = Callable[[int, str], Tensor]
"""(expert, projection) -> weights (N, K)."""


class _ReadMatmul(torch.autograd.Function):
    """x W^T with W read when it is needed, forward and again backward; W itself never enters the graph."""

    @staticmethod
    def forward(ctx: Any, x_SK: Tensor, read: ReadMatrix, expert: int, projection: str) -> Tensor:
        ctx.source = (read, expert, projection)
        return _product(x_SK, read(expert, projection).to(x_SK).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_SN,) = grads
        read, expert, projection = ctx.source
        return _product(grad_SN, read(expert, projection).to(grad_SN)), None, None, None


def _product(x_SK: Tensor, w_KN: Tensor) -> Tensor:
    return (hooks.filled_up(x_SK) @ w_KN)[: x_SK.shape[0]]


class SourceExperts(nn.Module):
    """A handler (`moeq.arch.hooks`) that answers as the family's own experts would with the weights of `read`.

    Differentiable with respect to the inputs and the routing weights. Weights are read twice for each
    call that is differentiated and no two matrices are held at once.

    Args:
        layer: shapes of the experts.
        read: the weights, in any dtype, on any device.
    """

    def __init__(self, layer: MoeLayer, read: ReadMatrix) -> None:
        super().__init__()
        self.layer = layer
        self.read = read

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H) in the dtype of `hidden_states`; raises what `read` raises."""
        order, counts = hooks.by_expert(top_k_index, self.layer.num_experts)
        tokens = order // top_k_index.shape[-1]
        parts = []
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            x_SH = hidden_states[tokens[start : start + count]]
            start += count
            gate_SI = self._linear(x_SH, expert, "gate") if "gate" in self.layer.shapes else None
            inner_SI = hooks.activation(experts, expert, gate_SI, self._linear(x_SH, expert, "up"))
            parts.append(hooks.finish(experts, expert, self._linear(inner_SI, expert, "down")))
        return hooks.combine(parts, order, top_k_weights, hidden_states)

    def _linear(self, x_SK: Tensor, expert: int, projection: str) -> Tensor:
        return _ReadMatmul.apply(x_SK, self.read, expert, projection)  # type: ignore[no-untyped-call]

"""The torch reference of every kernel: decodes one matrix at a time, never two experts at once.

Legend: T tokens, k experts per token, S tokens of one expert, N output rows, K input columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.format.records import decode_matrix
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix

Decode = Callable[[torch.dtype], Tensor]
"""The weights (N, K) in a dtype."""
Linear = Callable[[Tensor, PackedMatrix], Tensor]


class _DecodedMatmul(torch.autograd.Function):
    """x W^T with W decoded on the fly, forward and backward; W itself never enters the graph."""

    @staticmethod
    def forward(ctx: Any, x_SK: Tensor, decode: Decode) -> Tensor:
        ctx.decode = decode
        return x_SK @ decode(x_SK.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_SN,) = grads
        return grad_SN @ ctx.decode(grad_SN.dtype), None


def product(x_SK: Tensor, decode: Decode) -> Tensor:
    """x W^T, (S, N), for the W (N, K) that `decode` gives in a dtype; differentiable with respect to x."""
    return _DecodedMatmul.apply(x_SK, decode)  # type: ignore[no-untyped-call]


def linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """x W^T, (S, N), for a packed W (N, K); differentiable with respect to x."""
    return product(x_SK, partial(decode_matrix, matrix.record, matrix.spec, matrix.shape))


def experts(
    module: nn.Module,
    layer: PackedLayer,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    linear: Linear = linear,
) -> Tensor:
    """The routed experts of one layer.

    Args:
        module: the family's experts module, stripped of its weights; gives activation and biases.
        layer: the packed weights.
        hidden_states: (T, H).
        top_k_index: (T, k).
        top_k_weights: (T, k).
        linear: computes x W^T for one matrix.

    Returns:
        (T, H) in the dtype of `hidden_states`.
    """
    order, counts = hooks.by_expert(top_k_index, layer.num_experts)
    tokens = order // top_k_index.shape[-1]
    parts = []
    for expert, span in hooks.spans(counts):
        x_SH = hidden_states[tokens[span]]
        gate_SI = linear(x_SH, layer.matrix(expert, "gate")) if "gate" in layer.shapes else None
        up_SI = linear(x_SH, layer.matrix(expert, "up"))
        inner_SI = hooks.activation(module, expert, gate_SI, up_SI)
        parts.append(hooks.finish(module, expert, linear(inner_SI, layer.matrix(expert, "down"))))
    return hooks.combine(parts, order, top_k_weights, hidden_states)

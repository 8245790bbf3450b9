"""Listens to the experts of one layer: what they are asked, and what the loss makes of their answers.

Other linears are listened to call by call, as gradients come by: nothing of them is kept.

Legend: T tokens, H hidden, k experts per token, N outputs, K inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeq.calibration.spill import SpillPool
from moeq.model_parts import MoeLayer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What the experts of one layer were asked in one batch of sequences, and how much the loss minds.

    Attributes:
        experts: the family's experts module, for activation and biases (`moeq.arch.hooks`).
        x_TH: inputs of the experts, in the compute dtype.
        index_Tk: chosen experts.
        weights_Tk: their routing weights.
        grad_TH: gradient of each sequence's loss (mean over its predicted tokens) with respect to the
            experts' joint output, in the compute dtype; None when no gradients were asked for.
    """

    experts: nn.Module
    x_TH: Tensor
    index_Tk: Tensor
    weights_Tk: Tensor
    grad_TH: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heard:
    """One call of a linear, on the device of its block and in the compute dtype.

    Attributes:
        x_TK: its inputs.
        grad_TN: gradient of each sequence's loss (mean over its predicted tokens) with respect to its outputs; None
            when no gradients were asked for.
    """

    x_TK: Tensor
    grad_TN: Tensor | None


Hear = Callable[[Heard], None]
"""Told of every call of a linear, during the backward pass if there is one."""


def hear_calls(linear: nn.Module, hear: Hear, *, gradients: bool = True) -> RemovableHandle:
    """Tell `hear` of every call of `linear`, with gradients of those that the loss depends on; the handle ends it."""

    def passing(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        hear(Heard(x_TK=x.detach().reshape(-1, x.shape[-1]), grad_TN=None))

    if not gradients:
        return linear.register_forward_pre_hook(passing, with_kwargs=True)

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        # A copy: nothing in autograd keeps families from changing the inputs of a frozen linear afterwards.
        x_TK = x.detach().reshape(-1, x.shape[-1]).clone()
        if not output.requires_grad:
            # The first block: nothing before this linear is differentiated. A copy, as families may work in place.
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda grad: hear(Heard(x_TK=x_TK, grad_TN=grad.detach().reshape(-1, grad.shape[-1]))))
        return output

    return linear.register_forward_hook(called, with_kwargs=True)


class _Rows:
    """Rows collected piece by piece in a store of the pool."""

    def __init__(self, pool: SpillPool, capacity: int) -> None:
        self._pool = pool
        self._capacity = capacity
        self._store: Tensor | None = None
        self._count = 0

    def append(self, rows: Tensor) -> int:
        """Add rows; returns where they start."""
        start, self._count = self._count, self._count + rows.shape[0]
        if self._store is None or self._count > self._store.shape[0]:
            # More rows than tokens: the block asks its experts more than once.
            whole = self._pool.empty((max(self._count, self._capacity, 2 * start), *rows.shape[1:]), rows.dtype)
            if self._store is not None:
                whole[:start] = self._store[:start]
            self._store = whole
        self._store[start : self._count] = rows
        return start

    def write(self, start: int, rows: Tensor) -> None:
        """Overwrite rows that were added before."""
        assert self._store is not None
        self._store[start : start + rows.shape[0]] = rows

    def rows(self, width: int, dtype: torch.dtype) -> Tensor:
        """All rows; (0, width) when there are none."""
        return torch.empty(0, width, dtype=dtype) if self._store is None else self._store[: self._count]


class ExpertsTap(nn.Module):
    """A handler (`moeq.arch.hooks`) around another one that keeps what passes by.

    Args:
        inner: computes the answers.
        pool: makes the stores.
        capacity: rows expected, all calls together.
        gradients: keep the gradients of the answers too; they are there after backward.
    """

    def __init__(self, inner: nn.Module, pool: SpillPool, capacity: int, *, gradients: bool) -> None:
        super().__init__()
        self.inner = inner
        self._x, self._index, self._weights, self._grad = (_Rows(pool, capacity) for _ in range(4))
        self._gradients = gradients

    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H), the inner handler's answer."""
        output: Tensor = self.inner(experts, hidden_states, top_k_index, top_k_weights)
        start = self._x.append(hidden_states.detach())
        self._index.append(top_k_index)
        self._weights.append(top_k_weights.detach())
        if not self._gradients:
            return output
        if not output.requires_grad:
            # The first block: nothing before its experts is differentiated. A copy, as families may add in place.
            output = output.detach().requires_grad_().clone()
        # An answer that the loss does not depend on never hears of its gradient: it is zero.
        self._grad.append(torch.zeros_like(output, requires_grad=False))
        output.register_hook(lambda grad: self._grad.write(start, grad))
        return output

    def asked(self, experts: nn.Module, layer: MoeLayer, dtype: torch.dtype) -> Asked:
        """Everything kept, token after token; tensors of zero rows of `dtype` if the experts were never asked."""
        hidden = layer.shapes["down"][0]
        return Asked(
            experts=experts,
            x_TH=self._x.rows(hidden, dtype),
            index_Tk=self._index.rows(layer.top_k, torch.int64),
            weights_Tk=self._weights.rows(layer.top_k, dtype),
            grad_TH=self._grad.rows(hidden, dtype) if self._gradients else None,
        )

"""One forward pass, seen from outside: the logits, and which experts each token was sent to.

Legend: B sequences, T tokens, P = T - 1 predicted positions, V vocabulary, k experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.arch.sorted_rows import FAMILIES, top_k_index
from moeq.evals.forward import device_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one batch did to a model.

    Attributes:
        logits_BPV: logits of the predicted positions, in the model's dtype.
        routing: for each MoE layer in order, the experts chosen, (B, T, k); -1 marks no expert.
            Empty if the model has no routed experts or routing was not tapped.
    """

    logits_BPV: Tensor
    routing: tuple[Tensor, ...]


def find_experts(model: nn.Module) -> list[nn.Module]:
    """The stacked experts of every MoE layer, in order.

    They are known by two flags that transformers' experts protocol
    (`transformers.integrations.moe.use_experts_implementation`) sets on every family's module, or by their class.
    """
    return [
        module
        for module in model.modules()
        if (hasattr(module, "has_gate") and hasattr(module, "is_transposed")) or type(module).__name__ in FAMILIES
    ]


@contextmanager
def tap_routing(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """While open, record `top_k_index` of every call of every experts module.

    Yields:
        MoE layer -> calls -> (tokens, k), in the order of `find_experts`.
    """
    experts = find_experts(model)
    records: list[list[Tensor]] = [[] for _ in experts]
    handles = []
    for module, calls in zip(experts, records, strict=True):

        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[Tensor] = calls
        ) -> None:
            calls.append(top_k_index(module, args, kwargs).detach().flatten(end_dim=-2))

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, ids_BT: Tensor, *, routing: bool) -> Observation:
    """Run the model once on `ids_BT`; call inside `moeq.evals.forward.evaluating`."""
    ids_BT = ids_BT.to(device_of(model))
    if not routing:
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        return Observation(logits_BPV=logits_BTV[:, :-1], routing=())
    with tap_routing(model) as records:
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    # A layer that splits its tokens calls its experts more than once; the pieces come in token order.
    chosen = tuple(torch.cat(calls).view(*ids_BT.shape, -1) for calls in records if calls)
    return Observation(logits_BPV=logits_BTV[:, :-1], routing=chosen)

"""A cache of keys and values that grows in place, for whoever decodes token by token.

transformers' own joins what it holds and what is new into a new tensor for every layer and token: with a prompt of 512
tokens that was a tenth of a token's time on a CPU (benchmarks/llama_cpp.md), and it grows with the context. This one
has room for more and is otherwise transformers' `DynamicLayer`, so that it can be cut, copied and reordered like one.
"""

from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM: Final = 256
"""Tokens that there is room for beyond those that are there, at least; an eighth of them if that is more."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, each the first part of a larger tensor, (B, heads, tokens, head size)."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add what is new; everything that is there now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad:  # autograd keeps what it is given
            return super().update(key_states, value_states, *args, **kwargs)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        pairs = ((self.keys, key_states), (self.values, value_states))
        if not (self._rooms and all(_fits(room, *pair, total) for room, pair in zip(self._rooms, pairs, strict=True))):
            self._rooms = [_roomy(old, new, held, total) for old, new in pairs]
        for room, (_, new) in zip(self._rooms, pairs, strict=True):
            room[:, :, held:total].copy_(new)
        self.keys, self.values = (room[:, :, :total] for room in self._rooms)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        self._rooms = []
        super().reset()


def growing_cache(model: Any) -> DynamicCache:
    """An empty cache for a model; layers that forget, as those of sliding windows do, are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _fits(room: Tensor, old: Tensor, new: Tensor, total: int) -> bool:
    """Whether what is there is still the first part of the room (it may have been cut or replaced), and more fits."""
    same = old.data_ptr() == room.data_ptr() and old.shape[:2] == room.shape[:2] and old.stride() == room.stride()
    alike = (new.dtype, new.device, new.shape[:2], new.shape[3]) == (
        room.dtype, room.device, room.shape[:2], room.shape[3],
    )  # fmt: skip
    return same and alike and total <= room.shape[2]


def _roomy(old: Tensor, new: Tensor, held: int, total: int) -> Tensor:
    """A room for `total` tokens and more, with those that are there."""
    batch, heads, _, size = new.shape
    room = torch.empty(batch, heads, total + max(ROOM, total // 8), size, dtype=new.dtype, device=new.device)
    if held:
        room[:, :, :held].copy_(old)
    return room

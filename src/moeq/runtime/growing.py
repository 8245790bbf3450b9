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
        held, more = self.get_seq_length(), key_states.shape[-2]
        self._make_room(key_states, value_states, held + more)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, held : held + more].copy_(new)
        self.advance(held + more)
        return self.keys, self.values

    def rooms(self) -> tuple[Tensor, Tensor]:
        """Tensors with room for one more token, whose keys and values the caller writes; then it calls `advance`."""
        self._make_room(self.keys, self.values, self.get_seq_length() + 1)
        keys, values = self._rooms
        return keys, values

    def advance(self, total: int) -> None:
        """There are so many tokens now."""
        self.keys, self.values = (room[:, :, :total] for room in self._rooms)

    def _make_room(self, key_states: Tensor, value_states: Tensor, total: int) -> None:
        pairs = ((self.keys, key_states), (self.values, value_states))
        if not (self._rooms and all(_fits(room, *pair, total) for room, pair in zip(self._rooms, pairs, strict=True))):
            self._rooms = [_roomy(old, new, self.get_seq_length(), total) for old, new in pairs]

    def reset(self) -> None:
        """Forget everything."""
        self._rooms = []
        super().reset()


def growing_cache(model: Any) -> DynamicCache:
    """An empty cache for a model; layers that forget, as those of sliding windows do, are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def grown(cache: Any, place: int) -> GrowingLayer | None:
    """The layer at a place of a cache as one that grows; None for layers of another kind.

    Transformers' own, which a plain `generate` makes, gives its place to one that takes over what it holds.
    """
    found: Any = cache.layers[place] if place < len(cache.layers) else None
    if type(found) is DynamicLayer and found.is_initialized:
        layer = GrowingLayer()
        layer.lazy_initialization(found.keys, found.values)
        layer.keys, layer.values = found.keys, found.values
        cache.layers[place] = found = layer
    return found if type(found) is GrowingLayer and found.is_initialized else None


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

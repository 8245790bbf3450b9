"""What a model has read before need not be read again: how much of its cache serves a text that begins alike."""

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache


def kept(cache: Any, read: Sequence[int], ids: Sequence[int]) -> int:
    """Cut `cache` to what `ids` begins with; how many tokens that is, 0 when it serves for nothing.

    At least one token of `ids` is left for the model to read: it answers what it reads. A cache that forgets, as those
    of sliding windows and of states do, cannot be cut and serves only a text that goes on from its end.

    Args:
        cache: of a transformers model, or None.
        read: the tokens it holds, and perhaps more after them.
        ids: the tokens to come.
    """
    if cache is None:
        return 0
    held = int(cache.get_seq_length())
    same = min(held, common(read, ids), len(ids) - 1)
    if same == held:
        return same
    if same < 1 or not (isinstance(cache, DynamicCache) and not any(cache.is_sliding)):
        return 0
    cache.crop(same - held)  # negative: so many from the end
    return same


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)

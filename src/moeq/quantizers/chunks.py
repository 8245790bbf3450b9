"""Cuts matrices into chunks that fit into a core's cache, and gives every core chunks of its own.

Legend: N output rows, K input columns, M groups in a chunk, g weights per group.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeq.spec import WHOLE_ROW

CHUNK: Final = 1 << 18
"""Weights that are worked on together; on a CPU the buffers of a chunk should about fit the cores' L2 caches."""
CHUNK_ELSEWHERE: Final = 1 << 24
SERIAL: Final = (1 << 15) - 1
"""torch does not split operations on fewer elements than 2^15 among threads."""
SPREAD: Final = 1 << 17
"""Matrices of fewer weights are not worth starting threads for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Equal groups of some rows: rows r0 .. r1, columns c0 .. c1, the first group being number `group`."""

    r0: int
    r1: int
    c0: int
    c1: int
    group: int
    width: int


def cut(rows: int, columns: int, group_size: int, chunk: int) -> Iterator[Part]:
    """Cut a matrix into chunks of equal groups; a ragged last group makes chunks of its own."""
    width = columns if group_size == WHOLE_ROW else group_size
    full = columns // width * width if width else 0
    for c0, c1, group, part in ((0, full, 0, width), (full, columns, full // max(width, 1), columns - full)):
        if c0 == c1:
            continue
        step = max(1, chunk // (c1 - c0))
        for r0 in range(0, rows, step):
            yield Part(r0=r0, r1=min(rows, r0 + step), c0=c0, c1=c1, group=group, width=part)


def root_of(part: Part, root_K: Tensor) -> Tensor:
    """`root_K` for each group of a part: (g,) when it has one group per row, else (M, g)."""
    root_Gg = root_K[part.c0 : part.c1].view(-1, part.width)
    return root_Gg[0] if len(root_Gg) == 1 else root_Gg.repeat(part.r1 - part.r0, 1)


def threads_for(w_NK: Tensor) -> int:
    """Threads worth starting for a matrix."""
    return torch.get_num_threads() if w_NK.device.type == "cpu" and w_NK.numel() >= SPREAD else 1


def chunk_for(w_NK: Tensor, threads: int) -> int:
    """Weights per chunk."""
    if w_NK.device.type != "cpu":
        return CHUNK_ELSEWHERE
    if threads > 1:
        return min(CHUNK, -(-w_NK.numel() // threads))
    return CHUNK if torch.get_num_threads() == 1 else SERIAL


def spread(work: Callable[[Iterator[Part]], None], parts: list[Part], threads: int) -> None:
    """Have every thread work on chunks of its own, with single-threaded operations.

    Splitting each operation instead, as torch does, has threads wait for each other some hundred times per chunk;
    on a machine that does anything else that is ten times slower.
    """
    queue = iter(parts)
    if threads == 1:
        work(queue)
        return
    inference = torch.is_inference_mode_enabled()

    def job(_: int) -> None:
        # Modes belong to a thread; tensors made in inference mode can only be written in it.
        with torch.inference_mode(inference):
            work(queue)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(job, range(threads)))
    finally:
        # A worker's setting is also what threads started later begin with: put ours back.
        torch.set_num_threads(threads)

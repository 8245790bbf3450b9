"""Works on several experts at a time, every core on one of its own."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

import torch

MAX_WORKERS: Final = 4
"""Experts worked on at a time. Each needs memory, and many small operations that only one thread can start at once."""

Result = TypeVar("Result")


def in_order(work: Callable[[int], Result], count: int, device: torch.device) -> Generator[Result]:
    """The results of `work(0)` .. `work(count - 1)`, in this order.

    On a CPU several calls run at a time, in threads that share the cores of the caller's torch setting: threads that
    split one operation wait for each other at every step. No more than `MAX_WORKERS` calls are ahead of the caller.

    Args:
        work: called in threads, under the caller's inference mode.
        count: how many calls.
        device: where `work` computes; anywhere but on a CPU it is called by this thread, one after the other.

    Raises:
        Whatever `work` raises; calls not begun by then are never made.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MAX_WORKERS)
    if device.type != "cpu" or workers == 1:
        yield from map(work, range(count))
        return
    inference = torch.is_inference_mode_enabled()

    def job(index: int) -> Result:
        # Modes belong to a thread.
        with torch.inference_mode(inference):
            return work(index)

    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        try:
            for index in range(count):
                ahead.append(pool.submit(job, index))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
            # The workers' setting became the default of threads to come.
            torch.set_num_threads(threads)

"""A fleet of Ray's workers: the processes of this machine, or those of a cluster (extra `ray`)."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar, final

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from moeq.errors import InternalError, MoeqError, OptionError, WorkerError
from moeq.fleet import Fleet

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL: Final = "local"
RETRIES: Final = 3
"""Times that an item is tried again after its worker died."""
AHEAD: Final = 2
"""Items for each worker that are under way or waiting for their turn to be taken."""


@final
class RayFleet(Fleet):
    """Ray's workers; use it as a context manager.

    Every worker must see the model, the output and the texts under the same paths, and must have the same moeq.

    Args:
        address: of a cluster ("host:port", or "auto" for the one that this machine belongs to), or "local" for
            processes of this machine alone.
        workers: how many pieces of work go on at a time; for "local" as many processes, by default one for each core
            that this process may use, for a cluster by default one for each core of it.
        gpus: GPUs that each piece of work has to itself.

    Raises:
        OptionError: less than one worker.
        WorkerError: the cluster does not answer.
    """

    def __init__(self, address: str = LOCAL, workers: int | None = None, gpus: float = 0) -> None:
        if workers is not None and workers < 1:
            raise OptionError(f"{workers} is too small", option="workers", fix="give 1 or more")
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        if address == LOCAL:
            options |= {"address": "local", "num_cpus": workers}
        else:
            del options["include_dashboard"]
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())[:200]
            raise WorkerError(f"no workers at {address}: {line}", option="ray", fix="check the address") from error
        cores = ray.cluster_resources().get("CPU", 1)
        self._window = AHEAD * max(1, int(workers or cores))
        self._do = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_do)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def spread(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See `Fleet.spread`."""
        shared = ray.put(work)  # once, not with every item
        ahead: deque[Any] = deque()
        waiting = iter(items)
        try:
            while True:
                while len(ahead) < self._window and (item := next(waiting, waiting)) is not waiting:
                    ahead.append(self._do.remote(shared, item))
                if not ahead:
                    return
                yield _answer(ahead.popleft())
        finally:
            for task in ahead:
                ray.cancel(task, force=True)


def _do(work: Callable[[Any], Any], item: Any) -> tuple[Any, MoeqError | None]:
    """What a worker does: errors of ours are answers, since doing it again would not help."""
    try:
        return work(item), None
    except MoeqError as error:
        return None, error


def _answer(task: Any) -> Any:
    try:
        found, error = ray.get(task)
    except RayTaskError as failed:
        cause = failed.cause if isinstance(failed.cause, Exception) else failed
        raise InternalError.of(cause) from failed
    except OutOfMemoryError as failed:
        raise WorkerError(
            "a worker ran out of memory again and again", option="workers", fix="use fewer workers, or more machines"
        ) from failed
    except RayError as failed:
        raise WorkerError(
            f"a worker died {RETRIES + 1} times on the same piece of work: {' '.join(str(failed).split())[:200]}",
            option="ray",
            fix="look at the machine's memory and logs, then run the same command with --resume",
        ) from failed
    if error is not None:
        raise error
    return found

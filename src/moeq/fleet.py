"""Work that is spread over processes: the seam between stages and whatever runs them elsewhere.

Who does a piece of work may be killed, and the piece is then done again, perhaps by somebody else: it must not matter
how often it is done, nor by whom. What is large travels through files that everybody can read; what is handed over is
names, options and small results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar, final

Item = TypeVar("Item")
Result = TypeVar("Result")


class Fleet(ABC):
    """Workers."""

    @abstractmethod
    def spread(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The results of `work` for all items, in their order, each as soon as it and those before it are there.

        Args:
            work: can be pickled: a function of a module, a `functools.partial` of one, a dataclass with `__call__`.
            items: can be pickled too.

        Raises:
            MoeqError: what `work` raised, as it raised it.
            WorkerError: a worker died again and again on the same item.
        """
        ...


@final
class Here(Fleet):
    """This process alone."""

    def spread(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """One after the other."""
        return map(work, items)


HERE: Final[Fleet] = Here()

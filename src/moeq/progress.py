"""How a run tells of its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being counted, how many are done and how many there are."""

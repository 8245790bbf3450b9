"""What compiled kernels are asked before they are believed: there are none."""

from collections.abc import Mapping
from typing import Final

from moeq.layouts.known_answers import Cases

CASES: Final[Mapping[str, Cases]] = {}
LATE_CASES: Final[Mapping[str, Cases]] = {}
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {}

"""What a layout shows of a plan to people: a picture, lines for a terminal, words. A seam of `moeq.layouts`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from moeq.layouts.base import LayerPlan, part
from moeq.model_parts import MoeLayer


class Shown(ABC):
    """Every layout has one, as `SHOWN` in its file `shown`; `layers` and `plans` are those of a whole model."""

    @abstractmethod
    def is_mixed(self, plans: Sequence[LayerPlan]) -> bool:
        """Whether widths differ, so that a picture shows something."""
        ...

    @abstractmethod
    def svg(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan], title: str) -> str:
        """The picture, an SVG document."""
        ...

    @abstractmethod
    def svg_limit(self, layers: Sequence[MoeLayer], title: str) -> int:
        """Bytes that the picture takes at most, whatever the plan."""
        ...

    @abstractmethod
    def text(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> str:
        """The same for a terminal."""
        ...

    @abstractmethod
    def widths(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> list[dict[str, list[float]]]:
        """Layer -> projection -> code bits of each expert's matrix, a mean where its parts differ."""
        ...

    def words(self, plans: Sequence[LayerPlan]) -> dict[str, str]:
        """Projection -> what its experts share, in words; empty if they share nothing."""
        return {}


def shown(name: str) -> Shown:
    """What a layout shows."""
    found = part(name, "shown").SHOWN
    assert isinstance(found, Shown)
    return found


def mean_bits(layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> tuple[float, ...]:
    """Mean stored bits of the expert weights of each layer, everything included."""
    return tuple(8 * plan.stored_bytes / layer.parameters for layer, plan in zip(layers, plans, strict=True))

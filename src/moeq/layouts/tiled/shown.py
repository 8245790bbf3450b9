"""What the tiled layout shows of a plan: widths of residuals, and what is shared."""

from collections.abc import Sequence
from typing import Final

from moeq.layouts.base import LayerPlan
from moeq.layouts.grouped.shape import GroupedPlan
from moeq.layouts.grouped.shown import MatricesShown
from moeq.layouts.tiled.shape import TiledPlan


class TilesShown(MatricesShown):
    """Shows residuals as matrices."""

    def records(self, plan: LayerPlan) -> GroupedPlan:
        """The residuals of a layer."""
        assert isinstance(plan, TiledPlan)
        return plan.residuals

    def words(self, plans: Sequence[LayerPlan]) -> dict[str, str]:
        """Ranks, grids and rotations."""
        words: dict[str, list[str]] = {}
        for plan in plans:
            assert isinstance(plan, TiledPlan)
            for name, form in plan.forms.items():
                factors = f"rank {form.rank} in {form.rows} x {form.columns} tiles" if form.rank else "no factors"
                rotated = "" if form.orders == "none" else f", a rotation for each {form.orders}"
                words.setdefault(name, []).append(factors + rotated)
        return {name: " or ".join(dict.fromkeys(each)) for name, each in words.items()}


SHOWN: Final = TilesShown()

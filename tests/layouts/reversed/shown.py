"""What people see of it."""

from typing import Final

from moeq.layouts.reversed.shape import ReversedPlan  # type: ignore[import-not-found]

from moeq.layouts.base import LayerPlan
from moeq.layouts.grouped.shape import GroupedPlan, planned
from moeq.layouts.grouped.shown import MatricesShown


class ReversedShown(MatricesShown):
    """Shows every matrix."""

    def records(self, plan: LayerPlan) -> GroupedPlan:
        """The widths of a layer."""
        assert isinstance(plan, ReversedPlan)
        return planned(plan.choice)


SHOWN: Final = ReversedShown()

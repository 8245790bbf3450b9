"""What the grouped layout shows of a plan: a cell for each matrix."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

from moeq.layouts.base import LayerPlan
from moeq.layouts.grouped.shape import GroupedPlan
from moeq.layouts.showing import Shown, mean_bits
from moeq.model_parts import PROJECTIONS, MoeLayer
from moeq.report.heatmap import AllocationMap, allocation_svg, allocation_text, svg_limit


def matrices_map(
    layers: Sequence[MoeLayer], records: Sequence[GroupedPlan], stored: tuple[float, ...]
) -> AllocationMap:
    """Widths of matrices as pictures show them; `stored` has the mean bits of each layer."""
    names = tuple(name for name in PROJECTIONS if any(name in layer.shapes for layer in layers))
    bits = []
    for layer, plan in zip(layers, records, strict=True):
        widths = ({name: spec.bits for name, spec in zip(layer.projections, e, strict=True)} for e in plan.specs)
        bits.append(tuple(tuple(each.get(name, 0) for name in names) for each in widths))
    return AllocationMap(bits=tuple(bits), projections=names, stored=stored)


class MatricesShown(Shown):
    """Shows the widths of matrices; of which ones, `records` says."""

    def is_mixed(self, plans: Sequence[LayerPlan]) -> bool:
        """Whether matrices have several widths."""
        return len({bits for plan in plans for bits in plan.widths_count()}) > 1

    def svg(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan], title: str) -> str:
        """Layers x experts."""
        return allocation_svg(self._map(layers, plans), title)

    def svg_limit(self, layers: Sequence[MoeLayer], title: str) -> int:
        """As large as many runs of widths make it."""
        experts = tuple(layer.num_experts for layer in layers)
        return svg_limit(experts, max(len(layer.projections) for layer in layers), title)

    def text(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> str:
        """A line for each layer."""
        return allocation_text(self._map(layers, plans))

    def widths(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> list[dict[str, list[float]]]:
        """Code bits of each matrix."""
        return [
            {
                name: [float(specs[at].bits) for specs in self.records(plan).specs]
                for at, name in enumerate(layer.projections)
            }
            for layer, plan in zip(layers, plans, strict=True)
        ]

    def _map(self, layers: Sequence[MoeLayer], plans: Sequence[LayerPlan]) -> AllocationMap:
        return matrices_map(layers, [self.records(plan) for plan in plans], mean_bits(layers, plans))

    @abstractmethod
    def records(self, plan: LayerPlan) -> GroupedPlan:
        """The matrices of a layer."""
        ...


class GroupedShown(MatricesShown):
    """Shows every matrix."""

    def records(self, plan: LayerPlan) -> GroupedPlan:
        """All of them."""
        assert isinstance(plan, GroupedPlan)
        return plan


SHOWN: Final = GroupedShown()

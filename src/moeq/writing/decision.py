"""What is to be written, decided but not begun: what `allocation` hands to `writing`."""

from dataclasses import dataclass
from pathlib import Path

from moeq.artifacts import Inventory, Plan
from moeq.costs.component_table import ComponentTable
from moeq.recipe import Recipe
from moeq.spec import TensorInfo
from moeq.writing.arrangement import Shard, Sizes, sizes
from moeq.writing.other_files import sidecar_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A run before it begins.

    Attributes:
        source: the input directory.
        inventory: what it holds.
        headers: its tensors.
        recipe: all options, quantizer included.
        plan: the spec of every unit; while costs are not measured, a draft of the same size.
        shards: the files to write.
        decided: `plan` is not a draft.
        table: the costs that `plan` came from, where packing needs them too: those of components hold the bases.
    """

    source: Path
    inventory: Inventory
    headers: dict[str, TensorInfo]
    recipe: Recipe
    plan: Plan
    shards: tuple[Shard, ...]
    decided: bool
    table: ComponentTable | None = None

    @property
    def sizes(self) -> Sizes:
        """Bytes of the weight files."""
        return sizes(self.inventory, self.plan, self.shards)

    @property
    def disk_bytes(self) -> int:
        """Upper bound of all files."""
        beside = sidecar_limit(self.source, self.inventory, self.plan, self.recipe, self.shards)
        return self.sizes.total + beside

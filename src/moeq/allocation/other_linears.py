"""Linears outside the experts as units of the same program: which, at what widths, sizes and costs.

A linear that joins is either packed, with a table of its own, or left as it is in the source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeq.artifacts import CostTable, Inventory, Plan
from moeq.costs.base import LinearCost
from moeq.costs.linears import make_linear_cost
from moeq.errors import ArtifactError, OptionError
from moeq.model_parts import DenseLinear
from moeq.recipe import DENSE_BITS, Recipe
from moeq.spec import ALIGN, QuantSpec, TensorInfo, stored_bytes, table_bytes
from moeq.writing import arrangement
from moeq.writing.quantizer_choice import dense_quantizer

OFFSETS_TEXT = 20
"""Bytes that the two offsets of a tensor in a header may differ by, at most."""
SHARD_TEXT = 512
"""Bytes that one more file takes at most in the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A linear in the program; choices by rising width, the last leaves it as it is.

    Attributes:
        path: its module path.
        costs: predicted harm of each choice.
        sizes: stored bytes of each choice.
    """

    path: str
    costs: tuple[float, ...]
    sizes: tuple[int, ...]


def linears(inventory: Inventory, recipe: Recipe) -> tuple[DenseLinear, ...]:
    """The linears whose widths the program decides, in the model's order."""
    kinds = recipe.joining()
    return tuple(linear for linear in inventory.dense if linear.kind in kinds)


def specs(recipe: Recipe) -> tuple[QuantSpec, ...]:
    """What such a linear may be packed as, by rising width."""
    return tuple(recipe.dense_spec(bits) for bits in sorted(DENSE_BITS) if bits < 16)


def packed_bytes(linear: DenseLinear, spec: QuantSpec) -> int:
    """Stored bytes of a packed linear, its table included."""
    return stored_bytes(spec, linear.shape) + table_bytes(1, 1)


def sizes(linear: DenseLinear, recipe: Recipe, headers: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Stored bytes under each of `specs`, then in the source."""
    info = headers[linear.source]
    return (*(packed_bytes(linear, spec) for spec in specs(recipe)), info.stop - info.start)


def least_bytes(inventory: Inventory, recipe: Recipe) -> int:
    """Stored bytes of all linears that join, at their narrowest."""
    return sum(packed_bytes(linear, specs(recipe)[0]) for linear in linears(inventory, recipe))


def linear_cost(recipe: Recipe, options: Mapping[str, Any]) -> LinearCost:
    """The cost of linears that goes with a settled recipe's cost.

    Args:
        recipe: settled.
        options: of the experts' cost.

    Raises:
        OptionError: there is none, or the recipe splits the budget so that linears cannot join.
    """
    if recipe.scope == "layer":
        raise OptionError(
            "auto spends one budget over the model, --scope layer splits it by experts",
            option="dense-bits",
            fix="choose --scope global, or a width",
        )
    if recipe.round_context:
        raise OptionError(
            "auto measures linears of the original, --round-context experts of the context",
            option="dense-bits",
            fix="drop --round-context, or choose a width",
        )
    own = {name: value for name, value in options.items() if name != "quantizer"}  # linears have their own
    return make_linear_cost(str(recipe.cost), dense_quantizer(recipe), **own)


def rows(table: CostTable, inventory: Inventory, recipe: Recipe) -> tuple[Row, ...]:
    """What the program is to know of the linears that join; none if the recipe asks for none.

    Raises:
        ArtifactError: the table does not know them, or at other widths.
    """
    wanted = linears(inventory, recipe)
    known = {
        path: Row(path=path, costs=costs, sizes=sizes)
        for path, costs, sizes in zip(table.dense, table.dense_costs, table.dense_sizes, strict=True)
    }
    missing = [linear.path for linear in wanted if linear.path not in known]
    if missing:
        raise ArtifactError(
            f"the costs do not cover linear {missing[0]}, whose width auto would choose",
            option="costs",
            fix=f"measure with --dense-bits {recipe.dense_bits}, or choose a width",
        )
    if wanted and table.dense_candidates != specs(recipe):
        raise ArtifactError(
            "the costs of other linears are of widths, group size or levels that this run would not use",
            option="costs",
            fix="measure with the same --group-size and --levels",
        )
    return tuple(known[linear.path] for linear in wanted)


def chosen_bytes(table: CostTable, inventory: Inventory, recipe: Recipe, plan: Plan) -> int:
    """Stored bytes under `plan` of the linears that join."""
    palette = specs(recipe)
    return sum(
        row.sizes[palette.index(plan.specs[plan.dense[row.path]]) if row.path in plan.dense else -1]
        for row in rows(table, inventory, recipe)
    )


def packed(inventory: Inventory, plan: Plan, recipe: Recipe, width: int = -1) -> Plan:
    """`plan` with all linears that join packed, as the spec at position `width`."""
    paths = [linear.path for linear in linears(inventory, recipe)]
    if not paths:
        return plan
    index = plan.specs.index(specs(recipe)[width])
    return replace(plan, dense={**plan.dense, **dict.fromkeys(paths, index)})


def decided(plan: Plan, recipe: Recipe, choices: Mapping[str, int]) -> Plan:
    """`plan` with the linears of `choices` as their columns of `Row` say.

    Args:
        plan: whose palette has all of `specs`.
        recipe: the options.
        choices: path -> column; the last leaves it as it is.
    """
    palette = specs(recipe)
    dense = dict(plan.dense)
    for path, column in choices.items():
        dense.pop(path, None)
        if column < len(palette):
            dense[path] = plan.specs.index(palette[column])
    return replace(plan, dense=dense)


def copied_overhead(inventory: Inventory, headers: Mapping[str, TensorInfo], packed_plan: Plan, recipe: Recipe) -> int:
    """Bytes that copying linears may add to what is neither theirs nor in a layout that packs them all.

    Headers of layers, tables of names and texts are longest where all linears are packed; headers of copied tensors,
    and the number of their files, are largest where all are copied. This is the difference of the latter. With several
    files of copied tensors, where they begin moves too, and with that the lengths of the offsets in their headers.
    """
    paths = {linear.path for linear in linears(inventory, recipe)}
    if not paths:
        return 0
    kept = {path: index for path, index in packed_plan.dense.items() if path not in paths}
    overheads, counts, num_copied = [], [], 0
    for plan in (packed_plan, replace(packed_plan, dense=kept)):
        copied = [shard for shard in arrangement.arrange(inventory, plan, headers) if shard.layer is None]
        overheads.append(sum(shard.size - sum(tensor.size for tensor in shard.tensors) for shard in copied))
        counts.append(len(copied))
        num_copied = sum(len(shard.tensors) for shard in copied)
    moved = num_copied * OFFSETS_TEXT + counts[1] * ALIGN if counts[1] > 1 else 0
    return max(0, overheads[1] - overheads[0]) + max(0, counts[1] - counts[0]) * SHARD_TEXT + moved

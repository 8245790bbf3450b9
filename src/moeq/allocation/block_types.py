"""What `--serve gguf` asks of a plan: blocks that fill every row, and widths by the names of their types."""

from collections.abc import Mapping
from dataclasses import replace

from moeq.artifacts import Inventory, Plan
from moeq.errors import OptionError
from moeq.spec import BITS, QuantSpec, block_type


def named(inventory: Inventory, plan: Plan) -> Plan:
    """The plan with the width that a block type has instead of the one that was asked for, where the shape has none."""
    if not any(spec.in_blocks for spec in plan.specs):
        return plan

    def of_type(index: int, shape: tuple[int, int]) -> int:
        spec = plan.specs[index]
        if not spec.in_blocks:
            return index
        return plan.specs.index(replace(spec, bits=block_type(spec.bits, shape[1]).bits))

    experts = tuple(
        tuple(
            tuple(of_type(index, layer.shapes[name]) for index, name in zip(expert, layer.projections, strict=True))
            for expert in row
        )
        for row, layer in zip(plan.experts, inventory.layers, strict=True)
    )
    dense = {linear.path: linear.shape for linear in inventory.dense}
    return replace(
        plan, experts=experts, dense={path: of_type(index, dense[path]) for path, index in plan.dense.items()}
    )


def check(inventory: Inventory, dense: Mapping[str, QuantSpec]) -> None:
    """Raise OptionError unless blocks of ggml fill the rows of every matrix."""
    shapes = {str(unit): shape for unit, shape in inventory.units()}
    shapes |= {linear.path: linear.shape for linear in inventory.dense if linear.path in dense}
    for name, (_, columns) in shapes.items():
        try:
            block_type(BITS[-1], columns)
        except OptionError as error:
            raise OptionError(f"{name}: {error.message}", option=error.option, fix=str(error.fix)) from error

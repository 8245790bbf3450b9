"""Sizes by family of tensors, for reports and JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from moeq.artifacts import Inventory, Plan
from moeq.notebook import Table
from moeq.report.tables import human_bytes
from moeq.spec import TensorInfo
from moeq.writing import arrangement


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of tensors.

    Attributes:
        parameters: weights.
        bytes: stored bytes.
        bits_per_weight: 8 * bytes / parameters.
    """

    parameters: int
    bytes: int
    bits_per_weight: float


def table(title: str, rows: Mapping[str, Family]) -> Table:
    """Families as notebooks show them."""
    cells = [
        (name, f"{row.parameters:,}", human_bytes(row.bytes), f"{row.bits_per_weight:.3f}")
        for name, row in rows.items()
    ]
    return Table(title=title, header=("part", "weights", "bytes", "bits/weight"), rows=cells)


def family(parameters: int, size: int) -> Family:
    """A row; zero weights give zero bits."""
    return Family(parameters=parameters, bytes=size, bits_per_weight=8 * size / parameters if parameters else 0.0)


def families(inventory: Inventory, headers: Mapping[str, TensorInfo], plan: Plan | None = None) -> dict[str, Family]:
    """experts, attention, shared, dense, lm_head and other (router, norms, embeddings, ...).

    Args:
        inventory: the model.
        headers: its tensors.
        plan: sizes under this plan; None gives the sizes in the source.
    """
    source_experts = inventory.expert_parameters * inventory.element_bytes
    rows = {"experts": family(inventory.expert_parameters, plan.expert_bytes if plan else source_experts)}
    total = sum(info.stop - info.start for info in headers.values())
    used_bytes, used_parameters = source_experts, inventory.expert_parameters
    for kind in ("attention", "shared", "dense", "lm_head"):
        parameters = size = 0
        for position, linear in enumerate(inventory.dense):
            if linear.kind != kind:
                continue
            info = headers[linear.source]
            parameters += linear.shape[0] * linear.shape[1]
            used_bytes += info.stop - info.start
            if plan is not None and linear.path in plan.dense:
                size += sum(tensor.size for tensor in arrangement.dense_tensors(inventory, plan, position))
            else:
                size += info.stop - info.start
        used_parameters += parameters
        if parameters:
            rows[kind] = family(parameters, size)
    rows["other"] = family(inventory.parameters - used_parameters, total - used_bytes)
    return rows

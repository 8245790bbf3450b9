"""Custom operators over rows that belong to groups, for the layouts "spectral" and "tiled" on GPUs.

As in `moeq.layouts.grouped.gpu`, nothing here imports triton before a call asks for it.

Legend: S choices, G groups, C numbers in a row of x, K columns of a packed row.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from moeq.kernels.facts import RowFacts


def combine(x_RC: Tensor, index: Tensor | None, data: Tensor, facts: RowFacts, rows: int) -> Tensor:
    """`moeq.kernels.triton_rows_launch.combine` as an operator."""
    return combine_op(x_RC.contiguous(), index, data, facts.table, facts.firsts, facts.places, _numbers(facts), rows)


def dots(x_SK: Tensor, index: Tensor, data: Tensor, facts: RowFacts, places: int) -> Tensor:
    """`moeq.kernels.triton_rows_launch.dots` as an operator."""
    return dots_op(x_SK.contiguous(), index, data, facts.table, facts.firsts, facts.places, _numbers(facts), places)


def _launch() -> ModuleType:
    return import_module("moeq.kernels.triton_rows_launch")  # needs triton, an optional dependency


def _numbers(facts: RowFacts) -> list[int]:
    return [facts.widths, facts.span, facts.rows, facts.blocks, facts.columns]


def _facts(table: Tensor, firsts: Tensor, places: Tensor, numbers: list[int]) -> RowFacts:
    widths, span, rows, blocks, columns = numbers
    return RowFacts(
        table=table, firsts=firsts, places=places,
        widths=widths, span=span, rows=rows, blocks=blocks, columns=columns,
    )  # fmt: skip


@torch.library.custom_op("moeq::triton_combine_rows", mutates_args=())
def combine_op(
    x_RC: Tensor, index: Tensor | None, data: Tensor, table: Tensor, firsts: Tensor, places: Tensor,
    numbers: list[int], rows: int,
) -> Tensor:  # fmt: skip
    """(S, K): `triton_rows_launch.combine`."""
    with torch.cuda.device_of(x_RC):  # triton launches on the current device
        return _launch().combine(x_RC, index, data, _facts(table, firsts, places, numbers), rows)


@combine_op.register_fake
def _(
    x_RC: Tensor, index: Tensor | None, data: Tensor, table: Tensor, firsts: Tensor, places: Tensor,
    numbers: list[int], rows: int,
) -> Tensor:  # fmt: skip
    return x_RC.new_empty(rows, numbers[-1])


@torch.library.custom_op("moeq::triton_dot_rows", mutates_args=())
def dots_op(
    x_SK: Tensor, index: Tensor, data: Tensor, table: Tensor, firsts: Tensor, where: Tensor,
    numbers: list[int], places: int,
) -> Tensor:  # fmt: skip
    """(S, places): `triton_rows_launch.dots`."""
    with torch.cuda.device_of(x_SK):
        return _launch().dots(x_SK, index, data, _facts(table, firsts, where, numbers), places)


@dots_op.register_fake
def _(
    x_SK: Tensor, index: Tensor, data: Tensor, table: Tensor, firsts: Tensor, where: Tensor,
    numbers: list[int], places: int,
) -> Tensor:  # fmt: skip
    return x_SK.new_empty(x_SK.shape[0], places)


@torch.library.custom_op("moeq::triton_rotate", mutates_args=())
def rotate_op(
    x_RI: Tensor, index: Tensor, orders: Tensor, owner_E: Tensor | None, mixing: Tensor | None, block: int, plain: int
) -> Tensor:
    """(S, I) or (R, I): `triton_rows_launch.rotate`."""
    with torch.cuda.device_of(x_RI):
        return _launch().rotate(x_RI, index, orders, owner_E, mixing, block, plain)


@rotate_op.register_fake
def _(
    x_RI: Tensor, index: Tensor, orders: Tensor, owner_E: Tensor | None, mixing: Tensor | None, block: int, plain: int
) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0] if owner_E is None else index.numel(), x_RI.shape[1])

"""Launches the kernels of `moeq.kernels.triton_rows`; needs triton, so only kernels of GPUs import it.

Legend: S choices, E groups, C numbers in a row of x, K columns, R places.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moeq.kernels import triton_rows as kernels
from moeq.kernels.facts import DOT_ROWS, RowFacts
from moeq.kernels.triton_launch import Routing, launch, multiply_decoded, prepare
from moeq.kernels.tuning import DECODE_FROM, combined_tile, experts_at_once, power_of_two, rows_in_tile
from moeq.spec import BLOCK
from moeq.transforms.rotation import hadamard


def route(index: Tensor, num_groups: int) -> Routing:
    """Sort choices by group."""
    return prepare(index.new_empty((0, 1), dtype=torch.float32), index, num_groups, 1)


def combine(x_RC: Tensor, index: Tensor | None, data: Tensor, facts: RowFacts, rows: int) -> Tensor:
    """Each choice's sum over the rows of its group, (S, K): `kernels.combine_rows`.

    Args:
        x_RC: a row for each choice, or for each k choices that follow one another.
        index: group of each choice, int64; answers to those that do not exist are zero. None: all rows of one group.
        data: the blob.
        facts: of the rows.
        rows: S.
    """
    columns = facts.columns
    if not facts.widths or not rows:
        return x_RC.new_zeros(rows, columns)
    routing = _routing(x_RC, index, facts.groups)
    if index is not None and rows >= DECODE_FROM * facts.groups:
        out_SK = x_RC.new_zeros(rows, columns)
        for first, count, scratch in _decoded(x_RC, routing, data, facts, x_RC.shape[1]):
            multiply_decoded(x_RC, scratch, routing, out_SK, first, count, transposed=True)
        return out_SK
    tile = combined_tile(columns, rows, 1 if index is None else facts.groups, facts.rows)
    shape = (rows, columns) if tile.splits == 1 else (tile.splits, rows, columns)
    out = x_RC.new_zeros(shape, dtype=x_RC.dtype if tile.splits == 1 else torch.float32)
    launch(
        kernels.combine_rows, (_tiles(rows, tile.rows, index, facts), -(-columns // BLOCK), tile.splits),
        x_RC, data, facts.table, facts.firsts, facts.places, routing.order, routing.starts, routing.counts, out, rows,
        x_RC.shape[1], E=facts.groups, EXPERTS=0 if index is None else power_of_two(facts.groups),
        PER_ROW=rows // len(x_RC), K=columns, WIDTHS=facts.widths, SPAN=facts.span, SPLITS=tile.splits,
        BLOCK_M=tile.rows, BLOCK_N=tile.outputs, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out if tile.splits == 1 else out.sum(0).to(x_RC.dtype)


def dots(x_SK: Tensor, index: Tensor, data: Tensor, facts: RowFacts, places: int) -> Tensor:
    """Each choice's dot products with the rows of its group, (S, places), zero where there is none.

    Args:
        x_SK: a row for each choice.
        index: group of each choice, int64; answers to those that do not exist are zero.
        data: the blob.
        facts: of the rows.
        places: numbers in a row of the answer.
    """
    rows = len(x_SK)
    out = x_SK.new_zeros(rows, places)
    if not facts.blocks or not rows:
        return out
    routing = prepare(x_SK, index, facts.groups, facts.span)
    if rows >= DECODE_FROM * facts.groups:
        for first, count, scratch in _decoded(x_SK, routing, data, facts, places):
            multiply_decoded(x_SK, scratch, routing, out, first, count)
        return out
    side = rows_in_tile(rows, facts.groups)
    launch(
        kernels.dot_rows, (_tiles(rows, side, index, facts), facts.blocks),
        x_SK, routing.sums, data, facts.table, facts.firsts, facts.places, routing.order, routing.starts,
        routing.counts, out, rows, places,
        E=facts.groups, EXPERTS=power_of_two(facts.groups), PER_ROW=1, K=facts.columns,
        WIDTHS=facts.widths, SPAN=facts.span, UNIT=facts.span, BLOCK_M=side, BLOCK_N=DOT_ROWS,
        num_warps=DOT_ROWS // 16, num_stages=3,
    )  # fmt: skip
    return out


def rotate(
    x_RI: Tensor, index: Tensor, orders: Tensor, owner_E: Tensor | None, mixing: Tensor | None, block: int, plain: int
) -> Tensor:
    """x D, (S, I) with the rotation of each choice's expert, or (R, I) with that of the layer.

    Args:
        x_RI: a row for each choice, or for each k choices that follow one another.
        index: expert of each choice, int64; sentinels get some rotation.
        orders, owner_E, mixing: see `moeq.layouts.tiled.facts.SideFacts`.
        block, plain: see `moeq.transforms.rotation.rotate`.
    """
    inputs = x_RI.shape[1]
    rows = len(x_RI) if owner_E is None else index.numel()
    out = x_RI.new_empty(rows, inputs)
    if not rows:
        return out
    size = min(1024, power_of_two(inputs))
    launch(
        kernels.permute, (rows, -(-inputs // size)),
        x_RI, index, orders if owner_E is None else owner_E, orders, out, 0 if owner_E is None else len(owner_E),
        OWNED=owner_E is not None, PER_ROW=rows // len(x_RI), K=inputs, BLOCK_K=size,
    )  # fmt: skip
    if block > 1 and plain < inputs:
        mixed = out[:, plain:].reshape(-1, block)
        # What the power of two in `mixing` leaves of 1 / sqrt(block) is 1 or sqrt(2).
        rest = math.sqrt(2) if (block.bit_length() - 1) % 2 else 1.0
        answer = hadamard(mixed, block) if mixing is None else (mixed @ mixing.to(mixed.dtype)) * rest
        out[:, plain:] = answer.view(rows, -1)
    return out


def _routing(x_RC: Tensor, index: Tensor | None, num_groups: int) -> Routing:
    if index is not None:
        return route(index, num_groups)
    nothing = x_RC.new_empty(0, dtype=torch.int32)
    return Routing(order=nothing, starts=nothing, counts=nothing, sums=nothing)


def _decoded(
    x_SK: Tensor, routing: Routing, data: Tensor, facts: RowFacts, places: int
) -> Iterator[tuple[int, int, Tensor]]:
    """First group, number of groups and their rows, (groups, places, columns) with zeros between them, in turn."""
    columns = facts.columns
    chunk = min(facts.groups, experts_at_once(places * columns * x_SK.element_size()))
    scratch = x_SK.new_empty(chunk, places, columns)
    for first in range(0, facts.groups, chunk):
        count = min(chunk, facts.groups - first)
        scratch.zero_()
        launch(
            kernels.decode_rows, (facts.blocks, -(-columns // BLOCK), count),
            data, facts.table, facts.firsts, facts.places, routing.counts, scratch, first, places,
            E=facts.groups, K=columns, BLOCK_N=DOT_ROWS,
        )  # fmt: skip
        yield first, count, scratch


def _tiles(rows: int, side: int, index: Tensor | None, facts: RowFacts) -> int:
    """Tiles that choices of any groups can take."""
    return -(-rows // side) if index is None else min(rows, rows // side + facts.groups)

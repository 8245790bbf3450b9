"""What kernels on a device want to know of the sides of a tiled layer.

Legend: E experts, M x N grid, I inputs, O outputs, R rank.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moeq.kernels.facts import KernelFacts, RowFacts, kernel_facts, one_group, row_facts
from moeq.layouts.tiled.shape import FACTOR, INDEX_BYTES, side_sections
from moeq.layouts.tiled.stored import Sides

MOST_MIXED: Final = 256
"""Inputs that are mixed by a product with a Hadamard matrix; more are mixed step by step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideFacts:
    """What kernels on a device want to know of the sides of one projection of a tiled layer.

    Attributes:
        row_E, column_E: cell of each expert, int64; row 0 and column 0 of all where no cells are stored.
        inputs: the input factors as one matrix (M R, I); None without factors.
        outputs: the output factors' rows by grid column; None without factors.
        all_outputs: the same rows as one group: None without factors.
        scales: what divides the inputs of every expert's factors, float32 (E, I); None where none are stored.
        orders: permutations, int32 (owners, I); None where nothing is rotated.
        owner_E: whose permutation is each expert's, int64; None where one belongs to the layer, or nothing is rotated.
        mixing: Walsh-Hadamard matrix times a power of two, float32 (block, block); None where nothing is mixed so.
    """

    row_E: Tensor
    column_E: Tensor
    inputs: KernelFacts | None
    outputs: RowFacts | None
    all_outputs: RowFacts | None
    scales: Tensor | None
    orders: Tensor | None
    owner_E: Tensor | None
    mixing: Tensor | None


def side_facts(sides: Sides) -> SideFacts:
    """The facts of one projection's sides, on the device of their bytes."""
    form, device = sides.form, sides.data.device
    outputs, inputs = sides.shape
    where = side_sections(form, sides.num_experts, sides.shape)
    cells_E2 = sides.cells() if form.has_cells else torch.zeros(sides.num_experts, 2, dtype=torch.int64, device=device)
    in_factors = out_rows = all_rows = orders = owner_E = mixing = None
    if form.rank:
        rows = form.columns * form.rank
        place = where.outputs[0]
        in_factors = kernel_facts([[(where.inputs[0], FACTOR)]], [(form.rows * form.rank, inputs)], device)
        firsts = np.arange(form.columns + 1) * form.rank
        within = np.arange(rows) % form.rank
        out_rows = row_facts([(place, FACTOR, rows)], outputs, [firsts], [within], device)
        all_rows = one_group(place, FACTOR, rows, outputs, device)
    if form.orders != "none":
        start, size = where.orders
        pairs = sides.data[start : start + size].view(-1, inputs, INDEX_BYTES).int()
        orders = (pairs[..., 0] + 256 * pairs[..., 1]).contiguous()
        if form.orders == "tile":
            owner_E = cells_E2[:, 0].contiguous()
        elif form.orders == "expert":
            owner_E = torch.arange(sides.num_experts, device=device)
        if 1 < form.block <= MOST_MIXED and form.plain < inputs:
            mixing = _hadamard(form.block).to(device)
    return SideFacts(
        row_E=cells_E2[:, 0].contiguous(),
        column_E=cells_E2[:, 1].contiguous(),
        inputs=in_factors,
        outputs=out_rows,
        all_outputs=all_rows,
        scales=sides.scales() if form.scales == "expert" else None,
        orders=orders,
        owner_E=owner_E,
        mixing=mixing,
    )


def _hadamard(block: int) -> Tensor:
    """The matrix in Sylvester's order, times the power of two below 1 / sqrt(block): exact in every dtype."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / 2 ** -(-(block.bit_length() - 1) // 2)

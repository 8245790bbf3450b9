"""Triton device functions that multiply with packed codes; needs triton, so only `moeq.layouts.grouped.gpu` imports it.

A record is never unpacked into memory. A tile of weights is the left operand of the tensor cores, W x^T, because they
take it from registers, where its codes were made:

- Byte j of a block holds in field s the code number s m + j, so one shift and one mask of a run of bytes are the
  weights of a run of inputs: one product for each field, and the codes never change lanes.
- A code c becomes a number by an OR: 0x4300 | c is the bfloat16 number 128 + c, 0x6400 | c the float16 number 1024 + c.
- Products are of codes, exact, in float32. Scale and zero come afterwards, once for each run of inputs that share
  them: scale * (sum c x - (z + offset) sum x). The sums of x are handed in.
- The planes of 3, 5 and 6 bits are independent terms of that sum.

Every width is a branch that is compiled, and Triton's passes take a time that grows with the square of what is in
them. Up to three widths have a loop each that takes both planes of a block in turn (`walk`); more share four loops, one
for each width of a plane, that go through the planes of a record one after the other (`walk_plane`).

Legend: N output rows, K input columns, M rows of x, G groups per row.
"""

import triton
import triton.language as tl

from moeq.kernels.triton_records import (
    BLOCK,
    block_weights,
    floats,
    full_blocks,
    high_of,
    high_width,
    low_of,
    multiply,
    offset_of,
    open_record,
    pitch_of,
    tail_of,
    zeros_of,
)
from moeq.kernels.triton_trellis import walk_trellis
from moeq.kernels.triton_vectors import walk_vectors

VECTOR: tl.constexpr = tl.constexpr(4)
"""The level set "vector", as `moeq.spec.LEVELS` counts."""
VECTOR_KINDS: tl.constexpr = tl.constexpr(16)
"""Bits of WIDTHS from here on are of codebooks, `moeq.kernels.facts.kind_of`."""
TRELLIS_KINDS: tl.constexpr = tl.constexpr(24)
"""And from here on of trellises."""


@triton.jit
def plane_block(
    acc_NM, plane_N, record, x_M, sums_M, block, row_N, col_M, levels_N, group_size, top, lift,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add what one plane of one block of 128 inputs gives.

    Args:
        acc_NM: float32 sums so far.
        plane_N: first byte of each row in the plane.
        record: pointers to each row's first scale, stored zero as uint8, stored zero as float16.
        x_M: first input of each row of x.
        sums_M: first sum of each row of x, one for each UNIT inputs.
        block: which block.
        row_N: rows that exist; looked at if MASKED.
        col_M: rows of x that exist.
        levels_N: see `zeros_of`; -1 for all planes but the last of a record, which brings the zeros along.
        group_size: inputs that share a scale.
        top: the largest code of the record, float32.
        lift: what a step of the plane is worth in codes, float32.
        WIDTH: of the plane.
        SPAN: inputs that are known to share a scale, at most 128.
        UNIT: inputs that share a sum; divides SPAN.
    """
    BYTES: tl.constexpr = 16 * WIDTH
    RUN: tl.constexpr = BYTES if BYTES < SPAN else SPAN
    RUNS: tl.constexpr = SPAN // RUN
    OFFSET: tl.constexpr = offset_of(WIDTH, DTYPE)
    j_K = tl.arange(0, RUN)
    for chunk in tl.static_range(BYTES // RUN):
        where_NK = plane_N[:, None] + (block * BYTES + chunk * RUN + j_K)[None, :]
        if MASKED:
            packed_NK = tl.load(where_NK, mask=row_N[:, None], other=0)
        else:
            packed_NK = tl.load(where_NK)
        part_NM = tl.zeros_like(acc_NM)
        for field in tl.static_range(8 // WIDTH):
            at = block * BLOCK + field * BYTES + chunk * RUN
            x_KM = tl.load(x_M[None, :] + (at + j_K)[:, None], mask=col_M[None, :], other=0.0)
            codes_NK = (packed_NK >> (field * WIDTH)) & ((1 << WIDTH) - 1)
            part_NM = multiply(floats(codes_NK, WIDTH, DTYPE), x_KM, part_NM)
            if (field + 1) % RUNS == 0:
                span = block * (BLOCK // SPAN) + (field * BYTES + chunk * RUN) // SPAN
                group = span * SPAN // group_size
                scale_N = tl.load(record[0] + group, mask=row_N, other=0.0).to(tl.float32) * lift
                zero_N = zeros_of(record, group, levels_N, top) + OFFSET
                sum_M = tl.load(sums_M + span * (SPAN // UNIT), mask=col_M, other=0.0)
                for piece in tl.static_range(1, SPAN // UNIT):
                    sum_M += tl.load(sums_M + span * (SPAN // UNIT) + piece, mask=col_M, other=0.0)
                acc_NM += (part_NM - zero_N[:, None] * sum_M[None, :]) * scale_N[:, None]
                part_NM = tl.zeros_like(acc_NM)
    return acc_NM


@triton.jit
def walk(
    acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
    K: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the full blocks from `first` to before `last`, for a record with planes of HIGH and LOW bits."""
    high_N, low_N, record = open_record(data, facts, row, pitch_of(K, HIGH), pitch_of(K, LOW))
    group_size = tl.load(facts + 5).to(tl.int32)
    levels_N = tl.where(row_N, tl.load(facts + 6).to(tl.int32), -1)
    TOP: tl.constexpr = (1 << HIGH + LOW) - 1
    for block in tl.range(first, tl.minimum(last, full_blocks(K))):
        acc_NM = plane_block(
            acc_NM, high_N, record, x_M, sums_M, block, row_N, col_M, levels_N if LOW == 0 else levels_N * 0 - 1,
            group_size, TOP * 1.0, (1 << LOW) * 1.0, HIGH, SPAN, UNIT, MASKED, DTYPE,
        )  # fmt: skip
        if LOW > 0:
            acc_NM = plane_block(
                acc_NM, low_N, record, x_M, sums_M, block, row_N, col_M, levels_N,
                group_size, TOP * 1.0, 1.0, LOW, SPAN, UNIT, MASKED, DTYPE,
            )  # fmt: skip
    return acc_NM


@triton.jit
def walk_plane(
    acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last, plane, top, lift,
    K: tl.constexpr, WIDTH: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `walk`, for one plane, 0 or 1, of WIDTH bits of a record; `top` and `lift` as in `plane_block`."""
    pitch: tl.constexpr = pitch_of(K, WIDTH)
    _, _, record = open_record(data, facts, row, pitch, pitch)
    plane_N = data + tl.multiple_of(tl.load(facts + plane), 16) + row.to(tl.int64) * pitch
    group_size = tl.load(facts + 5).to(tl.int32)
    levels_N = tl.where(row_N & (lift == 1.0), tl.load(facts + 6).to(tl.int32), -1)
    for block in tl.range(first, tl.minimum(last, full_blocks(K))):
        acc_NM = plane_block(
            acc_NM, plane_N, record, x_M, sums_M, block, row_N, col_M, levels_N, group_size, top, lift,
            WIDTH, SPAN, UNIT, MASKED, DTYPE,
        )  # fmt: skip
    return acc_NM


@triton.constexpr_function
def scalar_widths(widths):
    """WIDTHS of scalar levels."""
    return widths & 0xFFFF


@triton.constexpr_function
def is_few(widths):
    """Whether every width gets a loop of its own."""
    return bin(widths & 0xFFFF).count("1") <= 3


@triton.constexpr_function
def has_plane(widths, width):
    """Whether a record of one of the widths has a plane of `width` bits."""
    planes = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
    return any(width in planes[bits] for bits in planes if widths >> bits & 1)


@triton.jit
def product(
    acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
    K: tl.constexpr, WIDTHS: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the blocks from `first` to before `last`, and over the tail after the last block.

    WIDTHS has a bit set for each width that the record can have, from VECTOR_KINDS on for each of codebooks, and
    from TRELLIS_KINDS on for each of trellises.
    """
    bits = tl.load(facts + 4).to(tl.int32)
    levels = tl.load(facts + 6)
    scalar = levels < VECTOR
    if scalar_widths(WIDTHS) > 0:
        if is_few(WIDTHS):
            for width in tl.static_range(1, 9):
                if (WIDTHS >> width) & 1:
                    if scalar & (bits == width):
                        acc_NM = walk(acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
                                      K, high_of(width), low_of(width), SPAN, UNIT, MASKED, DTYPE)  # fmt: skip
        else:
            high = high_width(bits)
            top = ((1 << bits) - 1).to(tl.float32)
            for plane in tl.range(2):
                here = tl.where(scalar, tl.where(plane == 0, high, bits - high), 0)
                lift = tl.where(plane == 0, 1 << (bits - high), 1).to(tl.float32)
                for power in tl.static_range(4):
                    if has_plane(WIDTHS, 1 << power):
                        if here == 1 << power:
                            acc_NM = walk_plane(acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
                                                plane, top, lift, K, 1 << power, SPAN, UNIT, MASKED, DTYPE)  # fmt: skip
        if tail_of(K) > 0:
            FULL: tl.constexpr = full_blocks(K)
            if scalar & (first <= FULL) & (last > FULL):
                w_NK = block_weights(data, facts, FULL, row, row_N, K, False)
                at_K = FULL * BLOCK + tl.arange(0, 128)
                x_KM = tl.load(x_M[None, :] + at_K[:, None], mask=col_M[None, :] & (at_K < K)[:, None], other=0.0)
                acc_NM = multiply(w_NK.to(DTYPE), x_KM, acc_NM)
    for kind in tl.static_range(2, 4):
        if (WIDTHS >> (VECTOR_KINDS + kind)) & 1:
            if (bits == kind) & (levels == VECTOR):
                acc_NM = walk_vectors(acc_NM, data, facts, x_M, row, row_N, col_M, first, last, K, kind, DTYPE)
    for kind in tl.static_range(1, 5):
        if (WIDTHS >> (TRELLIS_KINDS + kind)) & 1:
            if (bits == kind) & (levels > VECTOR):
                acc_NM = walk_trellis(acc_NM, data, facts, x_M, row, row_N, col_M, first, last, K, kind, SPAN, DTYPE)
    return acc_NM

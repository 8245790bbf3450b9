"""Triton device functions that multiply with packed codes; needs triton, so only `moeq.kernels.gpu` imports it.

A record is never unpacked into memory. A tile of weights is the left operand of the tensor cores, W x^T, because they
take it from registers, where its codes were made:

- Byte j of a block holds in field s the code number s m + j, so one shift and one mask of a run of bytes are the
  weights of a run of inputs: one product for each field, and the codes never change lanes.
- A code c becomes a number by an OR: 0x4300 | c is the bfloat16 number 128 + c, 0x6400 | c the float16 number 1024 + c.
- Products are of codes, exact, in float32. Scale and zero come afterwards, once for each run of inputs that share
  them: scale * (sum c x - (z + offset) sum x). The sums of x are handed in.
- The planes of 3, 5 and 6 bits are independent terms of that sum.

Legend: N output rows, K input columns, M rows of x, G groups per row.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(128)
"""Codes that are interleaved together, `moeq.spec.BLOCK`."""
FACTS: tl.constexpr = tl.constexpr(8)
"""Columns of `moeq.kernels.packed.KernelFacts.table`."""
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter multiplies the bits of bfloat16 numbers as if they were integers: it gets float32 instead."""


@triton.constexpr_function
def high_of(bits):
    """Width of the plane of the most significant bits of codes: the largest power of two that fits."""
    return 8 if bits == 8 else 4 if bits >= 4 else 2 if bits >= 2 else 1


@triton.constexpr_function
def low_of(bits):
    """Width of the other plane, or 0."""
    return bits - high_of(bits)


@triton.constexpr_function
def offset_of(width, dtype):
    """What `floats` adds to every code."""
    if dtype == tl.float16:
        return 1024.0
    return 128.0 if dtype == tl.bfloat16 and width < 8 else 0.0


@triton.jit
def floats(codes, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 codes as numbers, `offset_of` too large; 8-bit codes do not fit beside an exact bfloat16 offset."""
    if tl.float16 == DTYPE:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif tl.bfloat16 == DTYPE and WIDTH < 8:
        return (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return codes.to(tl.float32).to(DTYPE)  # triton's interpreter cannot make bfloat16 of integers


@triton.jit
def multiply(w_NK, x_KM, acc_NM):
    """acc + w x in float32."""
    if INTERPRETED:
        w_NK, x_KM = w_NK.to(tl.float32), x_KM.to(tl.float32)
    return tl.dot(w_NK, x_KM, acc_NM, input_precision="ieee")


@triton.jit
def zeros_of(record, group, levels, BITS: tl.constexpr):
    """The zeros of a group of each row in codes, float32: `moeq.format.packing.real_zeros`.

    `levels` has the id of the level set, -1 where there is nothing to read.
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    byte = tl.load(record[1] + group, mask=levels == 0, other=0).to(tl.float32)
    half = tl.load(record[2] + group, mask=levels == 1, other=0.0).to(tl.float32)
    fixed = tl.where(levels == 2, (TOP + 1) * 0.5, tl.where(levels == 3, TOP * 0.5, 0.0))
    return byte * (TOP / 255) + half + fixed


@triton.jit
def plane_block(
    acc_NM, plane_N, record, x_M, sums_M, block, row_N, col_M, levels_N, group_size,
    BITS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, LAST: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add what one plane of one block of 128 inputs gives; the last plane of a record brings the zeros along.

    Args:
        acc_NM: float32 sums so far.
        plane_N: first byte of each row in the plane.
        record: pointers to each row's first scale, stored zero as uint8, stored zero as float16.
        x_M: first input of each row of x.
        sums_M: first sum of each row of x, one for each UNIT inputs.
        block: which block.
        row_N: rows that exist; looked at if MASKED.
        col_M: rows of x that exist.
        levels_N: see `zeros_of`.
        group_size: inputs that share a scale.
        BITS: of a code.
        WIDTH, SHIFT: of the plane.
        OFFSET: what `floats` adds, over all planes.
        LAST: the least significant plane.
        SPAN: inputs that are known to share a scale, at most 128.
        UNIT: inputs that share a sum; divides SPAN.
    """
    BYTES: tl.constexpr = 16 * WIDTH
    RUN: tl.constexpr = BYTES if BYTES < SPAN else SPAN
    RUNS: tl.constexpr = SPAN // RUN
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
                scale_N = tl.load(record[0] + group, mask=row_N, other=0.0).to(tl.float32)
                acc_NM += part_NM * (scale_N * (1 << SHIFT))[:, None]
                part_NM = tl.zeros_like(acc_NM)
                if LAST:
                    zero_N = zeros_of(record, group, levels_N, BITS) + OFFSET
                    sum_M = tl.load(sums_M + span * (SPAN // UNIT), mask=col_M, other=0.0)
                    for piece in tl.static_range(1, SPAN // UNIT):
                        sum_M += tl.load(sums_M + span * (SPAN // UNIT) + piece, mask=col_M, other=0.0)
                    acc_NM -= (scale_N * zero_N)[:, None] * sum_M[None, :]
    return acc_NM


@triton.constexpr_function
def full_blocks(columns):
    """Blocks of 128 inputs in a row."""
    return columns // 128


@triton.constexpr_function
def tail_of(columns):
    """Inputs behind the last full block."""
    return columns % 128


@triton.constexpr_function
def block_bytes(columns, width, full):
    """Bytes of a full block of a plane, or of the tail."""
    return 16 * width if full else (columns % 128 + 7) // 8 * width


@triton.constexpr_function
def pitch_of(columns, width):
    """Bytes of a row in a plane: `moeq.spec.plane_row_bytes`."""
    return columns // 128 * 16 * width + (columns % 128 + 7) // 8 * width


@triton.jit
def plane_codes(plane_N, block, col_K, row_N, K: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Codes of one plane at any columns of one block, or of the tail, (N, K), int32: a gather, for what is not hot."""
    BYTES: tl.constexpr = block_bytes(K, WIDTH, FULL)
    at_K = block * 16 * WIDTH + col_K % BYTES
    shift_K = col_K // BYTES * WIDTH
    packed_NK = tl.load(plane_N[:, None] + at_K[None, :], mask=row_N[:, None], other=0).to(tl.int32)
    return (packed_NK >> shift_K[None, :]) & ((1 << WIDTH) - 1)


@triton.jit
def block_weights(
    high_N, low_N, record, block, row_N, levels, group_size,
    K: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The weights of one block of 128 inputs, or of the tail padded to 128, (N, 128) float32; padding is zero.

    HIGH and LOW are the widths of the two planes; LOW is 0 where there is one.
    """
    col_K = tl.arange(0, 128)
    stored_K = col_K % block_bytes(K, 8, FULL)  # stay inside the tail
    codes_NK = plane_codes(high_N, block, stored_K, row_N, K, HIGH, FULL)
    if LOW > 0:
        codes_NK = (codes_NK << LOW) | plane_codes(low_N, block, stored_K, row_N, K, LOW, FULL)
    at_K = block * BLOCK + col_K
    group_NK = at_K[None, :] // group_size
    valid_NK = row_N[:, None] & (at_K < K)[None, :]
    scale_NK = tl.load(record[0][:, None] + group_NK, mask=valid_NK, other=0.0).to(tl.float32)
    wide = record[0][:, None], record[1][:, None], record[2][:, None]
    zero_NK = zeros_of(wide, group_NK, tl.where(valid_NK, levels, -1), HIGH + LOW)
    return tl.where(valid_NK, scale_NK * (codes_NK.to(tl.float32) - zero_NK), 0.0)


@triton.jit
def open_record(data, facts, row, K: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Pointers to each row's codes, scales and zeros; `facts` is the record's line of the kernel table."""
    wide_N = row.to(tl.int64)
    high_N = data + tl.multiple_of(tl.load(facts), 16) + wide_N * pitch_of(K, HIGH)
    low_N = data + tl.multiple_of(tl.load(facts + 1), 16) + wide_N * pitch_of(K, LOW)
    groups = tl.load(facts + 7)
    scales = (data + tl.multiple_of(tl.load(facts + 2), 16)).to(tl.pointer_type(tl.float16), bitcast=True)
    zeros = data + tl.multiple_of(tl.load(facts + 3), 16)
    halves = zeros.to(tl.pointer_type(tl.float16), bitcast=True)
    return high_N, low_N, (scales + wide_N * groups, zeros + wide_N * groups, halves + wide_N * groups)


@triton.jit
def walk(
    acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
    K: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the blocks from `first` to before `last`, and over the tail after the last block."""
    high_N, low_N, record = open_record(data, facts, row, K, HIGH, LOW)
    group_size = tl.load(facts + 5).to(tl.int32)
    levels = tl.load(facts + 6).to(tl.int32)
    levels_N = tl.where(row_N, levels, -1)
    FULL: tl.constexpr = full_blocks(K)
    OFFSET: tl.constexpr = offset_of(HIGH, DTYPE) * (1 << LOW) + (offset_of(LOW, DTYPE) if LOW > 0 else 0.0)
    for block in tl.range(first, tl.minimum(last, FULL)):
        acc_NM = plane_block(
            acc_NM, high_N, record, x_M, sums_M, block, row_N, col_M, levels_N, group_size,
            HIGH + LOW, HIGH, LOW, OFFSET, LOW == 0, SPAN, UNIT, MASKED, DTYPE,
        )  # fmt: skip
        if LOW > 0:
            acc_NM = plane_block(
                acc_NM, low_N, record, x_M, sums_M, block, row_N, col_M, levels_N, group_size,
                HIGH + LOW, LOW, 0, OFFSET, True, SPAN, UNIT, MASKED, DTYPE,
            )  # fmt: skip
    if tail_of(K) > 0:
        if (first <= FULL) & (last > FULL):
            w_NK = block_weights(high_N, low_N, record, FULL, row_N, levels, group_size, K, HIGH, LOW, False)
            at_K = FULL * BLOCK + tl.arange(0, 128)
            x_KM = tl.load(x_M[None, :] + at_K[:, None], mask=col_M[None, :] & (at_K < K)[:, None], other=0.0)
            acc_NM = multiply(w_NK.to(DTYPE), x_KM, acc_NM)
    return acc_NM


@triton.jit
def product(
    acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
    K: tl.constexpr, WIDTHS: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`walk` for the width that the record has; WIDTHS has a bit set for each width that there can be."""
    bits = tl.load(facts + 4)
    for width in tl.static_range(1, 9):
        if (WIDTHS >> width) & 1:
            if bits == width:
                acc_NM = walk(acc_NM, data, facts, x_M, sums_M, row, row_N, col_M, first, last,
                              K, high_of(width), low_of(width), SPAN, UNIT, MASKED, DTYPE)  # fmt: skip
    return acc_NM

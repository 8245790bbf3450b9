"""Triton device functions that read packed records; needs triton, so only `moeq.layouts.grouped.gpu` imports it.

What a kernel knows of a record is its line of `moeq.layouts.grouped.packed.KernelFacts.table`, here `facts`.

Legend: N output rows, K input columns, M rows of x.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(128)
"""Codes that are interleaved together, `moeq.spec.BLOCK`."""
FACTS: tl.constexpr = tl.constexpr(12)
"""Columns of `moeq.layouts.grouped.packed.KernelFacts.table`."""


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
        return codes.to(DTYPE)


@triton.jit
def multiply(w_NK, x_KM, acc_NM):
    """acc + w x in float32."""
    return tl.dot(w_NK, x_KM, acc_NM, input_precision="ieee")


@triton.jit
def zeros_of(record, group, levels, top):
    """The zeros of a group of each row in codes, float32: `moeq.format.records.real_zeros`.

    `levels` has the id of the level set, -1 where there is nothing to read; `top` is the largest code.
    """
    byte = tl.load(record[1] + group, mask=levels == 0, other=0).to(tl.float32)
    half = tl.load(record[2] + group, mask=levels == 1, other=0.0).to(tl.float32)
    fixed = tl.where(levels == 2, (top + 1) * 0.5, tl.where(levels == 3, top * 0.5, 0.0))
    return byte * (top / 255) + half + fixed


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
def high_width(bits):
    """`high_of` when the kernel runs."""
    return tl.where(bits == 8, 8, tl.where(bits >= 4, 4, tl.where(bits >= 2, 2, 1)))


@triton.jit
def plane_codes(plane_N, block, col_K, row_N, width, K: tl.constexpr, FULL: tl.constexpr):
    """Codes of one plane at any columns of one block, or of the tail, (N, K), int32: a gather, for what is not hot.

    Zero where `width`, which is known when the kernel runs, is.
    """
    unit: tl.constexpr = block_bytes(K, 1, FULL)
    bytes_ = tl.maximum(unit * width, 1)
    at_K = block * (16 * width) + col_K % bytes_
    shift_K = col_K // bytes_ * width
    packed_NK = tl.load(plane_N[:, None] + at_K[None, :], mask=row_N[:, None] & (width > 0), other=0).to(tl.int32)
    return (packed_NK >> shift_K[None, :]) & ((1 << width) - 1)


@triton.jit
def open_record(data, facts, row, high_pitch, low_pitch):
    """Pointers to each row's codes, scales and zeros; `facts` is the record's line of the kernel table.

    Pitches are bytes of a row in each plane.
    """
    wide_N = row.to(tl.int64)
    high_N = data + tl.multiple_of(tl.load(facts), 16) + wide_N * high_pitch
    low_N = data + tl.multiple_of(tl.load(facts + 1), 16) + wide_N * low_pitch
    groups = tl.load(facts + 7)
    scales = (data + tl.multiple_of(tl.load(facts + 2), 16)).to(tl.pointer_type(tl.float16), bitcast=True)
    zeros = data + tl.multiple_of(tl.load(facts + 3), 16)
    halves = zeros.to(tl.pointer_type(tl.float16), bitcast=True)
    return high_N, low_N, (scales + wide_N * groups, zeros + wide_N * groups, halves + wide_N * groups)


@triton.jit
def block_weights(data, facts, block, row, row_N, K: tl.constexpr, FULL: tl.constexpr):
    """The weights of one block of 128 inputs, or of the tail padded to 128, (N, 128) float32; padding is zero."""
    bits = tl.load(facts + 4).to(tl.int32)
    group_size = tl.load(facts + 5).to(tl.int32)
    levels = tl.load(facts + 6).to(tl.int32)
    high = high_width(bits)
    low = bits - high
    high_N, low_N, record = open_record(data, facts, row, pitch_of(K, 1) * high, pitch_of(K, 1) * low)
    col_K = tl.arange(0, 128)
    stored_K = col_K % block_bytes(K, 8, FULL)  # stay inside the tail
    codes_NK = plane_codes(high_N, block, stored_K, row_N, high, K, FULL) << low
    codes_NK |= plane_codes(low_N, block, stored_K, row_N, low, K, FULL)
    at_K = block * BLOCK + col_K
    group_NK = at_K[None, :] // group_size
    valid_NK = row_N[:, None] & (at_K < K)[None, :]
    scale_NK = tl.load(record[0][:, None] + group_NK, mask=valid_NK, other=0.0).to(tl.float32)
    wide = record[0][:, None], record[1][:, None], record[2][:, None]
    zero_NK = zeros_of(wide, group_NK, tl.where(valid_NK, levels, -1), ((1 << bits) - 1).to(tl.float32))
    return tl.where(valid_NK, scale_NK * (codes_NK.to(tl.float32) - zero_NK), 0.0)

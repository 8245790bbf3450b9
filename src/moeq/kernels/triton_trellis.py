"""Triton device functions for the level set "trellis"; needs triton, so only `moeq.layouts.grouped.gpu` imports it.

What a code stands for depends on parities of the lowest bits of it and of codes above it (`moeq.trellis.codes`). Rows
above are read again, from the cache: rows of a tile lie in different lanes, and one lane cannot hand what it read to
the next. Parities are made of whole bytes, before codes are taken apart. The entries lie behind the facts of the
record.

Legend: N output rows, K input columns, M rows of x.
"""

import triton
import triton.language as tl

from moeq.kernels.triton_records import (
    BLOCK,
    block_bytes,
    full_blocks,
    high_of,
    low_of,
    multiply,
    open_record,
    pitch_of,
    plane_codes,
    tail_of,
)

ENTRIES: tl.constexpr = tl.constexpr(8)
"""Column of the facts of a record from which on its entries are, `moeq.kernels.facts.ENTRY_COLUMNS`."""


@triton.constexpr_function
def taps_of(bits, parity):
    """Codes that a parity is of, `moeq.trellis.tables.TAPS`, or none."""
    all_taps = {1: (10, 4, 6, 41), 2: (36, 10, 81), 3: (4, 18, 35), 4: (18, 37)}[bits]
    return all_taps[parity] if parity < len(all_taps) else 0


@triton.constexpr_function
def parities_of(bits):
    """Parities of a code."""
    return 2 if bits == 4 else 4 if bits == 1 else 3


@triton.constexpr_function
def last_plane_of(bits):
    """Width of the plane that has the lowest bits of codes."""
    return low_of(bits) if low_of(bits) > 0 else high_of(bits)


@triton.jit
def odd_bytes(plane_N, at_K, row, row_N, BITS: tl.constexpr, PITCH: tl.constexpr):
    """The parities of the codes of some bytes, (N, K) int32: those of parity p in the byte p."""
    words_NK = tl.zeros((plane_N.shape[0], at_K.shape[0]), tl.int32)
    for parity in tl.static_range(4):
        for back in tl.static_range(7):
            if (taps_of(BITS, parity) >> back) & 1:
                there_N = row_N & (row >= back)
                above_NK = tl.load(plane_N[:, None] - back * PITCH + at_K[None, :], mask=there_N[:, None], other=0)
                words_NK ^= above_NK.to(tl.int32) << (8 * parity)
    return words_NK


@triton.jit
def trellis_block(
    acc_NM, data, facts, x_M, block, row, row_N, col_M, group_size,
    K: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add what one block of 128 inputs gives; arguments as in `moeq.kernels.triton_tiles.plane_block`."""
    LAST: tl.constexpr = last_plane_of(BITS)
    BYTES: tl.constexpr = 16 * LAST
    RUN: tl.constexpr = BYTES if BYTES < SPAN else SPAN
    RUNS: tl.constexpr = SPAN // RUN
    HIGH: tl.constexpr = high_of(BITS)
    PARITIES: tl.constexpr = parities_of(BITS)
    high_N, low_N, record = open_record(data, facts, row, pitch_of(K, HIGH), pitch_of(K, LAST))
    entries = (facts + ENTRIES).to(tl.pointer_type(tl.int8), bitcast=True)
    j_K = tl.arange(0, RUN)
    for chunk in tl.static_range(BYTES // RUN):
        at_K = block * BYTES + chunk * RUN + j_K
        words_NK = odd_bytes(low_N, at_K, row, row_N, BITS, pitch_of(K, LAST))
        own_NK = tl.load(low_N[:, None] + at_K[None, :], mask=row_N[:, None], other=0).to(tl.int32)
        part_NM = tl.zeros_like(acc_NM)
        for field in tl.static_range(8 // LAST):
            at = field * BYTES + chunk * RUN
            index_NK = tl.zeros_like(words_NK)
            for parity in tl.static_range(PARITIES):
                index_NK |= ((words_NK >> (8 * parity + field * LAST)) & 1) << parity
            if low_of(BITS) > 0:
                high_K = block * (16 * HIGH) + at % (16 * HIGH) + j_K
                high_NK = tl.load(high_N[:, None] + high_K[None, :], mask=row_N[:, None], other=0).to(tl.int32)
                index_NK |= ((high_NK >> (at // (16 * HIGH) * HIGH)) & ((1 << HIGH) - 1)) << PARITIES
            elif BITS > 1:
                index_NK |= ((own_NK >> (field * LAST + 1)) & ((1 << (BITS - 1)) - 1)) << PARITIES
            w_NK = tl.load(entries + index_NK).to(tl.float32).to(DTYPE)
            x_KM = tl.load(x_M[None, :] + (block * BLOCK + at + j_K)[:, None], mask=col_M[None, :], other=0.0)
            part_NM = multiply(w_NK, x_KM, part_NM)
            if (field + 1) % RUNS == 0:
                group = (block * BLOCK + at) // group_size
                scale_N = tl.load(record[0] + group, mask=row_N, other=0.0).to(tl.float32)
                acc_NM += part_NM * scale_N[:, None]
                part_NM = tl.zeros_like(acc_NM)
    return acc_NM


@triton.jit
def trellis_weights(data, facts, block, row, row_N, K: tl.constexpr, BITS: tl.constexpr, FULL: tl.constexpr):
    """The weights of one block of 128 inputs, or of the tail padded to 128, (N, 128) float32; padding is zero."""
    LAST: tl.constexpr = last_plane_of(BITS)
    HIGH: tl.constexpr = high_of(BITS)
    PARITIES: tl.constexpr = parities_of(BITS)
    PITCH: tl.constexpr = pitch_of(K, LAST)
    high_N, low_N, record = open_record(data, facts, row, pitch_of(K, HIGH), PITCH)
    col_K = tl.arange(0, 128)
    stored_K = col_K % block_bytes(K, 8, FULL)  # stay inside the tail
    index_NK = plane_codes(high_N, block, stored_K, row_N, HIGH, K, FULL)
    index_NK = (index_NK if low_of(BITS) > 0 else index_NK >> 1) << PARITIES
    for back in tl.static_range(7):
        there_N = row_N & (row >= back)
        above_NK = plane_codes(low_N - back * PITCH, block, stored_K, there_N, LAST, K, FULL) & 1
        for parity in tl.static_range(PARITIES):
            if (taps_of(BITS, parity) >> back) & 1:
                index_NK ^= above_NK << parity
    entries = (facts + ENTRIES).to(tl.pointer_type(tl.int8), bitcast=True)
    at_K = block * BLOCK + col_K
    valid_NK = row_N[:, None] & (at_K < K)[None, :]
    group_K = at_K // tl.load(facts + 5).to(tl.int32)
    scale_NK = tl.load(record[0][:, None] + group_K[None, :], mask=valid_NK, other=0.0).to(tl.float32)
    return tl.load(entries + index_NK).to(tl.float32) * scale_NK


@triton.jit
def walk_trellis(
    acc_NM, data, facts, x_M, row, row_N, col_M, first, last,
    K: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the blocks of 128 inputs from `first` to before `last`, and over the tail."""
    group_size = tl.load(facts + 5).to(tl.int32)
    for block in tl.range(first, tl.minimum(last, full_blocks(K))):
        acc_NM = trellis_block(acc_NM, data, facts, x_M, block, row, row_N, col_M, group_size, K, BITS, SPAN, DTYPE)
    if tail_of(K) > 0:
        FULL: tl.constexpr = full_blocks(K)
        if (first <= FULL) & (last > FULL):
            w_NK = trellis_weights(data, facts, FULL, row, row_N, K, BITS, False)
            at_K = FULL * BLOCK + tl.arange(0, 128)
            x_KM = tl.load(x_M[None, :] + at_K[:, None], mask=col_M[None, :] & (at_K < K)[:, None], other=0.0)
            acc_NM = multiply(w_NK.to(DTYPE), x_KM, acc_NM)
    return acc_NM


@triton.jit
def store_trellis(out_N, data, facts, block, row, row_N, K: tl.constexpr, BITS: tl.constexpr):
    """Decode one block of 128 inputs, or the tail, of some rows."""
    at_K = block * BLOCK + tl.arange(0, 128)
    mask_NK = row_N[:, None] & (at_K < K)[None, :]
    where_NK = out_N[:, None] + at_K[None, :]
    if block < full_blocks(K):
        w_NK = trellis_weights(data, facts, block, row, row_N, K, BITS, True)
        tl.store(where_NK, w_NK.to(out_N.dtype.element_ty), mask=mask_NK)
    elif tail_of(K) > 0:
        w_NK = trellis_weights(data, facts, block, row, row_N, K, BITS, False)
        tl.store(where_NK, w_NK.to(out_N.dtype.element_ty), mask=mask_NK)

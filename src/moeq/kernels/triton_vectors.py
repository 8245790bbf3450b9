"""Triton device functions for the level set "vector"; needs triton, so only `moeq.layouts.grouped.gpu` imports it.

A code names some weights that are neighbours (`moeq.spec.VECTORS`). One gather fetches them as the bytes of a word;
each of them meets inputs that lie as far apart as vectors do, so that codes stay in the lanes that read them.

Legend: N output rows, K input columns, M rows of x, V vectors of a block of 128 inputs.
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
)


@triton.constexpr_function
def dim_of(bits):
    """Weights that share a code of a codebook, `moeq.spec.VECTORS`."""
    return 4 if bits == 2 else 2


@triton.constexpr_function
def code_bits_of(bits):
    """Width of such a code."""
    return 8 if bits == 2 else 6


@triton.constexpr_function
def book_columns_of(bits):
    """Columns that share a codebook."""
    return 256 if bits == 2 else 128


@triton.jit
def vector_words(data, facts, row, row_N, block, K: tl.constexpr, BITS: tl.constexpr):
    """What the codes of 128 inputs name, (N, 128 / d) int32 with an entry in each byte, and which exist."""
    DIM: tl.constexpr = dim_of(BITS)
    WIDTH: tl.constexpr = code_bits_of(BITS)
    HIGH: tl.constexpr = high_of(WIDTH)
    LOW: tl.constexpr = low_of(WIDTH)
    CODES: tl.constexpr = K // DIM
    STEP: tl.constexpr = BLOCK // DIM
    high_N, low_N, _ = open_record(data, facts, row, pitch_of(CODES, HIGH), pitch_of(CODES, LOW))
    at = block * STEP
    code_V = at + tl.arange(0, STEP)
    here_NV = row_N[:, None] & (code_V < CODES)[None, :]
    run = at // BLOCK
    in_tail = run >= full_blocks(CODES)
    unit = tl.where(in_tail, block_bytes(CODES, 1, False), 16)
    within_V = code_V - run * BLOCK
    high_V = run * (16 * HIGH) + within_V % (unit * HIGH)
    codes_NV = tl.load(high_N[:, None] + high_V[None, :], mask=here_NV, other=0).to(tl.int32)
    codes_NV = (codes_NV >> (within_V // (unit * HIGH) * HIGH)[None, :]) & ((1 << HIGH) - 1)
    if LOW > 0:
        low_V = run * (16 * LOW) + within_V % (unit * LOW)
        low_NV = tl.load(low_N[:, None] + low_V[None, :], mask=here_NV, other=0).to(tl.int32)
        codes_NV = (codes_NV << LOW) | ((low_NV >> (within_V // (unit * LOW) * LOW)[None, :]) & ((1 << LOW) - 1))
    ACROSS: tl.constexpr = (K + book_columns_of(BITS) - 1) // book_columns_of(BITS)
    book_N = row // 256 * ACROSS + block * BLOCK // book_columns_of(BITS)
    entry_NV = (book_N * (1 << WIDTH))[:, None] + codes_NV
    books = data + tl.multiple_of(tl.load(facts + 3), 16)
    if DIM == 4:
        words_NV = tl.load(books.to(tl.pointer_type(tl.int32), bitcast=True) + entry_NV, mask=here_NV, other=0)
    else:
        words_NV = tl.load(books.to(tl.pointer_type(tl.int16), bitcast=True) + entry_NV, mask=here_NV, other=0)
    return words_NV.to(tl.int32), here_NV


@triton.jit
def vector_numbers(words_NV, here_NV, place: tl.constexpr):
    """Entry `place` of each vector, float32, zero where there is none: an entry u stands for u - 128."""
    return tl.where(here_NV, ((words_NV >> (8 * place)) & 255).to(tl.float32) - 128.0, 0.0)


@triton.jit
def vector_scales(data, facts, row, row_N):
    """Scales of rows, float32."""
    scales = (data + tl.multiple_of(tl.load(facts + 2), 16)).to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(scales + row, mask=row_N, other=0.0).to(tl.float32)


@triton.jit
def walk_vectors(
    acc_NM, data, facts, x_M, row, row_N, col_M, first, last,
    K: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over blocks of 128 inputs from `first` to before `last`, for a record of the level set "vector"."""
    DIM: tl.constexpr = dim_of(BITS)
    part_NM = tl.zeros_like(acc_NM)
    for block in tl.range(first, last):
        words_NV, here_NV = vector_words(data, facts, row, row_N, block, K, BITS)
        input_V = block * BLOCK + tl.arange(0, BLOCK // DIM) * DIM
        for place in tl.static_range(DIM):
            where_VM = x_M[None, :] + (input_V + place)[:, None]
            x_VM = tl.load(where_VM, mask=col_M[None, :] & (input_V < K)[:, None], other=0.0)
            part_NM = multiply(vector_numbers(words_NV, here_NV, place).to(DTYPE), x_VM, part_NM)
    return acc_NM + part_NM * vector_scales(data, facts, row, row_N)[:, None]

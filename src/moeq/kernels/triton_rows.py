"""Triton kernels over rows of packed records that belong to groups; needs triton, so only kernels of GPUs import it.

`combine_rows` multiplies rows by numbers and adds them up: components of gate and up, output factors, the basis of
down. `dot_rows` takes dot products with rows and scatters them: components of down. `permute` reorders inputs.

Legend: S choices, E groups, n rows, K columns of a row, M rows of x, L slabs.
"""

import triton
import triton.language as tl

from moeq.kernels.triton_kernels import rows_of, store_block
from moeq.kernels.triton_records import (
    BLOCK,
    FACTS,
    block_weights,
    full_blocks,
    high_of,
    low_of,
    multiply,
    open_record,
    pitch_of,
    tail_of,
    zeros_of,
)
from moeq.kernels.triton_tiles import product

LINE: tl.constexpr = tl.constexpr(13)
"""Columns of `moeq.kernels.facts.RowFacts.table`."""


@triton.constexpr_function
def bits_of(slab):
    """Width of a slab, `moeq.layouts.spectral.shape.SLAB_WIDTHS`."""
    return 8 if slab == 0 else 7 - slab


@triton.jit
def spread(plane_N, block, row_N, WIDTH: tl.constexpr, N: tl.constexpr):
    """Codes of one plane of a full block, (N, 128) uint8: every byte is loaded once."""
    BYTES: tl.constexpr = 16 * WIDTH
    FIELDS: tl.constexpr = 8 // WIDTH
    where_NB = plane_N[:, None] + (block * BYTES + tl.arange(0, BYTES))[None, :]
    packed_NB = tl.load(where_NB, mask=row_N[:, None], other=0)
    shift_F = (tl.arange(0, FIELDS) * WIDTH).to(tl.uint8)
    # Field s of byte j is code s m + j: as the fields are laid out, so lie the codes.
    codes_NFB = (packed_NB[:, None, :] >> shift_F[None, :, None]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes_NFB, (N, 128))


@triton.jit
def full_weights(
    high_N, low_N, record, block, row_N, levels, group_size,
    HIGH: tl.constexpr, LOW: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `moeq.kernels.triton_tiles.block_weights` for a full block whose runs of SPAN inputs share a scale."""
    RUNS: tl.constexpr = 128 // SPAN
    codes_NK = spread(high_N, block, row_N, HIGH, N)
    if LOW > 0:
        codes_NK = (codes_NK << LOW) | spread(low_N, block, row_N, LOW, N)
    group_R = (block * BLOCK + tl.arange(0, RUNS) * SPAN) // group_size
    valid_NR = row_N[:, None] & (group_R >= 0)[None, :]
    scale_NR = tl.load(record[0][:, None] + group_R[None, :], mask=valid_NR, other=0.0).to(tl.float32)
    wide = record[0][:, None], record[1][:, None], record[2][:, None]
    zero_NR = zeros_of(wide, group_R[None, :], tl.where(valid_NR, levels, -1), ((1 << HIGH + LOW) - 1) * 1.0)
    codes_NRS = tl.reshape(codes_NK.to(tl.float32), (N, RUNS, SPAN))
    return tl.reshape((codes_NRS - zero_NR[:, :, None]) * scale_NR[:, :, None], (N, 128))


@triton.jit
def add_rows(
    acc_KM, x_M, col_M, data, table, firsts, places, expert, block, split,
    SLAB: tl.constexpr, E: tl.constexpr, K: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    SPAN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + the sum of a group's rows in one slab, each times a number of x, for one block of 128 columns."""
    facts = table + SLAB * LINE
    group_size = tl.load(facts + 5).to(tl.int32)
    levels = tl.load(facts + 6).to(tl.int32)
    base = tl.load(facts + FACTS)
    last = tl.load(firsts + SLAB * (E + 1) + expert + 1)
    start = tl.load(firsts + SLAB * (E + 1) + expert) + split * BLOCK_N
    for at in tl.range(start, last, SPLITS * BLOCK_N):
        row = at + tl.arange(0, BLOCK_N)
        row_N = row < last
        high_N, low_N, record = open_record(data, facts, row, pitch_of(K, HIGH), pitch_of(K, LOW))
        place_N = tl.load(places + base + row, mask=row_N, other=0)
        x_NM = tl.load(x_M[None, :] + place_N[:, None], mask=row_N[:, None] & col_M[None, :], other=0.0)
        if tail_of(K) == 0:
            w_NK = full_weights(high_N, low_N, record, block, row_N, levels, group_size, HIGH, LOW, SPAN, BLOCK_N)
        elif full_blocks(K) == 0:
            w_NK = block_weights(data, facts, block, row, row_N, K, False)
        else:
            if block < full_blocks(K):
                w_NK = full_weights(high_N, low_N, record, block, row_N, levels, group_size, HIGH, LOW, SPAN, BLOCK_N)
            else:
                w_NK = block_weights(data, facts, block, row, row_N, K, False)
        acc_KM = multiply(tl.trans(w_NK.to(DTYPE)), x_NM, acc_KM)
    return acc_KM


@triton.jit(do_not_specialize=["rows", "x_columns"])
def combine_rows(
    x, data, table, firsts, places, order, starts, counts, out, rows, x_columns,
    E: tl.constexpr, EXPERTS: tl.constexpr, PER_ROW: tl.constexpr, K: tl.constexpr,
    WIDTHS: tl.constexpr, SPAN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each choice's sum over the rows of its group, every row times the number of x that is its place.

    Choice s reads row s // PER_ROW of x and writes row s of `out`, (SPLITS, rows, K): each split takes its share of the
    rows. Rows of choices of groups that do not exist are left as they are.

    Args:
        x: (rows / PER_ROW, x_columns).
        data, table, firsts, places: the blob and its `RowFacts`.
        order, starts, counts: from `prepare`; unused if EXPERTS is 0, when all rows of x belong to the only group.
        out: result.
        rows: rows of `out`.
        x_columns: not a constant, because bases of spectral layers differ in it from layer to layer.
        E, EXPERTS: groups, and the next power of two, or 0.
        WIDTHS, SPAN: as in `RowFacts`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    expert, choice_M, col_M = rows_of(rows, order, starts, counts, E, EXPERTS, BLOCK_M)
    if expert < E:
        x_M = x + (choice_M // PER_ROW).to(tl.int64) * x_columns
        block = tl.program_id(1)
        split = tl.program_id(2)
        acc_KM = tl.zeros((128, BLOCK_M), tl.float32)
        for slab in tl.static_range(7):
            if (WIDTHS >> bits_of(slab)) & 1:
                acc_KM = add_rows(acc_KM, x_M, col_M, data, table, firsts, places, expert, block, split,
                                  slab, E, K, high_of(bits_of(slab)), low_of(bits_of(slab)), SPAN, SPLITS,
                                  BLOCK_N, DTYPE)  # fmt: skip
        at_K = block * BLOCK + tl.arange(0, 128)
        where_KM = out + (split.to(tl.int64) * rows + choice_M)[None, :] * K + at_K[:, None]
        tl.store(where_KM, acc_KM.to(out.dtype.element_ty), mask=(at_K < K)[:, None] & col_M[None, :])


@triton.jit
def some_rows(part, firsts, group, E: tl.constexpr, BLOCK_N: tl.constexpr):
    """Part `part` of a group, whose rows are cut, slab by slab, into parts of BLOCK_N: slab, rows, which of them exist.

    The slab is -1 behind the last part.
    """
    found = tl.full((), -1, tl.int32)
    first = tl.zeros((), tl.int32)
    end = tl.zeros((), tl.int32)
    left = part
    for slab in tl.range(7):
        start = tl.load(firsts + slab * (E + 1) + group)
        stop = tl.load(firsts + slab * (E + 1) + group + 1)
        parts = (stop - start + BLOCK_N - 1) // BLOCK_N
        here = (left >= 0) & (left < parts)
        found = tl.where(here, slab, found)
        first = tl.where(here, start + left * BLOCK_N, first)
        end = tl.where(here, stop, end)
        left -= parts
    row = first + tl.arange(0, BLOCK_N)
    return found, row, row < end


@triton.jit(do_not_specialize=["rows", "out_columns"])
def dot_rows(
    x, sums, data, table, firsts, places, order, starts, counts, out, rows, out_columns,
    E: tl.constexpr, EXPERTS: tl.constexpr, PER_ROW: tl.constexpr, K: tl.constexpr,
    WIDTHS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each choice's dot products with the rows of its group, written where the places of the rows say.

    Arguments as in `combine_rows`, but x is (rows / PER_ROW, K), `sums` has sums of UNIT inputs each, and `out` is
    (rows, out_columns). What is no row's place is left as it is.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    expert, choice_M, col_M = rows_of(rows, order, starts, counts, E, EXPERTS, BLOCK_M)
    if expert < E:
        x_row_M = (choice_M // PER_ROW).to(tl.int64)
        x_M = x + x_row_M * K
        sums_M = sums + x_row_M * (K // UNIT)
        out_M = out + choice_M.to(tl.int64) * out_columns
        slab, row, row_N = some_rows(tl.program_id(1), firsts, expert, E, BLOCK_N)
        if slab >= 0:
            facts = table + slab * LINE
            acc_NM = product(
                tl.zeros((BLOCK_N, BLOCK_M), tl.float32), data, facts, x_M, sums_M, row, row_N, col_M,
                0, full_blocks(K + 127), K, WIDTHS, SPAN, UNIT, True, DTYPE,
            )  # fmt: skip
            place_N = tl.load(places + tl.load(facts + FACTS) + row, mask=row_N, other=0)
            mask_NM = row_N[:, None] & col_M[None, :]
            tl.store(out_M[None, :] + place_N[:, None], acc_NM.to(out_M.dtype.element_ty), mask=mask_NM)


@triton.jit(do_not_specialize=["FIRST"])
def decode_rows(
    data, table, firsts, places, counts, weights, FIRST, PLACES,
    E: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Decode the rows of groups from FIRST on that have choices, into (groups, PLACES, K), each where its place says.

    Program (a, b, c) writes block b of the columns of part a of the rows of group c. What is no row's place stays.
    """
    group = FIRST + tl.program_id(2)
    if tl.load(counts + group) > 0:
        slab, row, row_N = some_rows(tl.program_id(0), firsts, group, E, BLOCK_N)
        if slab >= 0:
            facts = table + slab * LINE
            place_N = tl.load(places + tl.load(facts + FACTS) + row, mask=row_N, other=0)
            out_N = weights + (tl.program_id(2).to(tl.int64) * PLACES + place_N) * K
            store_block(out_N, data, facts, tl.program_id(1), row, row_N, K)


@triton.jit(do_not_specialize=["E"])
def permute(
    x, index, owners, orders, out, E,
    OWNED: tl.constexpr, PER_ROW: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row s of `out`, (S, K), is row s // PER_ROW of x in the order that the expert of choice s asks for.

    Without OWNED there is one order. Choices of experts that do not exist get that of the last.
    """
    choice = tl.program_id(0).to(tl.int64)
    col_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    here_K = col_K < K
    owner = tl.zeros((), tl.int64)
    if OWNED:
        owner = tl.load(owners + tl.minimum(tl.load(index + choice), E - 1))
    from_K = tl.load(orders + owner * K + col_K, mask=here_K, other=0)
    x_K = tl.load(x + choice // PER_ROW * K + from_K, mask=here_K, other=0.0)
    tl.store(out + choice * K + col_K, x_K, mask=here_K)

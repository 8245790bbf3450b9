"""The Triton kernels; needs triton, so only `moeq.layouts.grouped.gpu` imports it.

Four launches make a layer: `prepare`, `multiply_rows` for gate and up with the activation, `multiply_rows` for down,
`combine`. Who gets which tile follows from counts that stay on the device: nothing here waits for the host, so that
a layer can be captured in a CUDA graph.

Numbers that follow from the tokens of a call (`do_not_specialize`) never cost a compilation: Triton would make one
kernel for 1, one for multiples of 16, and one for the rest.

Legend: T tokens, k experts per token, S = T * k choices, E experts, N output rows, K input columns, M rows of a tile.
"""

import triton
import triton.language as tl

from moeq.kernels.triton_records import BLOCK, FACTS, block_weights, full_blocks, multiply, tail_of
from moeq.kernels.triton_tiles import TRELLIS_KINDS, VECTOR, VECTOR_KINDS, product, scalar_widths
from moeq.kernels.triton_trellis import store_trellis
from moeq.kernels.triton_vectors import dim_of, vector_numbers, vector_scales, vector_words


@triton.jit(do_not_specialize=["S", "E"])
def prepare(
    index, order, starts, counts, x, sums, S, E,
    K: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sort the choices by expert, and add up the inputs that share a scale.

    Program e < E counts its expert's choices and writes their positions, in order, behind those of lower experts;
    program E + r adds up runs of UNIT inputs of row r of x, (rows, K // UNIT) float32.
    """
    program = tl.program_id(0)
    i_C = tl.arange(0, CHUNK)
    if program < E:
        start = tl.zeros((), tl.int32)
        for at in tl.range(0, S, CHUNK):
            expert_C = tl.load(index + at + i_C, mask=at + i_C < S, other=E)
            start += tl.sum((expert_C < program).to(tl.int32), 0)
        end = start
        for at in tl.range(0, S, CHUNK):
            expert_C = tl.load(index + at + i_C, mask=at + i_C < S, other=E)
            mine_C = (expert_C == program).to(tl.int32)
            tl.store(order + end + tl.cumsum(mine_C, 0) - 1, at + i_C, mask=mine_C > 0)
            end += tl.sum(mine_C, 0)
        tl.store(starts + program, start)
        tl.store(counts + program, end - start)
    else:
        row = (program - E).to(tl.int64)
        ROWS: tl.constexpr = CHUNK // UNIT
        unit_R = tl.arange(0, ROWS)
        j_U = tl.arange(0, UNIT)
        for at in tl.range(0, K // UNIT, ROWS):
            here_R = at + unit_R < K // UNIT
            x_RU = tl.load(x + row * K + (at + unit_R)[:, None] * UNIT + j_U[None, :], mask=here_R[:, None], other=0.0)
            tl.store(sums + row * (K // UNIT) + at + unit_R, tl.sum(x_RU.to(tl.float32), 1), mask=here_R)


@triton.jit
def tile_of(tile, starts, counts, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, first sorted position and rows left of a tile; the expert is EXPERTS behind the last tile."""
    e_E = tl.arange(0, EXPERTS)
    count_E = tl.load(counts + e_E, mask=e_E < E, other=0)
    tiles_E = (count_E + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e_E < expert, tiles_E, 0), 0)
    done = (tile - before) * BLOCK_M
    inside = expert < E
    start = tl.load(starts + expert, mask=inside, other=0)
    count = tl.load(counts + expert, mask=inside, other=0)
    return expert, start + done, count - done


@triton.jit
def rows_of(rows, order, starts, counts, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, rows and which of them exist, of this program's tile; without experts (EXPERTS = 0), rows in order."""
    tile = tl.program_id(0)
    i_M = tl.arange(0, BLOCK_M)
    if EXPERTS > 0:
        expert, first, left = tile_of(tile, starts, counts, E, EXPERTS, BLOCK_M)
        col_M = i_M < left
        row_M = tl.load(order + first + i_M, mask=col_M, other=0)
    else:
        expert = tl.zeros((), tl.int32)
        row_M = tile * BLOCK_M + i_M
        col_M = row_M < rows
    return expert, row_M, col_M


@triton.jit(do_not_specialize=["rows"])
def multiply_rows(
    x, sums, data, table, order, starts, counts, low, out, out_sums, rows, N,
    E: tl.constexpr, EXPERTS: tl.constexpr, PER_ROW: tl.constexpr,
    PROJECTIONS: tl.constexpr, POSITION: tl.constexpr, GATED: tl.constexpr, LOW: tl.constexpr,
    K: tl.constexpr, MASKED: tl.constexpr,
    WIDTHS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of x times the experts' matrices, x W^T; two of them and silu(gate) * up if GATED.

    Choice s reads row s // PER_ROW of x and writes row s of `out`, (SPLITS, rows, N): each split sums its own share of
    the inputs. OUT_UNIT > 0 also writes sums of runs of what is written, (rows, N // OUT_UNIT), for the next product.

    Args:
        x, sums: (rows / PER_ROW, K) and sums of UNIT inputs each.
        data, table: the blob and its kernel table, (E, PROJECTIONS, FACTS).
        order, starts, counts: from `prepare`; unused if EXPERTS is 0.
        low: if LOW, what is added to gate and up before the activation, (rows, 2, N).
        out, out_sums: results.
        rows: rows of `out`.
        N: not a constant, because bases of spectral layers differ in it from layer to layer.
        E, EXPERTS: experts, and the next power of two; EXPERTS = 0 for one matrix and no choice.
        MASKED: whether N is no multiple of BLOCK_N.
        POSITION: of the projection, the gate's if GATED.
        WIDTHS, SPAN: see `product` and `plane_block`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    expert, choice_M, col_M = rows_of(rows, order, starts, counts, E, EXPERTS, BLOCK_M)
    if expert < E:
        row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_N = row < N
        x_row_M = (choice_M // PER_ROW).to(tl.int64)
        x_M = x + x_row_M * K
        sums_M = sums + x_row_M * (K // UNIT)
        facts = table + (expert * PROJECTIONS + POSITION) * FACTS
        BLOCKS: tl.constexpr = full_blocks(K + 127)
        SHARE: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
        split = tl.program_id(2)
        first = split * SHARE
        last = tl.minimum(first + SHARE, BLOCKS)
        # Two calls of `zeros`: Triton carries a name through a loop only if the loop changes its value, and names that
        # begin as one value look unchanged where one of them is assigned the other.
        gate_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for matrix in tl.range(2 if GATED else 1):  # one loop, not two copies: it halves the time to compile
            gate_NM = acc_NM
            acc_NM = product(
                tl.zeros((BLOCK_N, BLOCK_M), tl.float32), data, facts + matrix * FACTS, x_M, sums_M, row, row_N, col_M,
                first, last, K, WIDTHS, SPAN, UNIT, MASKED, DTYPE,
            )  # fmt: skip
        if LOW:
            low_NM = low + choice_M.to(tl.int64)[None, :] * (2 * N) + row[:, None]
            mask_NM = row_N[:, None] & col_M[None, :]
            gate_NM += tl.load(low_NM, mask=mask_NM, other=0.0).to(tl.float32)
            acc_NM += tl.load(low_NM + N, mask=mask_NM, other=0.0).to(tl.float32)
        if GATED:
            acc_NM = gate_NM / (1.0 + tl.exp(-gate_NM)) * acc_NM
        y_NM = acc_NM.to(out.dtype.element_ty)
        out_row_M = split.to(tl.int64) * rows + choice_M
        tl.store(out + out_row_M[None, :] * N + row[:, None], y_NM, mask=row_N[:, None] & col_M[None, :])
        if OUT_UNIT > 0:
            RUNS: tl.constexpr = BLOCK_N // OUT_UNIT
            y_NM = tl.where(row_N[:, None], y_NM.to(tl.float32), 0.0)
            sum_RM = tl.sum(tl.reshape(y_NM, (RUNS, OUT_UNIT, BLOCK_M)), 1)
            run_R = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
            where_RM = out_sums + choice_M.to(tl.int64)[None, :] * (N // OUT_UNIT) + run_R[:, None]
            tl.store(where_RM, sum_RM, mask=(run_R < N // OUT_UNIT)[:, None] & col_M[None, :])


@triton.jit(do_not_specialize=["FIRST"])
def multiply_decoded(
    x, weights, order, starts, counts, low, out, FIRST, N, K,
    COUNT: tl.constexpr, EXPERTS: tl.constexpr, PER_ROW: tl.constexpr,
    GATED: tl.constexpr, LOW: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `multiply_rows`, with weights that `decode` wrote: (COUNT, 2 if GATED else 1, N, K), experts from FIRST on.

    N and K are no constants, because bases of spectral layers differ from layer to layer. TRANSPOSED weights are
    (COUNT, K, N); they are not GATED.
    """
    expert, choice_M, col_M = rows_of(0, order, starts + FIRST, counts + FIRST, COUNT, EXPERTS, BLOCK_M)
    if expert < COUNT:
        row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_N = row < N
        x_M = x + (choice_M // PER_ROW).to(tl.int64) * K
        matrices: tl.constexpr = 2 if GATED else 1
        weights += expert.to(tl.int64) * matrices * N * K
        w_N = weights + row if TRANSPOSED else weights + row.to(tl.int64) * K
        j_K = tl.arange(0, BLOCK_K)
        acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for at in tl.range(0, K, BLOCK_K):
            here_K = at + j_K < K
            x_KM = tl.load(x_M[None, :] + (at + j_K)[:, None], mask=here_K[:, None] & col_M[None, :], other=0.0)
            mask_NK = row_N[:, None] & here_K[None, :]
            step_K = (at + j_K).to(tl.int64) * N if TRANSPOSED else at + j_K
            acc_NM = multiply(tl.load(w_N[:, None] + step_K[None, :], mask=mask_NK, other=0.0), x_KM, acc_NM)
            if GATED:
                w_NK = tl.load(w_N[:, None] + N * K + step_K[None, :], mask=mask_NK, other=0.0)
                up_NM = multiply(w_NK, x_KM, up_NM)
        mask_NM = row_N[:, None] & col_M[None, :]
        if LOW:
            low_NM = low + choice_M.to(tl.int64)[None, :] * (2 * N) + row[:, None]
            acc_NM += tl.load(low_NM, mask=mask_NM, other=0.0).to(tl.float32)
            up_NM += tl.load(low_NM + N, mask=mask_NM, other=0.0).to(tl.float32)
        if GATED:
            acc_NM = acc_NM / (1.0 + tl.exp(-acc_NM)) * up_NM
        tl.store(out + choice_M.to(tl.int64)[None, :] * N + row[:, None], acc_NM.to(out.dtype.element_ty), mask=mask_NM)


@triton.jit(do_not_specialize=["FIRST"])
def decode(
    data, table, counts, weights, FIRST,
    PROJECTIONS: tl.constexpr, POSITION: tl.constexpr, MATRICES: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Decode whole matrices, (experts, MATRICES, N, K), of experts from FIRST on that have choices.

    Program (a, b, c) writes block b of the inputs of rows from a * BLOCK_N on, of matrix c. WIDTHS as in `product`.
    """
    expert = tl.program_id(2) // MATRICES
    matrix = tl.program_id(2) % MATRICES
    if tl.load(counts + FIRST + expert) > 0:
        block = tl.program_id(1)
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_N = row < N
        facts = table + ((FIRST + expert) * PROJECTIONS + POSITION + matrix) * FACTS
        out_N = weights + tl.program_id(2).to(tl.int64) * (N * K) + row.to(tl.int64) * K
        bits = tl.load(facts + 4)
        levels = tl.load(facts + 6)
        if scalar_widths(WIDTHS) > 0:
            if levels < VECTOR:
                store_block(out_N, data, facts, block, row, row_N, K)
        for kind in tl.static_range(2, 4):
            if (WIDTHS >> (VECTOR_KINDS + kind)) & 1:
                if (bits == kind) & (levels == VECTOR):
                    store_vectors(out_N, data, facts, block, row, row_N, K, kind)
        for kind in tl.static_range(1, 5):
            if (WIDTHS >> (TRELLIS_KINDS + kind)) & 1:
                if (bits == kind) & (levels > VECTOR):
                    store_trellis(out_N, data, facts, block, row, row_N, K, kind)


@triton.jit
def store_block(out_N, data, facts, block, row, row_N, K: tl.constexpr):
    """Decode one block of 128 inputs, or the tail, of some rows."""
    at_K = block * BLOCK + tl.arange(0, 128)
    mask_NK = row_N[:, None] & (at_K < K)[None, :]
    where_NK = out_N[:, None] + at_K[None, :]
    if block < full_blocks(K):
        w_NK = block_weights(data, facts, block, row, row_N, K, True)
        tl.store(where_NK, w_NK.to(out_N.dtype.element_ty), mask=mask_NK)
    elif tail_of(K) > 0:
        w_NK = block_weights(data, facts, block, row, row_N, K, False)
        tl.store(where_NK, w_NK.to(out_N.dtype.element_ty), mask=mask_NK)


@triton.jit
def store_vectors(out_N, data, facts, block, row, row_N, K: tl.constexpr, BITS: tl.constexpr):
    """As `store_block`, for the level set "vector"."""
    DIM: tl.constexpr = dim_of(BITS)
    words_NV, here_NV = vector_words(data, facts, row, row_N, block, K, BITS)
    scale_N = vector_scales(data, facts, row, row_N)
    at_V = block * BLOCK + tl.arange(0, BLOCK // DIM) * DIM
    for place in tl.static_range(DIM):
        w_NV = vector_numbers(words_NV, here_NV, place) * scale_N[:, None]
        tl.store(out_N[:, None] + (at_V + place)[None, :], w_NV.to(out_N.dtype.element_ty), mask=here_NV)


@triton.jit(do_not_specialize=["rows", "E"])
def combine(
    parts, index, weights, out, rows, E,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (T, N) = sum over the k choices of a token and over the splits of weight * parts (SPLITS, rows, N).

    Choices of experts that do not exist (expert parallelism's sentinels) add nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    col_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_N = tl.zeros((BLOCK_N,), tl.float32)
    for j in tl.static_range(TOP_K):
        choice = token * TOP_K + j
        readable = tl.where(tl.load(index + choice) < E, N, 0)
        weight = tl.load(weights + choice).to(tl.float32)
        for split in tl.static_range(SPLITS):
            where_N = parts + (split * rows + choice) * N + col_N
            acc_N += weight * tl.load(where_N, mask=col_N < readable, other=0.0).to(tl.float32)
    tl.store(out + token * N + col_N, acc_N.to(out.dtype.element_ty), mask=col_N < N)

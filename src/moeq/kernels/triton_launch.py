"""Launches the Triton kernels; needs triton, so only `moeq.layouts.grouped.gpu` imports it, when a call asks for it.

Grids follow from shapes alone; programs without work end at once. Every launch goes through `launch`, so that the
kernels of a model can be compiled side by side before its first token (`compiling`).

Legend: T tokens, k experts per token, S = T * k choices, E experts, H hidden, I expert width, N outputs, K inputs.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import triton
from torch import Tensor

from moeq.kernels import triton_kernels as kernels
from moeq.kernels.facts import KernelFacts
from moeq.kernels.tuning import (
    DECODE_FROM,
    DECODED_BYTES,
    Tile,
    decoded_tile,
    experts_at_once,
    packed_tile,
    power_of_two,
)
from moeq.spec import BLOCK

_CHUNK = 1024
_SOME = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Choices sorted by expert, and the sums of the inputs that belong to the same launch.

    Attributes:
        order: positions of the choices, expert after expert, int32, (S,); undefined behind the last expert's.
        starts, counts: of each expert in `order`, int32, (E,).
        sums: sums of runs of inputs, float32, (rows of x, runs).
    """

    order: Tensor
    starts: Tensor
    counts: Tensor
    sums: Tensor


_only_compile: ContextVar[bool] = ContextVar("only_compile", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, or only compile it inside of `compiling`."""
    if _only_compile.get():
        kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


@contextmanager
def compiling(workers: int, done: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Inside, launches compile and do not run; at the end all kernels are there.

    Triton's passes let go of the interpreter lock, so that threads are enough.

    Args:
        workers: kernels that are compiled at a time.
        done: told of every kernel that is compiled: how many are, and how many were asked for so far.
    """
    counts = [0, 0]

    class Executor(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            counts[1] += 1
            future = super().submit(*arguments, **options)
            future.add_done_callback(tell)
            return future

    def tell(_: Any) -> None:
        counts[0] += 1
        if done is not None:
            done(*counts)

    token = _only_compile.set(True)
    try:
        mode = getattr(triton, "AsyncCompileMode", None)
        if mode is None:
            yield  # before 3.5: one after another
            return
        # What fails here is compiled again, and fails or not, when it is launched.
        options = {"ignore_errors": True} if "ignore_errors" in signature(mode).parameters else {}
        with Executor(workers) as executor, mode(executor, **options):
            yield
    finally:
        _only_compile.reset(token)


@cache
def gpu_name(device: torch.device) -> str:
    """What tables of tiles call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def prepare(x_RK: Tensor, index_S: Tensor, num_experts: int, unit: int) -> Routing:
    """Sort the choices by expert, and sum runs of `unit` inputs; without experts, only sum."""
    rows, columns = x_RK.shape
    choices = index_S.numel()
    order, starts, counts = (x_RK.new_empty(size, dtype=torch.int32) for size in (choices, num_experts, num_experts))
    sums = x_RK.new_empty((rows, columns // unit), dtype=torch.float32)
    programs = num_experts + (rows if columns >= unit else 0)
    if programs:
        launch(
            kernels.prepare, (programs,),
            index_S, order, starts, counts, x_RK, sums, choices, num_experts, K=columns, UNIT=unit, CHUNK=_CHUNK,
        )  # fmt: skip
    return Routing(order=order, starts=starts, counts=counts, sums=sums)


def multiply(
    x_RK: Tensor, routing: Routing, data: Tensor, facts: KernelFacts, tile: Tile, *,
    rows: int, outputs: int, position: int, gated: bool, unit: int, out_unit: int = 0, low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows of x times packed matrices: `kernels.multiply_rows`.

    Args:
        x_RK: rows of x, contiguous.
        routing: from `prepare`, for `x_RK`; its sums are of `unit` inputs.
        data: the blob.
        facts: of the layer.
        tile: how to cut the product.
        rows: rows of the result; a multiple of the rows of x.
        outputs: N.
        position: of the projection, the gate's if `gated`.
        gated: multiply with two projections and gate.
        unit: inputs that share a sum.
        out_unit: also return sums of this many outputs; 0 for none.
        low: what is added to gate and up before the activation, (rows, 2, N); only if `gated`.

    Returns:
        (splits, rows, N) float32, or (rows, N) in the dtype of x for one split; and the sums.
    """
    columns = x_RK.shape[1]
    num_experts = routing.counts.numel()
    shape = (rows, outputs) if tile.splits == 1 else (tile.splits, rows, outputs)
    out = x_RK.new_empty(shape, dtype=x_RK.dtype if tile.splits == 1 else torch.float32)
    sums = x_RK.new_empty((rows, outputs // out_unit if out_unit else 0), dtype=torch.float32)
    tiles = min(rows, rows // tile.rows + num_experts) if num_experts else -(-rows // tile.rows)
    if tiles:
        launch(
            kernels.multiply_rows, (tiles, -(-outputs // tile.outputs), tile.splits),
            x_RK, routing.sums, data, facts.table, routing.order, routing.starts, routing.counts,
            out if low is None else low, out, sums, rows, outputs,
            E=max(1, num_experts), EXPERTS=power_of_two(num_experts) if num_experts else 0,
            PER_ROW=max(1, rows // max(1, len(x_RK))), PROJECTIONS=facts.table.shape[1], POSITION=position,
            GATED=gated, LOW=low is not None, K=columns, MASKED=outputs % tile.outputs != 0,
            WIDTHS=facts.widths_of(position, gated=gated), SPAN=min(facts.spans[position : position + 1 + gated]),
            UNIT=unit, OUT_UNIT=out_unit,
            SPLITS=tile.splits, BLOCK_M=tile.rows, BLOCK_N=tile.outputs,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, sums


def experts(
    x_TH: Tensor, index_Tk: Tensor, weights_Tk: Tensor, data: Tensor, facts: KernelFacts, inner: int,
    low_S2I: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The routed experts of a layer with silu(gate) * up, (T, H).

    Args:
        x_TH: inputs.
        index_Tk, weights_Tk: the choices; those of experts that do not exist add nothing.
        data: the blob.
        facts: of the layer: gate, up, down.
        inner: I.
        low_S2I: what is added to gate and up of each choice before the activation.
    """
    hidden, rows = x_TH.shape[1], index_Tk.numel()
    num_experts = facts.table.shape[0]
    per_expert = -(-rows // num_experts)
    unit, down_span = min(facts.spans[:2]), facts.spans[2]
    routing = prepare(x_TH, index_Tk, num_experts, unit)
    if per_expert >= DECODE_FROM:
        inner_SI = decoded(
            x_TH, routing, data, facts, rows=rows, outputs=inner, position=0, gated=True, low=low_S2I,
        )  # fmt: skip
        parts = decoded(inner_SI, routing, data, facts, rows=rows, outputs=hidden, position=2, gated=False)
        return combine(parts, index_Tk, weights_Tk, x_TH, num_experts)
    gpu = gpu_name(x_TH.device)
    tile = packed_tile(gpu, "gated", (inner, hidden), rows, num_experts)
    out_unit = min(tile.outputs, down_span)
    inner_SI, sums = multiply(
        x_TH, routing, data, facts, tile,
        rows=rows, outputs=inner, position=0, gated=True, unit=unit, out_unit=out_unit, low=low_S2I,
    )  # fmt: skip
    down = Routing(order=routing.order, starts=routing.starts, counts=routing.counts, sums=sums)
    parts, _ = multiply(
        inner_SI, down, data, facts, packed_tile(gpu, "plain", (hidden, inner), rows, num_experts),
        rows=rows, outputs=hidden, position=2, gated=False, unit=out_unit,
    )  # fmt: skip
    return combine(parts, index_Tk, weights_Tk, x_TH, num_experts)


def decoded(
    x_RK: Tensor, routing: Routing, data: Tensor, facts: KernelFacts, *,
    rows: int, outputs: int, position: int, gated: bool, low: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `multiply` with one split, (rows, N) in the dtype of x, for many rows: some experts at a time are decoded."""
    columns, matrices = x_RK.shape[1], 1 + gated
    num_experts = facts.table.shape[0]
    out_RN = x_RK.new_empty(rows, outputs)
    chunk = min(num_experts, experts_at_once(matrices * outputs * columns * x_RK.element_size()))
    scratch = x_RK.new_empty(chunk * matrices * outputs * columns)
    for first in range(0, num_experts, chunk):
        count = min(chunk, num_experts - first)
        launch(
            kernels.decode, (-(-outputs // _SOME), -(-columns // BLOCK), count * matrices),
            data, facts.table, routing.counts, scratch, first,
            PROJECTIONS=facts.table.shape[1], POSITION=position, MATRICES=matrices,
            N=outputs, K=columns, WIDTHS=facts.widths_of(position, gated=gated), BLOCK_N=_SOME,
        )  # fmt: skip
        multiply_decoded(x_RK, scratch, routing, out_RN, first, count, gated=gated, low=low)
    return out_RN


def multiply_decoded(
    x_RK: Tensor, scratch: Tensor, routing: Routing, out_RN: Tensor, first: int, count: int, *,
    gated: bool = False, low: Tensor | None = None, transposed: bool = False,
) -> None:  # fmt: skip
    """Rows of x times the decoded matrices of `count` experts from `first` on: `kernels.multiply_decoded`."""
    rows, outputs = out_RN.shape
    tile = decoded_tile(gated=gated)
    launch(
        kernels.multiply_decoded, (rows // tile.rows + count, -(-outputs // tile.outputs)),
        x_RK, scratch, routing.order, routing.starts, routing.counts, out_RN if low is None else low, out_RN,
        first, outputs, x_RK.shape[1],
        COUNT=count, EXPERTS=power_of_two(count), PER_ROW=rows // len(x_RK), GATED=gated, LOW=low is not None,
        TRANSPOSED=transposed, BLOCK_M=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=DECODED_BYTES // x_RK.element_size(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def combine(parts: Tensor, index_Tk: Tensor, weights_Tk: Tensor, like_TH: Tensor, num_experts: int) -> Tensor:
    """Weight the answers, (S, H) or (splits, S, H), and add them up per token, (T, H) in the dtype of `like_TH`."""
    num_tokens, top_k = index_Tk.shape
    hidden = parts.shape[-1]
    out_TH = like_TH.new_empty(num_tokens, hidden)
    if num_tokens:
        size = min(1024, power_of_two(hidden))
        launch(
            kernels.combine, (num_tokens, -(-hidden // size)),
            parts, index_Tk, weights_Tk, out_TH, num_tokens * top_k, num_experts,
            TOP_K=top_k, SPLITS=1 if parts.dim() == 2 else len(parts), N=hidden, BLOCK_N=size,
        )  # fmt: skip
    return out_TH


def product(x_RK: Tensor, index_Tk: Tensor, data: Tensor, facts: KernelFacts, position: int, outputs: int) -> Tensor:
    """Each choice's row of x times its expert's matrix of one projection, (S, N), for families with gates of their own.

    Args:
        x_RK: (T, K), or (S, K) with a row for each choice.
        index_Tk: the choices; rows of those of experts that do not exist are zero.
        data: the blob.
        facts: of the layer.
        position: of the projection.
        outputs: N.
    """
    num_experts = facts.table.shape[0]
    rows = index_Tk.numel()
    unit = facts.spans[position]
    routing = prepare(x_RK, index_Tk, num_experts, unit)
    given: dict[str, Any] = {"rows": rows, "outputs": outputs, "position": position, "gated": False}
    if rows >= DECODE_FROM * num_experts:
        summed = decoded(x_RK, routing, data, facts, **given)
    else:
        tile = packed_tile(gpu_name(x_RK.device), "plain", (outputs, x_RK.shape[1]), rows, num_experts)
        out, _ = multiply(x_RK, routing, data, facts, tile, unit=unit, **given)
        summed = out.sum(0) if tile.splits > 1 else out
    here_S1 = (index_Tk.reshape(-1) < num_experts).unsqueeze(-1)
    return torch.where(here_S1, summed, 0).to(x_RK.dtype)


def linear(x_RK: Tensor, data: Tensor, facts: KernelFacts, outputs: int) -> Tensor:
    """x W^T, (R, N), for one packed W (N, K)."""
    unit = facts.spans[0]
    nobody = x_RK.new_empty(0, dtype=torch.int64)
    routing = prepare(x_RK, nobody, 0, unit)
    tile = packed_tile(gpu_name(x_RK.device), "linear", (outputs, x_RK.shape[1]), len(x_RK), 1)
    out, _ = multiply(
        x_RK, routing, data, facts, tile, rows=len(x_RK), outputs=outputs, position=0, gated=False, unit=unit
    )
    return out if tile.splits == 1 else out.sum(0).to(x_RK.dtype)

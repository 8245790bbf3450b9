"""What is not packed by torch and by our kernels, and many tokens in integers and in decoded floats, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/cpu_dense.py [--rounds 50]

Microseconds, least of the rounds, and billions of operations a second; both sides of a row are called after each other.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from moeq import native, native_dense
from moeq.layouts.known_answers import record_of, seeded
from moeq.report.tables import markdown_table
from moeq.runtime import lean
from moeq.spec import QuantSpec

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (1, 4, 16, 512)
HEADS = ((16, 16, 512), (8, 2, 512), (16, 16, 4096))
CODES = ((2, "half"), (3, "half"), (4, "asym"), (8, "half"), (2, "trellis"), (3, "trellis"))
SHAPES = ((1024, 2048), (2048, 1024))
MANY = 64


def least(rounds: int, call: Callable[[], object]) -> float:
    """Seconds of the fastest call, the first one left out."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def linears(rounds: int) -> list[tuple[str, ...]]:
    """A line for each number of tokens: torch's module and the one that is served, in both dtypes."""
    lines = []
    for tokens in TOKENS:
        row, few = [f"linear, 2048 x 2048, {tokens} tokens"], rounds if tokens < TOKENS[-1] else max(3, rounds // 10)
        for dtype in DTYPES:
            plain, ours = (nn.Linear(2048, 2048, bias=False, dtype=dtype) for _ in range(2))
            lean.lighten(nn.ModuleList([ours]))
            x_SK = torch.randn(tokens, 2048, generator=seeded(1)).to(dtype)
            row += [f"{1e6 * least(few, lambda f=each, x=x_SK: f(x)):.0f}" for each in (plain, ours)]
        lines.append(tuple(row))
    return lines


def attentions(rounds: int) -> list[tuple[str, ...]]:
    """A line for each number of heads and keys: torch's and ours, in both dtypes."""
    lines = []
    for heads, shared, keys in HEADS:
        row = [f"attention, {heads} heads of 128, {shared} of keys, {keys} keys"]
        for dtype in DTYPES:
            q = torch.randn(1, heads, 128, generator=seeded(0)).to(dtype)
            k, v = (torch.randn(1, shared, keys, 128, generator=seeded(seed)).to(dtype) for seed in (1, 2))
            calls = (
                lambda q=q[:, :, None], k=k, v=v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                lambda q=q, k=k, v=v: native_dense.attention(q, k, v, None, 128**-0.5),
            )
            row += [f"{1e6 * least(rounds, call):.0f}" for call in calls]
        lines.append(tuple(row))
    return lines


def many(rounds: int) -> list[tuple[str, ...]]:
    """A line for each matrix and kind of codes: integers, and decoded."""
    lines = []
    for shape in SHAPES:
        operations = 2 * MANY * shape[0] * shape[1] / 1e9
        x_SK = torch.randn(MANY, shape[1], generator=seeded(1))
        for bits, levels in CODES:
            spec = QuantSpec(bits=bits, levels=levels, group_size=128)
            record = record_of(spec, shape, seeded(0))
            calls = (
                lambda r=record, s=spec, n=shape, x=x_SK: native.linear(r, s, n, x),
                lambda r=record, s=spec, n=shape, x=x_SK: torch.mm(x, native.decode_matrix(r, s, n).T),
            )
            rates = (f"{operations / least(max(5, rounds // 5), call):.0f}" for call in calls)
            lines.append((f"{shape[0]} x {shape[1]}", f"{bits} bits, {levels}", *rates))
    return lines


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    with torch.inference_mode():
        header = ("call", "torch, float32", "ours", "torch, bfloat16", "ours")
        print(markdown_table(header, linears(args.rounds) + attentions(args.rounds)))
        print(markdown_table(("matrix", "codes", "integers", "decoded"), many(args.rounds)))


if __name__ == "__main__":
    main()

"""Products of trellises against those of plain codes of the same width: ratios of time inside one run.

    OMP_NUM_THREADS=1 python benchmarks/cpu_trellis.py [--rounds 40]

Both are called in turn on matrices in the cache; the ratio is the median over rounds. Then on half a gigabyte of
matrices, one after the other, as a model that is larger than the cache is read. Quantizing is timed on the same matrix,
all else equal.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from moeq import native
from moeq.layouts.known_answers import record_of, seeded
from moeq.quantizers.registry import make_quantizer
from moeq.report.tables import markdown_table
from moeq.spec import QuantSpec

SHAPES = ((768, 2048), (2048, 768))
WIDTHS = (1, 2, 3, 4)
REPEAT = 5
LARGE = (4096, 4096)
MEMORY = 512 << 20
"""Bytes of matrices that are read in turn."""


def seconds(call: Callable[[], object]) -> float:
    """Of some calls."""
    start = time.perf_counter()
    for _ in range(REPEAT):
        call()
    return time.perf_counter() - start


def ratio(rounds: int, ours: Callable[[], object], plain: Callable[[], object]) -> str:
    """Median over rounds of ours / plain."""
    return f"{statistics.median(seconds(ours) / seconds(plain) for _ in range(rounds)):.2f}"


def products(rounds: int) -> list[tuple[str, ...]]:
    """A line for each shape and width."""
    lines = []
    for shape in SHAPES:
        for bits in WIDTHS:
            generator, found = seeded(bits), []
            specs = QuantSpec(bits=bits, levels="trellis"), QuantSpec(bits=bits, levels="half")
            records = [record_of(spec, shape, generator) for spec in specs]
            for isa in [isa for isa in native.isas() if isa != "base"]:
                for tokens in (1, 4):
                    x_SK = torch.randn(tokens, shape[1], generator=generator)
                    calls = [
                        lambda record=record, spec=spec, x_SK=x_SK, isa=isa, shape=shape: native.linear(
                            record, spec, shape, x_SK, isa=isa
                        )
                        for record, spec in zip(records, specs, strict=True)
                    ]
                    found.append(ratio(rounds, *calls))
            lines.append((f"{shape[0]} x {shape[1]}", str(bits), *found))
    return lines


def from_memory(rounds: int) -> list[tuple[str, ...]]:
    """A line for each width: one token through as many matrices as no cache holds."""
    lines = []
    x_SK = torch.randn(1, LARGE[1], generator=seeded(0))
    for bits in WIDTHS:
        generator, passes = seeded(bits), []
        for spec in (QuantSpec(bits=bits, levels="trellis"), QuantSpec(bits=bits, levels="half")):
            record = record_of(spec, LARGE, generator)
            store = record.repeat(MEMORY // record.numel()).view(-1, record.numel())

            def once(store: torch.Tensor = store, spec: QuantSpec = spec) -> None:
                for each in store:
                    native.linear(each, spec, LARGE, x_SK)

            passes.append(once)
        timed = [[_once(call) for call in passes] for _ in range(max(3, rounds // 8))]
        share = statistics.median(ours / plain for ours, plain in timed)
        rates = [MEMORY / statistics.median(row[at] for row in timed) / 1e9 for at in (0, 1)]
        lines.append((str(bits), f"{share:.2f}", *(f"{rate:.1f}" for rate in rates)))
    return lines


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    columns = [f"{isa}, {tokens}" for isa in native.isas() if isa != "base" for tokens in (1, 4)]
    print(markdown_table(("matrix", "bits", *columns), products(args.rounds)))
    header = ("bits", "from memory, trellis / plain", "trellis GB/s", "plain GB/s")
    print(markdown_table(header, from_memory(args.rounds)))
    w_NK, x_SK = torch.randn(768, 1024, generator=seeded(0)), torch.randn(4096, 1024, generator=seeded(1))
    hessian_KK = x_SK.T @ x_SK
    trellis, gptq = make_quantizer("trellis", gain=True), make_quantizer("gptq", gain=True)
    lines = []
    for bits in WIDTHS:
        ours, plain = QuantSpec(bits=bits, levels="trellis"), QuantSpec(bits=bits, levels="half")
        found = ratio(
            3,
            lambda ours=ours: trellis.quantize(w_NK, ours, hessian_KK),
            lambda plain=plain: gptq.quantize(w_NK, plain, hessian_KK),
        )
        lines.append((str(bits), found))
    print(markdown_table(("bits", "quantizing, trellis / gptq"), lines))


if __name__ == "__main__":
    main()

"""The CPU kernels against memory bandwidth, ggml, torch and transformers.

    python benchmarks/cpu.py --output benchmarks/cpu.md [--ggml DIR] [--packed DIR --source DIR] [--only PART,...]

PART: kernels, mixed, rivals, prefill, model. DIR of --ggml holds libggml-base.so and libggml-cpu.so. Everything that is
compared is measured alternately in this process with the same threads (--threads, default 2); numbers are medians of
windows of a few milliseconds, ratios are those of medians. Weights rotate through a buffer of 768 MiB, more than the
last-level cache holds, and so does what the bandwidth is measured on. Codes are random; time does not depend on them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ggml_cpu import Ggml
from torch import Tensor

from moeq import native
from moeq.layouts.grouped import cpu
from moeq.layouts.grouped.packed import PackedMatrix
from moeq.report.tables import markdown_table
from moeq.spec import LEVELS, QuantSpec, stored_bytes

SHAPES = {"OLMoE": (2048, 1024, 8), "Qwen3-30B-A3B": (2048, 768, 8), "Mixtral": (4096, 14336, 2)}
WIDTHS = (1, 2, 3, 4, 6, 8)
BUFFER = 768 << 20
CLOCKS: list[Callable[[], float]] = [time.perf_counter]
"""The last one is used."""


def spec_of(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, levels="half" if bits < 3 else "asym")


def alternate(jobs: dict[str, Callable[[int], object]], windows: int) -> dict[str, float]:
    """Median seconds of each job; they take turns, the window's number is handed to them."""
    clock = CLOCKS[-1]
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for window in range(windows + 2):
        for name, job in jobs.items():
            started = clock()
            job(window)
            if window >= 2:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table_of(specs: list[QuantSpec], hidden: int, inner: int, count: int) -> tuple[Tensor, list[int]]:
    """Experts back to back, their widths in turns; their table, and where each one ends."""
    rows, ends, offset = [], [], 0
    for expert in range(count):
        spec = specs[expert % len(specs)]
        row = []
        for shape in ((inner, hidden), (inner, hidden), (hidden, inner)):
            row.append([offset, spec.bits, spec.group_size, LEVELS.index(spec.levels)])
            offset += stored_bytes(spec, shape)
        rows.append(row)
        ends.append(offset)
    return torch.tensor(rows), ends


class Layer:
    """A buffer of experts, of which every call takes the next ones."""

    def __init__(
        self, data: Tensor, specs: list[QuantSpec], hidden: int, inner: int, top_k: int, tokens: int = 1
    ) -> None:
        size = sum(
            stored_bytes(spec, (inner, hidden)) * 2 + stored_bytes(spec, (hidden, inner)) for spec in specs
        ) / len(specs)
        self.data, self.inner = data, inner
        self.chosen = top_k * tokens
        self.calls = max(1, int(BUFFER / size) // self.chosen)
        self.table, ends = table_of(specs, hidden, inner, self.calls * self.chosen)
        self.bytes = ends[-1] // self.calls
        self.x, self.weight = torch.randn(tokens, hidden), torch.full((tokens, top_k), 1 / top_k)
        self.shape = tokens, top_k

    def __call__(self, window: int) -> None:
        first = window % self.calls * self.chosen
        index = torch.arange(first, first + self.chosen).view(self.shape)
        native.experts(self.data, self.table, self.inner, self.x, index, self.weight)


class Read:
    """Reads as many bytes as a layer does, each time others."""

    def __init__(self, data: Tensor, size: int) -> None:
        self.data, self.size = data, min(size, data.numel())
        self.calls = data.numel() // self.size

    def __call__(self, window: int) -> None:
        # Half the buffer away from what the layer has just read.
        at = (window + self.calls // 2) % self.calls * self.size
        native.read_bandwidth(self.data[at : at + self.size])


def kernels(data: Tensor, windows: int) -> str:
    rows = []
    for name, (hidden, inner, top_k) in SHAPES.items():
        for bits in WIDTHS:
            layer = Layer(data, [spec_of(bits)], hidden, inner, top_k)
            four = Layer(data, [spec_of(bits)], hidden, inner, top_k, tokens=4)
            jobs = {"layer": layer, "read": Read(data, layer.bytes)}
            if four.bytes <= BUFFER // 2 and four.calls > 1:
                jobs["four"] = four
            found = alternate(jobs, windows)
            ratio = found["four"] / (4 * found["layer"]) if "four" in found else None
            rows.append(
                (
                    name,
                    bits,
                    f"{layer.bytes / found['layer'] / 1e9:.1f}",
                    f"{layer.bytes / found['read'] / 1e9:.1f}",
                    f"{found['read'] / found['layer']:.0%}",
                    "-" if ratio is None else f"{ratio:.2f}",
                )
            )
            print(*rows[-1], file=sys.stderr)
    head = ("shape", "bits", "packed GB/s", "read GB/s", "share", "4 tokens / 4 x 1 token")
    return markdown_table(head, rows)


def mixed(data: Tensor, windows: int) -> str:
    rows = []
    for name, (hidden, inner, top_k) in SHAPES.items():
        if top_k < 4:
            continue
        for widths in ((1, 3), (2, 3), (1, 2, 3, 2), (2, 4, 8, 3)):
            together = Layer(data, [spec_of(bits) for bits in widths], hidden, inner, top_k)
            alone = {str(bits): Layer(data, [spec_of(bits)], hidden, inner, top_k) for bits in sorted(set(widths))}
            found = alternate({"mixed": together, **alone}, windows)
            speed = together.bytes / found["mixed"]
            # What a uniform layer of these bytes would take, width by width.
            expected = sum(found[str(bits)] for bits in widths) / len(widths)
            rows.append((name, "+".join(map(str, widths)), f"{speed / 1e9:.1f}", f"{expected / found['mixed']:.0%}"))
            print(*rows[-1], file=sys.stderr)
    return markdown_table(("shape", "bits of the experts, in turns", "packed GB/s", "speed / that of its parts"), rows)


def rivals(data: Tensor, windows: int, directory: Path | None, threads: int) -> str:
    columns, inner = 4096, 14336
    ggml = Ggml(directory) if directory is not None else None
    rows = []
    cases = (("q2_K", 2), ("iq2_xs", 2), ("q3_K", 3), ("q4_K", 4), ("bf16", 8), ("torch int4", 4))
    for kind, bits in cases:
        if ggml is None and kind != "torch int4":
            continue
        spec = spec_of(bits)
        size = stored_bytes(spec, (inner, columns))
        count = BUFFER // size
        x = torch.randn(1, columns)

        def ours(window: int, *, spec: QuantSpec = spec, size: int = size, count: int = count, x: Tensor = x) -> None:
            at = window % count * size
            native.linear(data[at : at + size], spec, (inner, columns), x)

        jobs: dict[str, Callable[[int], object]] = {"ours": ours}
        copies = 4
        if kind == "torch int4":
            jobs["theirs"] = torch_int4(columns, inner)
            their_bytes, copies = inner * columns // 2 + inner * columns // 128 * 4, 1
        else:
            assert ggml is not None
            their_bytes = ggml.prepare(kind, inner, columns, copies)
            jobs["theirs"] = lambda _window: ggml.run(threads)
        jobs["read"] = Read(data, size)
        found = alternate(jobs, windows)
        flops = 2 * inner * columns
        theirs = found["theirs"] / copies
        rows.append(
            (
                kind,
                f"{8 * their_bytes / inner / columns:.2f}",
                f"{flops / theirs / 1e9:.0f}",
                f"{bits} ({8 * size / inner / columns:.2f})",
                f"{flops / found['ours'] / 1e9:.0f}",
                f"{theirs / found['ours']:.2f}",
                f"{found['read'] / found['ours']:.0%}",
            )
        )
        print(*rows[-1], file=sys.stderr)
    if ggml is not None:
        ggml.close()
    head = ("theirs", "bits/weight", "GFLOP/s", "moeq bits (stored)", "GFLOP/s", "ratio", "share of read bandwidth")
    return markdown_table(head, rows)


def torch_int4(columns: int, rows: int) -> Callable[[int], object]:
    """torch's own product with 4-bit weights, groups of 128, bfloat16 activations."""
    group, copies = 128, 8
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    all_packed = [packed.clone() for _ in range(copies)]
    scales = torch.rand(columns // group, rows, 2).bfloat16()
    x = torch.randn(1, columns).bfloat16()
    return lambda window: torch.ops.aten._weight_int4pack_mm_for_cpu(x, all_packed[window % copies], group, scales)


def prefill(data: Tensor, windows: int) -> str:
    rows = []
    for name, (hidden, inner, _) in SHAPES.items():
        for tokens, bits in ((128, 2), (128, 3), (128, 4), (512, 3)):
            spec, shape = spec_of(bits), (inner, hidden)
            size = stored_bytes(spec, shape)
            matrix = PackedMatrix(record=data[:size], spec=spec, shape=shape)
            x, w = torch.randn(tokens, hidden), torch.randn(inner, hidden)
            jobs = {
                "ours": lambda _, x=x, matrix=matrix: cpu.linear(x, matrix),
                "torch": lambda _, x=x, w=w: torch.nn.functional.linear(x, w),
            }
            narrow_x, narrow_w = x.bfloat16(), w.bfloat16()
            if name != "Mixtral":  # seconds for each product
                jobs["bf16"] = lambda _, x=narrow_x, w=narrow_w: torch.nn.functional.linear(x, w)
            found = alternate(jobs, max(5, windows // 6))
            flops = 2 * tokens * hidden * inner
            rows.append(
                (
                    name,
                    tokens,
                    bits,
                    f"{flops / found['ours'] / 1e9:.0f}",
                    f"{flops / found['torch'] / 1e9:.0f}",
                    f"{flops / found['bf16'] / 1e9:.0f}" if "bf16" in found else "-",
                    f"{found['torch'] / found['ours']:.0%}",
                )
            )
            print(*rows[-1], file=sys.stderr)
    head = ("shape", "tokens", "bits", "GFLOP/s", "torch float32", "torch bfloat16", "share of float32")
    return markdown_table(head, rows)


MODEL = """
import json, sys, time
from pathlib import Path
import torch
import moeq
from moeq.stages.bench import _peak_rss
directory, threads, dtype, prompt, new = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
if dtype == "packed":
    from moeq.stages import bench
    report = bench.run(directory, prompt_tokens=prompt, new_tokens=new, threads=threads)
    from moeq import codec
    print(json.dumps(codec.encode(report)))
else:
    from transformers import AutoModelForCausalLM
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    load = time.perf_counter() - started
    with torch.inference_mode():
        ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
        times = []
        for _ in range(2):
            started = time.perf_counter()
            out = model(input_ids=ids, use_cache=True)
            times.append(time.perf_counter() - started)
        token, cache, steps = out.logits[:, -1:].argmax(-1), out.past_key_values, []
        for _ in range(new):
            started = time.perf_counter()
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            steps.append(time.perf_counter() - started)
    print(json.dumps({"load_seconds": load, "prefill_tokens_per_second": prompt / min(times),
                      "decode_tokens_per_second": 1 / sorted(steps)[new // 2], "peak_rss": _peak_rss()}))
"""


def model(packed: Path, source: Path, threads: int, dtypes: list[str], prompt: int, new: int) -> str:
    import json

    rows = []
    for directory, dtype in ((packed, "packed"), *((source, dtype) for dtype in dtypes), (packed, "packed")):
        done = subprocess.run(
            [sys.executable, "-c", MODEL, str(directory), str(threads), dtype, str(prompt), str(new)],
            stdout=subprocess.PIPE,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        share = found.get("roofline_share")
        rows.append(
            (
                dtype,
                f"{found['load_seconds']:.2f}",
                f"{found['prefill_tokens_per_second']:.0f}",
                f"{found['decode_tokens_per_second']:.2f}",
                "-" if share is None else f"{share:.0%} ({found['read_bandwidth'] / 1e9:.1f} GB/s)",
                f"{found['peak_rss'] / 2**30:.2f}",
                ", ".join(f"{name} {part:.0%}" for name, part in found.get("shares", {}).items()) or "-",
            )
        )
        print(*rows[-1], file=sys.stderr)
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors")) / 2**30
    head = ("weights", "load s", "prefill tokens/s", "decode tokens/s", "of roofline", "peak GiB", "time of a token")
    return markdown_table(head, rows) + f"\n\nPacked weight files: {size:.2f} GiB."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--only", default="kernels,mixed,rivals,prefill,model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--cpu-time", action="store_true", help="processor time / threads: for busy machines")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        CLOCKS.append(lambda: time.process_time() / args.threads)
    torch.manual_seed(0)
    # Bytes that are finite positive numbers wherever a scale is read.
    data = torch.randint(0, 0x3C, (BUFFER,), dtype=torch.uint8)
    parts = args.only.split(",")
    text = [f"{args.threads} threads, load average before {os.getloadavg()[0]:.1f}"]
    for name, title, make in (
        ("kernels", "Layers of experts, one token", lambda: kernels(data, args.windows)),
        ("mixed", "Mixed widths", lambda: mixed(data, args.windows)),
        ("rivals", "Matrix times vector, 14336 x 4096", lambda: rivals(data, args.windows, args.ggml, args.threads)),
        ("prefill", "Many tokens of one expert", lambda: prefill(data, args.windows)),
        (
            "model",
            "Whole model",
            lambda: model(
                args.packed, args.source, args.threads, args.dtypes.split(","), args.prompt_tokens, args.new_tokens
            ),
        ),
    ):
        if name in parts and (name != "model" or args.packed is not None):
            text.append(f"## {title}\n\n{make()}")
    text.append(f"Load average after {os.getloadavg()[0]:.1f}.")
    document = "\n\n".join(text) + "\n"
    if args.output is None:
        print(document)
    else:
        args.output.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()

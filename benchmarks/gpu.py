"""The Triton kernels on a GPU: correctness, time, share of the copy bandwidth, against bfloat16 grouped_mm.

    python benchmarks/gpu.py                      # checks, times and writes benchmarks/gpu.md
    python benchmarks/gpu.py --quick              # two shapes, 3 bits and mixed: what targets ask for
    python benchmarks/gpu.py --tune tiles.json    # looks for better tiles first and writes them down; compiles for long
    python benchmarks/gpu.py --smoke              # tiny shapes, no times: does this script still run? On a CPU with
                                                  # TRITON_INTERPRET=1

Layers have random codes in groups of 128. One CUDA graph runs several copies of a layer after one another, so that the
weights come from memory and not from the second-level cache; times are medians of replays, divided by the copies.
Answers on tiny shapes are checked before anything is timed. The page is written again after every row: what was
measured is kept whatever happens later, and `--minutes` stops between rows. Without a GPU the page says "not yet
measured" and nothing else. It needs torch with CUDA, triton and transformers; PYTHONPATH=src will do to find moeq.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_layouts
import torch
from gpu_model import decode_rows
from torch import Tensor
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq.kernels import gpu, reference, tuning
from moeq.kernels.packed import PackedLayer, kernel_facts
from moeq.report.tables import markdown_table
from moeq.spec import QuantSpec, sections

SHAPES = {
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE": (2048, 1024, 64, 8),
    "Mixtral": (4096, 14336, 8, 2),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
}
"""hidden, inner, experts, experts per token."""
SMOKE = {"smoke": (128, 128, 2, 2)}
PLANS = {"2": (2,), "3": (3,), "4": (4,), "mixed 2, 3, 4": (2, 3, 4)}
"""Widths, dealt to the matrices in turn: the mixed plan has the bytes of 3 bits."""
TOKENS = (1, 4, 16, 64, 512, 4096)
CACHE_BYTES = 1 << 28
"""Several times the second-level cache."""
NOTE = "not yet measured"
PAGE = Path(__file__).with_name("gpu.md")
INTRO = """# GPU kernels

Made by `python benchmarks/gpu.py`, which needs a CUDA device. {where}

Times are of a whole layer of experts, with sorting and weighting, in microseconds. GB/s count the packed bytes of the
experts that were chosen; "of copy" compares them with what a copy moves, read and written bytes together.

Targets: "of copy" at least 60 % for Mixtral's shape with 1 to 8 tokens; faster than bfloat16 `grouped_mm` below 64
tokens; the mixed plan at least 90 % as fast as 3 bits, which has as many bytes; at 4096 tokens at least 70 % of the
speed of `grouped_mm`.
"""
LAYOUTS = """Experts of 3 bits, stored as `grouped`, as `spectral` components of 0, 2, 3 and 4 bits in 8-bit bases with
as many bytes, and as `tiled` residuals: the same grouped records with factors of rank {rank} added for gate and up.
"Ratio" is the time over that of `grouped` in the same row. From 512 rows per expert on both layouts run on the torch
reference, which decodes each expert once; that is not timed. Sums of components scale and round every weight before the
product, unlike the products of grouped records.
"""
QUICK_SHAPES = ("Mixtral", "Qwen3-30B-A3B")
QUICK_PLANS = ("3", "mixed 2, 3, 4")
QUICK_TOKENS = (1, 4, 64, 4096)
LAYOUT_TOKENS = (1, 4, 16, 64)
LAYOUT_COLUMNS = (
    "shape", "tokens", "grouped us", "spectral us", "ratio", "tiled us", "ratio", "error of spectral", "error of tiled",
)  # fmt: skip
COLUMNS = ("shape", "bits", "tokens", "packed us", "bf16 us", "speed-up", "GB/s", "of copy", "error")


def random_layer(shape: tuple[int, int, int, int], widths: tuple[int, ...], device: torch.device) -> PackedLayer:
    hidden, inner, num_experts, _ = shape
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    entries, offset = [], 0
    for expert in range(num_experts):
        row = []
        for position, each in enumerate(shapes.values()):
            width = widths[(expert + position) % len(widths)]
            spec = QuantSpec(bits=width, levels="half" if width <= 2 else "asym")
            row.append((offset, spec))
            offset += sections(spec, each).total
        entries.append(tuple(row))
    data = torch.randint(0, 256, (offset,), dtype=torch.uint8, device=device)
    for row in entries:
        for (start, spec), each in zip(row, shapes.values(), strict=True):
            at, size = sections(spec, each).scales
            scales = data[start + at : start + at + size].view(torch.float16)
            scales.uniform_(0.5, 1.0).mul_(2 * each[1] ** -0.5 / 2**spec.bits)
    facts = kernel_facts(entries, list(shapes.values()), torch.device(device))
    return PackedLayer(data=data, entries=tuple(entries), shapes=shapes, facts=facts)


def module_of(shape: tuple[int, int, int, int]) -> MixtralExperts:
    hidden, inner, num_experts, top_k = shape
    with torch.device("meta"):
        config = AutoConfig.for_model(
            "mixtral", hidden_size=hidden, intermediate_size=inner,
            num_local_experts=num_experts, num_experts_per_tok=top_k,
        )  # fmt: skip
        return MixtralExperts(config)


def dense_call(shape: tuple[int, int, int, int], arguments: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """One layer in bfloat16 by grouped_mm."""
    hidden, inner, num_experts, top_k = shape
    x_TH, index_Tk, weights_Tk = arguments
    fused = torch.randn(num_experts, 2 * inner, hidden, device=x_TH.device, dtype=x_TH.dtype) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inner, device=x_TH.device, dtype=x_TH.dtype) * inner**-0.5
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def call() -> Tensor:
        flat = index_Tk.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.searchsorted(flat[order], torch.arange(num_experts, device=flat.device), right=True).int()
        gate, up = grouped_mm(x_TH[order // top_k], fused.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
        out = out * weights_Tk.reshape(-1)[order].unsqueeze(-1).to(out.dtype)
        return torch.zeros_like(x_TH).index_add_(0, order // top_k, out)

    return call


def microseconds(calls: list[Callable[[], object]], replays: int = 30) -> float:
    """The median time of one of `calls`, run one after another in one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times[3:]) / len(calls)


def copy_gigabytes(device: torch.device) -> float:
    """GB/s of a copy, read and written bytes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / 1000 / microseconds([lambda: target.copy_(source)])


def choices(shape: tuple[int, int, int, int], tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    hidden, _, num_experts, top_k = shape
    x_TH = torch.randn(tokens, hidden, device=device).bfloat16()
    index_Tk = torch.rand(tokens, num_experts, device=device).topk(top_k).indices
    return x_TH, index_Tk, torch.rand(tokens, top_k, device=device).softmax(-1)


def chosen_bytes(layer: PackedLayer, index_Tk: Tensor) -> int:
    experts = set(index_Tk.reshape(-1).tolist())
    return sum(
        sections(spec, shape).total
        for expert in experts
        for (_, spec), shape in zip(layer.entries[expert], layer.shapes.values(), strict=True)
    )


def error_of(layer: PackedLayer, module: MixtralExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> float:
    """Relative error of the call against the torch reference in float32, over at most 16 of its tokens."""
    answer = gpu.run_experts(module, layer, *arguments)[:16].float()
    x_TH, index_Tk, weights_Tk = (argument[:16] for argument in arguments)
    wanted = reference.experts(module, layer, x_TH.float(), index_Tk, weights_Tk)
    error = ((answer - wanted).norm() / wanted.norm()).item()
    if not error < 2e-2:
        raise SystemExit(f"wrong: relative error {error:.2g}")
    return error


def tune_layer(
    shape: tuple[int, int, int, int], tokens: int, calls: list[Callable[[], object]]
) -> dict[str, tuning.Tile]:
    """The best tiles of a layer's two products, with the weights from memory as in the measurement itself."""
    hidden, inner, num_experts, top_k = shape
    if tuning.experts_at_once(-(-tokens * top_k // num_experts), 1):
        return {}  # decoded first: these tiles are not used

    def seconds() -> float:
        try:
            return microseconds(calls, replays=13) / 1e6
        except Exception as error:  # a tile that needs more shared memory or registers than there are
            print(f"  left out: {type(error).__name__}", file=sys.stderr)
            return float("inf")

    name = torch.cuda.get_device_name()
    products = (name, "gated", (inner, hidden), tokens * top_k, num_experts), (
        name, "plain", (hidden, inner), tokens * top_k, num_experts,
    )  # fmt: skip
    return {tuning.key(*product): tuning.tune(*product, seconds) for product in products}


def measure(
    tune: Path | None, device: torch.device, copy: float, rows: list[tuple[object, ...]], keep: Callable[[], None], *,
    quick: bool, until: float,
) -> None:  # fmt: skip
    """Append rows of the page to `rows` and call `keep` after each, until time.monotonic() says `until`."""
    tiles: dict[str, tuning.Tile] = {}
    for name in QUICK_SHAPES if quick else SHAPES:
        shape = SHAPES[name]
        module = module_of(shape)
        dense_times: dict[int, float] = {}
        for plan in QUICK_PLANS if quick else PLANS:
            widths = PLANS[plan]
            first = random_layer(shape, widths, device)
            for tokens in QUICK_TOKENS if quick else TOKENS:
                if time.monotonic() > until:
                    print("out of time", flush=True)
                    return
                arguments = choices(shape, tokens, device)
                used = chosen_bytes(first, arguments[1])
                copies = max(1, min(16, CACHE_BYTES // used))
                layers = [first, *(random_layer(shape, widths, device) for _ in range(copies - 1))]

                def call(layer: PackedLayer, arguments: tuple[Tensor, Tensor, Tensor] = arguments) -> Tensor:
                    return gpu.run_experts(module, layer, *arguments)  # noqa: B023

                each = [lambda layer=layer: call(layer) for layer in layers]
                if tune is not None and plan == "3":
                    tiles |= tune_layer(shape, tokens, each)
                    tuning.save(tune, tiles)
                error = error_of(first, module, arguments)
                packed = microseconds(each)
                if tokens not in dense_times:
                    dense_copies = 1 if shape[1] > 4096 else 4
                    dense_times[tokens] = microseconds([dense_call(shape, arguments) for _ in range(dense_copies)])
                speed = used / packed / 1000
                rows.append((
                    name, plan, tokens, f"{packed:.1f}", f"{dense_times[tokens]:.1f}",
                    f"{dense_times[tokens] / packed:.2f}", f"{speed:.0f}", f"{speed / copy:.0%}", f"{error:.1e}",
                ))  # fmt: skip
                print(*rows[-1], flush=True)
                keep()
                del layers, each


def measure_layouts(
    device: torch.device, rows: list[tuple[object, ...]], keep: Callable[[], None], until: float
) -> None:
    """As `measure`: one measurement of each layout after another, three times, medians."""
    for name, shape in SHAPES.items():
        module = module_of(shape)
        first = gpu_layouts.trio(shape, random_layer(shape, (3,), device))
        for tokens in LAYOUT_TOKENS:
            if time.monotonic() > until:
                print("out of time", flush=True)
                return
            arguments = choices(shape, tokens, device)
            used = chosen_bytes(first.grouped, arguments[1])
            copies = max(1, min(16, CACHE_BYTES // used))
            more = (gpu_layouts.trio(shape, random_layer(shape, (3,), device)) for _ in range(copies - 1))
            named = [gpu_layouts.calls(module, layers, arguments) for layers in (first, *more)]
            errors = gpu_layouts.errors(module, first, arguments)
            runs = [{key: microseconds([each[key] for each in named]) for key in named[0]} for _ in range(3)]
            grouped, spectral, tiled = (statistics.median(run[key] for run in runs) for key in named[0])
            rows.append((
                name, tokens, f"{grouped:.1f}", f"{spectral:.1f}", f"{spectral / grouped:.2f}",
                f"{tiled:.1f}", f"{tiled / grouped:.2f}", *(f"{error:.1e}" for error in errors),
            ))  # fmt: skip
            print(*rows[-1], flush=True)
            keep()
            del named


def smoke() -> None:
    """Everything that needs no clock, on tiny shapes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape in SMOKE.values():
        layers, arguments = gpu_layouts.trio(shape, random_layer(shape, (3,), device)), choices(shape, 2, device)
        module = module_of(shape)
        errors = gpu_layouts.errors(module, layers, arguments)
        print("spectral, tiled", *(f"error {error:.1e}" for error in errors))
        print(*(tuple(call().shape) for call in gpu_layouts.calls(module, layers, arguments).values()))
        for widths in PLANS.values():
            layer, arguments = random_layer(shape, widths, device), choices(shape, 2, device)
            print(
                widths, f"error {error_of(layer, module_of(shape), arguments):.1e}", chosen_bytes(layer, arguments[1])
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--tune", type=Path, metavar="FILE", help="time candidates for tiles and write the best")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="use the tiles of an earlier --tune")
    parser.add_argument("--quick", action="store_true", help="only what the targets ask for; no layouts, no model")
    parser.add_argument(
        "--minutes", type=float, help="start no row after this time (default: 4 with --quick, else none)"
    )
    parser.add_argument("--smoke", action="store_true", help="only run the checks, on tiny shapes")
    options = parser.parse_args()
    if options.smoke:
        smoke()
        return
    if options.tiles:
        tuning.use(options.tiles)
    if not torch.cuda.is_available():
        rows = [(name, plan, tokens, *[NOTE] * 6) for name in SHAPES for plan in PLANS for tokens in TOKENS]
        layouts = [(name, tokens, *[NOTE] * 7) for name in SHAPES for tokens in LAYOUT_TOKENS]
        model = [(name, NOTE, NOTE) for name in ("bfloat16, grouped_mm", "3 bits, Triton")]
        write(options.output, "No GPU was at hand: every time below is still to be measured.", rows, layouts, model)
        return
    minutes = options.minutes or (4.0 if options.quick else float("inf"))
    run(options.output, options.tune, quick=options.quick, until=time.monotonic() + 60 * minutes)


def run(output: Path, tune: Path | None, *, quick: bool, until: float) -> None:
    """Check, time, and keep the page up to date."""
    import triton

    device = torch.device("cuda")
    smoke()
    copy = copy_gigabytes(device)
    where = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"a copy moves {copy:.0f} GB/s."
    )
    print(where, flush=True)
    rows: list[tuple[object, ...]] = []
    layouts: list[tuple[object, ...]] = []
    model: list[tuple[object, ...]] = []

    def keep() -> None:
        write(output, where, rows, layouts, model)

    measure(tune, device, copy, rows, keep, quick=quick, until=until)
    if quick:
        return
    measure_layouts(device, layouts, keep, until)
    if time.monotonic() < until:
        model += decode_rows(lambda shape: random_layer(shape, (3,), device), device)
        keep()


def write(
    output: Path, where: str, rows: list[tuple[object, ...]], layouts: list[tuple[object, ...]],
    model: list[tuple[object, ...]],
) -> None:  # fmt: skip
    text = INTRO.format(where=where)
    text += "\n## Layers\n\n" + markdown_table(COLUMNS, rows)
    text += (
        "\n\n## Layouts\n\n" + LAYOUTS.format(rank=gpu_layouts.RANK) + "\n" + markdown_table(LAYOUT_COLUMNS, layouts)
    )
    text += "\n\n## A model of OLMoE's shape, one token at a time, one CUDA graph\n\n"
    text += markdown_table(("experts", "ms per token", "experts' bytes"), model) + "\n"
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

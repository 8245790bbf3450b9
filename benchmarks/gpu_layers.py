"""Layers of experts on a GPU against bfloat16 grouped_mm and the copy bandwidth, for benchmarks/gpu.py.

Layers have random codes in groups of 128. One CUDA graph runs several copies of a layer after one another, so that the
weights come from memory and not from the second-level cache; times are medians of replays, divided by the copies.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_layouts
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq.kernels import tuning
from moeq.layouts.grouped import gpu, reference
from moeq.layouts.grouped.packed import PackedLayer, kernel_facts
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
QUICK_SHAPES = ("Mixtral", "Qwen3-30B-A3B")
QUICK_PLANS = ("3", "mixed 2, 3, 4")
QUICK_TOKENS = (1, 4, 8, 64, 4096)
LAYOUT_TOKENS = (1, 4, 16, 64, 4096)
Shape = tuple[int, int, int, int]


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
    """The median time of one of `calls`, run one after another in one CUDA graph; without a GPU they only run."""
    for call in calls:
        call()
    if torch.version.cuda is None:
        return float("nan")
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
        raise RuntimeError(f"wrong: relative error {error:.2g}")
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


def rows(
    device: torch.device, *, smoke: bool, quick: bool, until: float, tune: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each shape, plan and number of tokens, while time.monotonic() is below `until`."""
    tiles: dict[str, tuning.Tile] = {}
    copy = float("nan") if smoke else copy_gigabytes(device)
    yield {"what": "copy bandwidth", "GB/s": copy}
    shapes = SMOKE if smoke else {name: SHAPES[name] for name in (QUICK_SHAPES if quick else SHAPES)}
    for name, shape in shapes.items():
        module = module_of(shape)
        dense_times: dict[int, float] = {}
        for plan in QUICK_PLANS if quick or smoke else PLANS:
            first = random_layer(shape, PLANS[plan], device)
            for tokens in (1, 4) if smoke else QUICK_TOKENS if quick else TOKENS:
                if time.monotonic() > until:
                    yield {"what": "out of time"}
                    return
                arguments = choices(shape, tokens, device)
                used = chosen_bytes(first, arguments[1])
                copies = 1 if smoke else max(1, min(16, CACHE_BYTES // used))
                layers = [first, *(random_layer(shape, PLANS[plan], device) for _ in range(copies - 1))]
                each = [partial(gpu.run_experts, module, layer, *arguments) for layer in layers]
                if tune is not None and plan == "3":
                    tiles |= tune_layer(shape, tokens, each)
                    tuning.save(tune, tiles)
                error = error_of(first, module, arguments)
                packed = microseconds(each)
                if tokens not in dense_times:
                    dense = [dense_call(shape, arguments) for _ in range(1 if shape[1] > 4096 or smoke else 4)]
                    dense_times[tokens] = microseconds(dense)
                speed = used / packed / 1000
                yield {
                    "what": f"{name}, {plan} bits, {tokens} tokens", "shape": name, "bits": plan, "tokens": tokens,
                    "packed us": packed, "bf16 us": dense_times[tokens], "speed-up": dense_times[tokens] / packed,
                    "GB/s": speed, "of copy": speed / copy, "error": error,
                }  # fmt: skip
                del layers, each


def tuned_rows(device: torch.device, *, smoke: bool, quick: bool, until: float, tune: Path) -> Iterator[dict[str, Any]]:
    """As `rows`, after looking for the best tiles, which go to the file `tune`."""
    yield from rows(device, smoke=smoke, quick=quick, until=until, tune=tune)


def layout_rows(device: torch.device, *, smoke: bool, quick: bool, until: float) -> Iterator[dict[str, Any]]:
    """As `rows`: one measurement of each layout after another, three times, medians."""
    shapes = SMOKE if smoke else {name: SHAPES[name] for name in (QUICK_SHAPES if quick else SHAPES)}
    for name, shape in shapes.items():
        module = module_of(shape)
        first = gpu_layouts.trio(shape, random_layer(shape, (3,), device))
        for tokens in (1, 4) if smoke else LAYOUT_TOKENS:
            if time.monotonic() > until:
                yield {"what": "out of time"}
                return
            arguments = choices(shape, tokens, device)
            used = chosen_bytes(first.grouped, arguments[1])
            copies = 1 if smoke else max(1, min(16, CACHE_BYTES // used))
            more = (gpu_layouts.trio(shape, random_layer(shape, (3,), device)) for _ in range(copies - 1))
            named = [gpu_layouts.calls(module, layers, arguments) for layers in (first, *more)]
            errors = gpu_layouts.errors(module, first, arguments)
            runs = [{key: microseconds([each[key] for each in named]) for key in named[0]} for _ in range(3)]
            grouped, spectral, tiled = (statistics.median(run[key] for run in runs) for key in named[0])
            yield {
                "what": f"{name}, {tokens} tokens", "shape": name, "tokens": tokens, "grouped us": grouped,
                "spectral us": spectral, "spectral ratio": spectral / grouped,
                "tiled us": tiled, "tiled ratio": tiled / grouped,
                "spectral error": errors[0], "tiled error": errors[1],
            }  # fmt: skip
            del named

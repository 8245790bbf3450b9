"""How long rounding takes on the GPU and on the CPU, side by side in one run, for benchmarks/gpu.py."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec
from moeq.transforms import shared_basis

SHAPE = (768, 2048)
"""An expert's gate of Qwen3-30B-A3B."""
WORK = ("hqq", "gptq", "vector", "basis")


def rows(device: torch.device, *, smoke: bool, quick: bool, until: float) -> Iterator[dict[str, Any]]:
    """Seconds for a matrix, or for the basis of eight experts, on either device."""
    shape = (16, 128) if smoke else SHAPE
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(shape, generator=generator)
    x_SK = torch.randn(2 * shape[1], shape[1], generator=generator)
    hessian_KK = x_SK.T @ x_SK
    for name in WORK:
        times = {}
        for place in (device, torch.device("cpu")):
            if time.monotonic() > until:
                yield {"what": name, "skipped": "out of time"}
                return
            work = _work(name, w_NK.to(place), hessian_KK.to(place))
            work()
            start = time.perf_counter()
            work()
            if torch.version.cuda is not None:
                torch.cuda.synchronize()
            times[place.type] = time.perf_counter() - start
        yield {"what": name, "GPU s": times["cuda"], "CPU s": times["cpu"], "CPU / GPU": times["cpu"] / times["cuda"]}


def _work(name: str, w_NK: Tensor, hessian_KK: Tensor) -> Callable[[], object]:
    if name == "basis":
        return lambda: shared_basis.gram([w_NK] * 8, "gate", w_NK.shape[1], w_NK.device)
    spec = QuantSpec(bits=2, group_size=-1, levels="vector") if name == "vector" else QuantSpec(bits=3)
    quantizer = make_quantizer(name)
    return lambda: quantizer.quantize(w_NK, spec, hessian_KK if quantizer.needs_hessian else None)

"""Decoding with a whole model of OLMoE's shape and random weights, for benchmarks/gpu.py."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_layers import random_layer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from moeq.arch import hooks
from moeq.layouts.grouped.packed import PackedLayer
from moeq.layouts.grouped.serving import PackedExperts
from moeq.runtime import ahead

FACTS = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
}
SMOKE = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
CONTEXT = 512
Shape = tuple[int, int, int, int]
"""hidden, inner, experts, experts per token."""


def olmoe(device: torch.device, experts: str, **changes: int) -> nn.Module:
    """A random model in bfloat16."""
    config = AutoConfig.for_model("olmoe", **(FACTS | changes))
    config._experts_implementation = experts
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def pack(model: nn.Module, make_layer: Callable[[Shape], PackedLayer]) -> int:
    """Put packed experts in the place of the model's; returns their bytes."""
    hooks.register_experts()
    config = model.config
    shape = config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok
    size = 0
    for index in range(config.num_hidden_layers):
        layer = make_layer(shape)
        handler = PackedExperts(layer.shapes)
        handler.bind(layer.data, layer.entries)
        hooks.attach_handler(hooks.strip_weights(model, f"model.layers.{index}.mlp.experts"), handler)
        size += layer.data.numel()
    return size


def step_of(model: nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
    """One token through the model; attention runs over a cache of fixed length, which each step fills by one place."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    token = torch.full((1, 1), 2, dtype=torch.long, device=device)  # 1 is OLMoE's padding, whose embedding is zero
    position = torch.tensor([CONTEXT - 2], device=device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return model(
            input_ids=token, past_key_values=cache, position_ids=position.unsqueeze(0), cache_position=position
        ).logits

    return step


def captured(step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of a step, and where it leaves its answer."""
    torch.cuda.synchronize()  # the weights are there before another stream reads them
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()
    return graph, answer


def milliseconds(step: Callable[[], torch.Tensor]) -> float:
    """The median time of a replay; without a GPU the step only runs."""
    if torch.version.cuda is None:
        step()
        return float("nan")
    graph, _ = captured(step)
    times = []
    for _ in range(50):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[5:])


def rows(device: torch.device, *, smoke: bool, quick: bool, until: float) -> Iterator[dict[str, Any]]:
    """Time of a token in bfloat16 and at 3 bits; then the first token of a process that has compiled nothing."""
    changes = SMOKE if smoke else {}
    model = olmoe(device, "grouped_mm", **changes)
    size = sum(weight.numel() * 2 for name, weight in model.named_parameters() if ".experts." in name)
    plain = milliseconds(step_of(model, device))
    yield {"what": "bfloat16, grouped_mm", "ms per token": plain, "experts' bytes": size}
    size = pack(model, lambda shape: random_layer(shape, (3,), device))
    packed = milliseconds(step_of(model, device))
    yield {"what": "3 bits, Triton", "ms per token": packed, "experts' bytes": size, "speed-up": plain / packed}
    del model
    left = until - time.monotonic()
    if smoke:
        yield {"what": "first token", **first_token(device, **changes)}
    elif left < 30:
        yield {"what": "first token", "skipped": "out of time"}
    else:
        yield {"what": "first token", **_in_a_fresh_process(left)}


def first_token(device: torch.device, **changes: int) -> dict[str, float]:
    """Seconds from a loaded model of seven widths to its first token, kernels compiled ahead as `moeq.load` does."""
    model = olmoe(device, "eager", **changes)
    pack(model, lambda shape: random_layer(shape, (1, 2, 3, 4, 5, 6, 8), device))
    start = time.perf_counter()
    ahead.compile_kernels(model)
    compiled = time.perf_counter() - start
    step_of(model, device)()
    if torch.version.cuda is not None:
        torch.cuda.synchronize()
    return {"compiled s": compiled, "first token s": time.perf_counter() - start}


def _in_a_fresh_process(seconds: float) -> dict[str, Any]:
    """`first_token` with a cache directory of Triton's own that is empty."""
    with TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            done = subprocess.run(
                [sys.executable, __file__], env=environment, timeout=seconds, capture_output=True, text=True, check=True
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"not done after {seconds:.0f} s"}
        except subprocess.CalledProcessError as error:
            return {"failed": error.stderr[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(first_token(torch.device("cuda", 0))))

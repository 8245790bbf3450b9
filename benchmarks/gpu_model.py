"""Decoding with a whole model of OLMoE's shape and random weights, for benchmarks/gpu.py."""

import statistics
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from moeq.arch import hooks
from moeq.kernels.packed import PackedLayer
from moeq.runtime.modules import PackedExperts

FACTS = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
}
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


def milliseconds(step: Callable[[], object]) -> float:
    """The median time of a replay."""
    torch.cuda.synchronize()  # the weights are there before another stream reads them
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(50):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[5:])


def decode_rows(make_layer: Callable[[Shape], PackedLayer], device: torch.device) -> list[tuple[object, ...]]:
    """Rows of the page: bfloat16, then packed."""
    model = olmoe(device, "grouped_mm")
    size = sum(weight.numel() * 2 for name, weight in model.named_parameters() if ".experts." in name)
    rows: list[tuple[object, ...]] = [("bfloat16, grouped_mm", f"{milliseconds(step_of(model, device)):.2f}", size)]
    size = pack(model, make_layer)
    rows.append(("3 bits, Triton", f"{milliseconds(step_of(model, device)):.2f}", size))
    return rows

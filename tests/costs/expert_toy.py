"""A family's own experts module with random inputs, and the slow way to measure a rounded expert.

Legend: T tokens, H hidden, k experts per token, N output rows, K input columns.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import zoo
from moeq.costs.base import Asked, LayerView
from moeq.model_parts import MatrixSource, MoeLayer
from moeq.spec import QuantSpec

SPECS = tuple(QuantSpec(bits=bits, group_size=32) for bits in (1, 2, 4))
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")  # gated; biases, interleaved and transposed; without a gate
UNROUTED = 3


def stacked_view(experts: nn.Module, layer: MoeLayer, expert: int, projection: str) -> Tensor:
    """The weights (N, K) as a view into the family's own stacked parameter."""
    name = "down_proj" if projection == "down" else "gate_up_proj" if "gate" in layer.shapes else "up_proj"
    matrix = getattr(experts, name).data[expert]
    matrix = matrix.T if layer.transposed else matrix
    if name != "gate_up_proj":
        return matrix
    half = matrix.shape[0] // 2
    first = projection == "gate"
    if layer.concatenated:
        return matrix[:half] if first else matrix[half:]
    return matrix[0 if first else 1 :: 2]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Toy:
    experts: nn.Module
    layer: MoeLayer
    asked: Asked

    def view(self, unit: str = "expert", specs: tuple[QuantSpec, ...] = SPECS) -> LayerView:
        return LayerView(
            index=0,
            layer=self.layer,
            read=lambda expert, name: stacked_view(self.experts, self.layer, expert, name).clone(),
            candidates=specs,
            unit=unit,
            device=torch.device("cpu"),
        )

    def forward(self, asked: Asked | None = None) -> Tensor:
        """The family's own forward over all experts."""
        asked = asked or self.asked
        with torch.no_grad():
            return self.experts(asked.x_TH, asked.index_Tk, asked.weights_Tk)

    @contextmanager
    def replaced(self, expert: int, weights: dict[str, Tensor]) -> Iterator[None]:
        """Inside, some matrices of an expert are others."""
        kept = {name: stacked_view(self.experts, self.layer, expert, name).clone() for name in weights}
        for name, weight in weights.items():
            stacked_view(self.experts, self.layer, expert, name).copy_(weight)
        yield
        for name, weight in kept.items():
            stacked_view(self.experts, self.layer, expert, name).copy_(weight)

    def scaled(self, *, weights: float = 1.0, grad: float = 1.0) -> Asked:
        assert self.asked.grad_TH is not None
        return replace(self.asked, weights_Tk=self.asked.weights_Tk * weights, grad_TH=self.asked.grad_TH * grad)

    def part(self, tokens: slice) -> Asked:
        """Some of the tokens."""
        asked = self.asked
        assert asked.grad_TH is not None
        return Asked(
            experts=asked.experts,
            x_TH=asked.x_TH[tokens],
            index_Tk=asked.index_Tk[tokens],
            weights_Tk=asked.weights_Tk[tokens],
            grad_TH=asked.grad_TH[tokens],
        )


@functools.cache
def _experts(family: str) -> nn.Module:
    return next(module for module in zoo.make_model(family).modules() if "has_post_expert_norm" in vars(module))


def make_toy(family: str = "qwen3_moe", num_tokens: int = 60, dtype: torch.dtype = torch.float64) -> Toy:
    """Experts of a tiny model of a family; no token goes to expert `UNROUTED`."""
    experts = copy.deepcopy(_experts(family)).to(dtype)
    experts.config._experts_implementation = "eager"
    hidden, inner = zoo.tiny_config(family).hidden_size, experts.down_proj.shape[2 - int(experts.is_transposed)]
    shapes = {"gate": (inner, hidden)} if experts.has_gate else {}
    shapes |= {"up": (inner, hidden), "down": (hidden, inner)}
    layer = MoeLayer(
        path="model.experts",
        block="model",
        num_experts=zoo.EXPERTS,
        top_k=zoo.TOP_K,
        shapes=shapes,
        sources={name: MatrixSource(name=f"experts.{{expert}}.{name}", stacked=False) for name in shapes},
        concatenated=experts.is_concatenated,
        transposed=experts.is_transposed,
    )
    generator = torch.Generator().manual_seed(1)
    choice_TE = torch.rand(num_tokens, zoo.EXPERTS, generator=generator)
    choice_TE[:, UNROUTED] = -1
    asked = Asked(
        experts=experts,
        x_TH=torch.randn(num_tokens, hidden, generator=generator).to(dtype),
        index_Tk=choice_TE.topk(zoo.TOP_K).indices,
        weights_Tk=torch.rand(num_tokens, zoo.TOP_K, generator=generator).to(dtype),
        grad_TH=(torch.randn(num_tokens, hidden, generator=generator) * 1e-3).to(dtype),
    )
    return Toy(experts=experts, layer=layer, asked=asked)

"""Layers of given weights, as costs see them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeq.costs.base import LayerView
from moeq.model_parts import MatrixSource, MoeLayer
from moeq.spec import QuantSpec

CANDIDATES = tuple(QuantSpec(bits=bits) for bits in (1, 2, 3, 4))


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def make_view(
    weights: Sequence[Mapping[str, Tensor]],
    index: int = 0,
    unit: str = "matrix",
    candidates: Sequence[QuantSpec] = CANDIDATES,
) -> LayerView:
    """A view of experts, each given as projection -> weights."""
    path = f"model.layers.{index}.mlp.experts"
    return LayerView(
        index=index,
        layer=MoeLayer(
            path=path,
            block=f"model.layers.{index}",
            num_experts=len(weights),
            top_k=1,
            shapes={name: tuple(w.shape) for name, w in weights[0].items()},
            sources={name: MatrixSource(name=f"{path}.{{expert}}.{name}.weight", stacked=False) for name in weights[0]},
        ),
        read=lambda expert, projection: weights[expert][projection],
        candidates=candidates,
        unit=unit,
        device=torch.device("cpu"),
    )

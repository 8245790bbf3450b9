"""Which kernel computes a call: ordered candidates, each may refuse by returning None.

A new kernel is one file and one entry here; the torch reference comes last and never refuses.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moeq.kernels import cpu, cpu_layouts, gpu, gpu_spectral, gpu_tiled, reference, spectral, tiled
from moeq.kernels.packed import PackedLayer, PackedMatrix
from moeq.kernels.spectral import SpectralLayer
from moeq.kernels.tiled import TiledLayer

ExpertsKernel = Callable[[nn.Module, PackedLayer, Tensor, Tensor, Tensor], Tensor | None]
SpectralKernel = Callable[[nn.Module, SpectralLayer, Tensor, Tensor, Tensor], Tensor | None]
TiledKernel = Callable[[nn.Module, TiledLayer, Tensor, Tensor, Tensor], Tensor | None]
LinearKernel = Callable[[Tensor, PackedMatrix], Tensor | None]

EXPERTS: tuple[ExpertsKernel, ...] = (gpu.experts, cpu.experts, reference.experts)
SPECTRAL: tuple[SpectralKernel, ...] = (gpu_spectral.experts, cpu_layouts.spectral_experts, spectral.experts)
TILED: tuple[TiledKernel, ...] = (gpu_tiled.experts, cpu_layouts.tiled_experts, tiled.experts)
LINEAR: tuple[LinearKernel, ...] = (gpu.linear, cpu.linear, reference.linear)


def experts(
    module: nn.Module, layer: PackedLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The first candidate's answer; arguments as in `reference.experts`."""
    return _first(EXPERTS, module, layer, hidden_states, top_k_index, top_k_weights)


def spectral_experts(
    module: nn.Module, layer: SpectralLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The first candidate's answer; arguments as in `moeq.kernels.spectral.experts`."""
    return _first(SPECTRAL, module, layer, hidden_states, top_k_index, top_k_weights)


def tiled_experts(
    module: nn.Module, layer: TiledLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The first candidate's answer; arguments as in `moeq.kernels.tiled.experts`."""
    return _first(TILED, module, layer, hidden_states, top_k_index, top_k_weights)


def linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """The first candidate's answer; arguments as in `reference.linear`."""
    return _first(LINEAR, x_SK, matrix)


def _first(kernels: Sequence[Callable[..., Tensor | None]], *arguments: Any) -> Tensor:
    for kernel in kernels:
        output = kernel(*arguments)
        if output is not None:
            return output
    raise AssertionError("the reference kernel never refuses")

"""Which kernel computes a call: ordered candidates, each may refuse by returning None.

A new kernel is one file and one entry here; the torch reference comes last and never refuses.
"""

from collections.abc import Callable

from torch import Tensor, nn

from moeq.kernels import reference, spectral
from moeq.kernels.packed import PackedLayer, PackedMatrix
from moeq.kernels.spectral import SpectralLayer

ExpertsKernel = Callable[[nn.Module, PackedLayer, Tensor, Tensor, Tensor], Tensor | None]
SpectralKernel = Callable[[nn.Module, SpectralLayer, Tensor, Tensor, Tensor], Tensor | None]
LinearKernel = Callable[[Tensor, PackedMatrix], Tensor | None]

EXPERTS: tuple[ExpertsKernel, ...] = (reference.experts,)
SPECTRAL: tuple[SpectralKernel, ...] = (spectral.experts,)
LINEAR: tuple[LinearKernel, ...] = (reference.linear,)


def experts(
    module: nn.Module, layer: PackedLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The first candidate's answer; arguments as in `reference.experts`."""
    for kernel in EXPERTS:
        output = kernel(module, layer, hidden_states, top_k_index, top_k_weights)
        if output is not None:
            return output
    raise AssertionError("the reference kernel never refuses")


def spectral_experts(
    module: nn.Module, layer: SpectralLayer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The first candidate's answer; arguments as in `moeq.kernels.spectral.experts`."""
    for kernel in SPECTRAL:
        output = kernel(module, layer, hidden_states, top_k_index, top_k_weights)
        if output is not None:
            return output
    raise AssertionError("the reference kernel never refuses")


def linear(x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
    """The first candidate's answer; arguments as in `reference.linear`."""
    for kernel in LINEAR:
        output = kernel(x_SK, matrix)
        if output is not None:
            return output
    raise AssertionError("the reference kernel never refuses")

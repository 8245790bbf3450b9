"""Error feedback between components: with uncorrelated inputs it is plain rounding, with correlated ones it helps."""

import numpy as np
import torch
from torch import Tensor

from moeq.quantizers.component_gptq import round_components
from moeq.quantizers.gain import rounded_weights
from moeq.quantizers.registry import make_quantizer
from moeq.spec import BITS, QuantSpec

DIRECTIONS, INNER = 40, 64
SLABS = {bits: QuantSpec(bits=bits, group_size=32, levels="half", layout="spectral") for bits in BITS}


def widths() -> np.ndarray:
    return np.random.default_rng(0).choice(np.array([0, 2, 2, 3, 4], dtype=np.uint8), DIRECTIONS)


def restored(p_RI: Tensor, hessian_RR: Tensor) -> Tensor:
    rounded = round_components(p_RI, widths(), SLABS, hessian_RR, scales=make_quantizer("rtn"), damp=1e-4)
    result = torch.zeros_like(p_RI)
    for width, part in rounded.items():
        result[torch.from_numpy(widths() == width)] = rounded_weights(part, SLABS[width])
    return result


def plain(p_RI: Tensor) -> Tensor:
    result = torch.zeros_like(p_RI)
    for width in (2, 3, 4):
        chosen = torch.from_numpy(widths() == width)
        result[chosen] = rounded_weights(make_quantizer("rtn").quantize(p_RI[chosen], SLABS[width], None), SLABS[width])
    return result


def test_without_correlation_it_is_plain_rounding() -> None:
    p_RI = torch.randn(DIRECTIONS, INNER, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(restored(p_RI, torch.eye(DIRECTIONS)), plain(p_RI), rtol=1e-4, atol=1e-5)


def test_correlated_inputs_make_up_for_dropped_components() -> None:
    generator = torch.Generator().manual_seed(1)
    p_RI = torch.randn(DIRECTIONS, INNER, generator=generator)
    h_TR = torch.randn(2000, DIRECTIONS, generator=generator) @ torch.randn(DIRECTIONS, DIRECTIONS, generator=generator)
    hessian_RR = h_TR.T @ h_TR

    def lost(found: Tensor) -> float:
        return float((h_TR @ (found - p_RI)).square().sum())

    assert lost(restored(p_RI, hessian_RR)) < 0.5 * lost(plain(p_RI))

"""The released quantizer of BitsMoE and the repaired one: mean relative errors of Gaussian groups (section 3)."""

import pytest
import torch

from moeq.quantizers.gain import rounded_weights
from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec


def relative_error(quantizer: str, bits: int, levels: str) -> float:
    w_NK = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=bits, levels=levels)
    lost = rounded_weights(make_quantizer(quantizer).quantize(w_NK, spec, None), spec) - w_NK
    return float((lost.square().sum(1) / w_NK.square().sum(1)).mean())


@pytest.mark.parametrize(
    ("bits", "levels", "error"),
    [
        (1, "half", 0.360),
        (2, "sym", 0.147),
        (3, "sym", 0.040),
        (4, "sym", 0.023),
        (6, "sym", 7.0e-4),
        (8, "sym", 4.2e-5),
    ],
)
def test_the_released_quantizer(bits: int, levels: str, error: float) -> None:
    assert relative_error("alternating", bits, levels) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("bits", "levels", "error"), [(2, "half", 0.116), (3, "sym", 0.035), (4, "sym", 0.0094)])
def test_the_repaired_one(bits: int, levels: str, error: float) -> None:
    assert relative_error("rtn", bits, levels) == pytest.approx(error, rel=0.03)

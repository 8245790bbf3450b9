"""Matching the gain: rounded weights end as long, along the originals, as these are; codes stay as they were."""

import pytest
import torch
from torch import Tensor

from moeq.format.records import dequantize
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gain import match_rows, rounded_weights
from moeq.quantizers.registry import make_quantizer
from moeq.spec import SCALAR_LEVELS, QuantSpec


def weights(rows: int = 24, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def hessian(columns: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_TK = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x_TK.T @ x_TK


def decoded(rounded: QuantizedMatrix, spec: QuantSpec) -> Tensor:
    return dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)


@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_rounded_weights_is_the_decoder(levels: str, group_size: int) -> None:
    spec = QuantSpec(bits=3, levels=levels, group_size=group_size)
    rounded = make_quantizer("rtn").quantize(weights(columns=200), spec, None)
    torch.testing.assert_close(rounded_weights(rounded, spec), decoded(rounded, spec))


@pytest.mark.parametrize("name", ["rtn", "hqq"])
@pytest.mark.parametrize("levels", ["asym", "half", "sym"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_group_is_as_long_as_the_original(name: str, levels: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, levels=levels, group_size=64)
    w_NK = weights()
    plain = make_quantizer(name).quantize(w_NK, spec, None)
    grown = make_quantizer(name, gain=True).quantize(w_NK, spec, None)
    assert torch.equal(plain.codes_NK, grown.codes_NK)
    w_NGg = w_NK.view(24, 4, 64)
    shrunk = (decoded(plain, spec).view(24, 4, 64) * w_NGg).sum(-1) / w_NGg.square().sum(-1)
    ratio = (decoded(grown, spec).view(24, 4, 64) * w_NGg).sum(-1) / w_NGg.square().sum(-1)
    assert shrunk.mean() < 0.98
    usual = shrunk > 0.5  # the bound of a gain
    torch.testing.assert_close(ratio[usual], torch.ones_like(ratio[usual]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_rows_are_as_long_over_the_inputs(bits: int) -> None:
    spec = QuantSpec(bits=bits)
    w_NK, h_KK = weights(), hessian()
    rounded = make_quantizer("gptq", gain=True).quantize(w_NK, spec, h_KK)
    along_NK = w_NK @ h_KK
    ratio_N = (along_NK * decoded(rounded, spec)).sum(1) / (along_NK * w_NK).sum(1)
    torch.testing.assert_close(ratio_N, torch.ones_like(ratio_N), rtol=2e-3, atol=2e-3)


def test_rows_that_round_to_nothing_keep_finite_scales() -> None:
    spec = QuantSpec(bits=2, levels="half")
    w_NK = weights()
    w_NK[3] = 0
    for name in ("rtn", "hqq"):
        rounded = make_quantizer(name, gain=True).quantize(w_NK, spec, None)
        assert bool(rounded.scale_NG.isfinite().all())
        assert not decoded(rounded, spec)[3].abs().max() > 1e-6
    grown = match_rows(w_NK, rounded, spec, hessian())
    assert bool(grown.scale_NG.isfinite().all())

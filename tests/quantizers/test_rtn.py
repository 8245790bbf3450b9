"""Check values of plain and searched rounding: relative squared errors on known distributions, groups of 128."""

import pytest
import torch
from torch import Tensor

from moeq.format.records import dequantize
from moeq.quantizers.base import Quantizer
from moeq.quantizers.registry import make_quantizer
from moeq.spec import BITS, SCALAR_LEVELS, QuantSpec


def gauss() -> Tensor:
    return torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))


def heavy() -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((2000, 128))


def loss(quantizer: Quantizer, w: Tensor, spec: QuantSpec) -> float:
    m = quantizer.quantize(w, spec, None)
    return float((dequantize(m.codes_NK, m.scale_NG, m.zero_NG, spec) - w).square().sum() / w.square().sum())


@pytest.mark.parametrize(("bits", "wanted"), [(1, 0.360), (2, 0.251), (3, 0.046), (4, 0.0100)])
def test_minmax_has_the_published_error(bits: int, wanted: float) -> None:
    assert loss(make_quantizer("minmax"), gauss(), QuantSpec(bits=bits)) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("levels", "bits", "low", "high"),
    [
        ("asym", 2, 0.110, 0.116),
        ("asym", 3, 0.032, 0.034),
        ("asym", 4, 0.0085, 0.0090),
        ("asym16", 2, 0.110, 0.116),
        ("asym16", 3, 0.032, 0.034),
        ("asym16", 4, 0.0085, 0.0090),
        ("half", 1, 0.358, 0.363),
        ("half", 2, 0.114, 0.118),
        ("half", 3, 0.0345, 0.0360),
        ("half", 4, 0.0097, 0.0101),
        ("sym", 2, 0.129, 0.134),
        ("sym", 3, 0.034, 0.0355),
        ("sym", 4, 0.0091, 0.0096),
        ("half", 6, 6.2e-4, 6.7e-4),
        ("half", 8, 3.8e-5, 4.2e-5),
    ],
)
def test_searched_rounding_reaches_the_check_values(levels: str, bits: int, low: float, high: float) -> None:
    assert low < loss(make_quantizer("rtn"), gauss(), QuantSpec(bits=bits, levels=levels)) < high


@pytest.mark.parametrize("levels", ["asym", "sym", "half"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", [gauss, heavy])
def test_the_coarse_search_is_as_good_as_a_fine_one(levels: str, bits: int, make, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    w = make()[:250]
    spec = QuantSpec(bits=bits, levels=levels)
    fast = loss(make_quantizer("rtn"), w, spec)
    fine = tuple(1 - step / 50 for step in range(46)) + tuple(1 - step / 500 for step in range(1, 50, 2))
    monkeypatch.setattr("moeq.quantizers.rtn.RATIOS", {bits: fine})
    assert fast < loss(make_quantizer("rtn", refits=4), w, spec) * 1.04


@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("make", [gauss, heavy])
def test_the_search_beats_plain_rounding_at_every_width(levels: str, make) -> None:  # type: ignore[no-untyped-def]
    w = make()[:500]
    for bits in BITS:
        spec = QuantSpec(bits=bits, levels=levels)
        plain, searched = (loss(make_quantizer(name), w, spec) for name in ("minmax", "rtn"))
        assert searched < plain or (bits == 1 and levels == "half" and searched == pytest.approx(plain, rel=1e-3))


def test_errors_fall_with_width_so_that_the_curve_is_convex_where_it_matters() -> None:
    for levels in ("asym", "half"):
        one, two, three = (loss(make_quantizer("rtn"), gauss(), QuantSpec(bits=b, levels=levels)) for b in (1, 2, 3))
        assert one - two > two - three > 0


def test_one_bit_keeps_the_mean_magnitude_and_is_idempotent() -> None:
    w = gauss()[:50]
    spec = QuantSpec(bits=1, levels="half")
    for name in ("minmax", "rtn"):
        m = make_quantizer(name).quantize(w, spec, None)
        torch.testing.assert_close(m.scale_NG.float(), 2 * w.abs().mean(1, keepdim=True), rtol=1e-3, atol=0)
        once = dequantize(m.codes_NK, m.scale_NG, m.zero_NG, spec)
        again = make_quantizer(name).quantize(once, spec, None)
        assert torch.equal(again.codes_NK, m.codes_NK)
        torch.testing.assert_close(dequantize(again.codes_NK, again.scale_NG, None, spec), once)


def test_a_signed_scale_puts_the_extra_level_where_it_is_needed() -> None:
    w = gauss()[:200].clone()
    w[:, 0] = 4.0
    spec = QuantSpec(bits=2, levels="sym")
    positive = loss(make_quantizer("rtn"), w, spec)
    assert loss(make_quantizer("rtn"), -w, spec) == pytest.approx(positive, rel=1e-4)
    m = make_quantizer("rtn").quantize(w, spec, None)
    assert float((m.scale_NG < 0).float().mean()) > 0.8


def test_an_outlier_is_clipped_only_when_that_pays() -> None:
    w = gauss()[:100].clone()
    w[:, 5] = 1000.0
    m = make_quantizer("rtn").quantize(w, QuantSpec(bits=4), None)
    decoded = dequantize(m.codes_NK, m.scale_NG, m.zero_NG, QuantSpec(bits=4))
    torch.testing.assert_close(decoded[:, 5], w[:, 5], rtol=0.02, atol=0)

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moeq import native
from moeq.errors import OptionError
from moeq.format.records import dequantize
from moeq.quantizers.registry import make_quantizer
from moeq.spec import BITS, SCALAR_LEVELS, QuantSpec


@pytest.fixture(params=["kernels", "torch"], scope="module", autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for the compiled kernels and for the torch reference."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "_module", None)
            patch.setattr(native, "_unsaid", [])
        elif not native.available():
            pytest.skip("moeq was installed without its compiled kernels")
        yield


def samples(kind: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1000, 128) if kind == "gauss" else torch.distributions.StudentT(4.0).sample((1000, 128))


def errors(name: str, w: Tensor, spec: QuantSpec, **options: float) -> Tensor:
    m = make_quantizer(name, **options).quantize(w, spec, None)
    return (dequantize(m.codes_NK, m.scale_NG, m.zero_NG, spec) - w).abs()


@pytest.mark.parametrize("kind", ["gauss", "heavy"])
@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_better_than_plain_and_close_to_searched_rounding(kind: str, levels: str, bits: int) -> None:
    w = samples(kind)
    spec = QuantSpec(bits=bits, levels=levels)
    plain, searched, fitted = (errors(name, w, spec) for name in ("minmax", "rtn", "hqq"))
    # What it minimises; at 5 bits and more hardly anything is clipped and all exponents agree.
    assert float(fitted.pow(0.7).mean()) < float(plain.pow(0.7).mean())
    assert float(fitted.pow(0.7).mean()) < float(searched.pow(0.7).mean()) * (1.0 if bits < 4 else 1.02)
    assert float(fitted.square().sum()) < float(searched.square().sum()) * 1.15
    if bits > 1:
        assert float(fitted.square().sum()) < float(plain.square().sum())


def test_the_shrinkage_does_not_depend_on_the_size_of_the_weights() -> None:
    w = samples("heavy")[:200]
    spec = QuantSpec(bits=3)
    m = make_quantizer("hqq").quantize(w, spec, None)
    for factor in (2.0**-7, 2.0**7):
        scaled = make_quantizer("hqq").quantize(w * factor, spec, None)
        assert torch.equal(scaled.codes_NK, m.codes_NK)
        torch.testing.assert_close(scaled.scale_NG.float(), m.scale_NG.float() * factor)


def test_iterations_lower_the_objective() -> None:
    w = samples("heavy")[:300]
    for levels in SCALAR_LEVELS:
        spec = QuantSpec(bits=3, levels=levels)
        none, some = (float(errors("hqq", w, spec, iterations=n).pow(0.7).mean()) for n in (0, 4))
        assert some < none * 0.97


def test_a_smaller_exponent_cares_less_for_outliers() -> None:
    w = samples("heavy")[:300]
    spec = QuantSpec(bits=2)
    robust, nearly_l1 = (errors("hqq", w, spec, p=p) for p in (0.5, 1.0))
    assert float(robust.median()) < float(nearly_l1.median())


@pytest.mark.parametrize("p", [0.0, -1.0, 1.5])
def test_exponents_outside_the_range_are_refused(p: float) -> None:
    with pytest.raises(OptionError, match="exponent"):
        make_quantizer("hqq", p=p)

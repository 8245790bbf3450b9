"""Rounding to blocks of ggml: scales, error feedback, and what no type holds."""

import gguf
import pytest
import torch
from gguf import quants
from torch import Tensor

from moeq.errors import OptionError, TensorError
from moeq.format.records import dequantize
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.ggml import Ggml
from moeq.spec import QuantSpec, block_type

WIDTHS = (2, 3, 4, 5, 6, 8)
GAUSSIAN = {"Q2_K": 0.08, "Q3_K": 0.024, "Q4_K": 0.0062, "IQ4_NL": 0.0092, "Q5_K": 0.0016, "Q5_0": 0.0022, "Q6_K": 4e-4}
"""Relative squared error that Gaussian weights may have."""


def spec(bits: int) -> QuantSpec:
    """A spec of block types."""
    return QuantSpec(bits=bits, group_size=-1, levels="ggml")


def decoded(rounded: QuantizedMatrix, bits: int) -> Tensor:
    """What was rounded, as floats."""
    return dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec(bits))


def inputs(columns: int, tokens: int = 2048) -> Tensor:
    """Inputs that are not alike, and depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(tokens, columns, generator=generator) @ mixed * torch.rand(columns, generator=generator) * 2


@pytest.mark.parametrize("columns", [512, 384])
@pytest.mark.parametrize("bits", WIDTHS)
def test_errors_are_small_and_feedback_makes_answers_better(bits: int, columns: int) -> None:
    w_NK = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    x_TK = inputs(columns)
    plain = decoded(Ggml().quantize(w_NK, spec(bits), None), bits)
    error = float((plain - w_NK).square().mean())
    assert error < GAUSSIAN.get(block_type(bits, columns).name, 5e-5)
    fed = decoded(Ggml(damp=0.1).quantize(w_NK, spec(bits), x_TK.T @ x_TK), bits)
    ratio = float((x_TK @ (fed - w_NK).T).square().sum() / (x_TK @ (plain - w_NK).T).square().sum())
    assert ratio < 0.8, ratio


@pytest.mark.parametrize("kind", ["Q5_0", "Q8_0"])
def test_not_worse_than_the_package_gguf(kind: str) -> None:
    """The types that its Python can round to."""
    bits = {"Q5_0": 5, "Q8_0": 8}[kind]
    w_NK = torch.randn(32, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    number = gguf.GGMLQuantizationType[kind]
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(w_NK.numpy(), number), number).copy())
    ours = decoded(Ggml().quantize(w_NK, spec(bits), None), bits)
    assert (ours - w_NK).square().mean() <= (theirs - w_NK).square().mean() * 1.0001


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [256, 96])
def test_odd_weights(bits: int, columns: int) -> None:
    """Zeros, constants, one sign only, an outlier: nothing that is not a number, and no code that is not one."""
    w_NK = torch.zeros(5, columns)
    w_NK[1] = 0.5
    w_NK[2] = torch.rand(columns, generator=torch.Generator().manual_seed(0)) + 1
    w_NK[3] = -w_NK[2]
    w_NK[4, 7] = 1000.0
    for hessian_KK in (None, torch.eye(columns), torch.zeros(columns, columns)):
        rounded = Ggml(gain=True).quantize(w_NK, spec(bits), hessian_KK)
        found = decoded(rounded, bits)
        assert bool(torch.isfinite(found).all())
        assert int(rounded.codes_NK.max()) < 2 ** block_type(bits, columns).bits
        assert torch.equal(found[0], torch.zeros(columns))
        assert float((found[1:4] - w_NK[1:4]).abs().max()) < 1.2
        assert float(found[4, 7]) == pytest.approx(1000, rel=0.2)


def test_rows_do_not_depend_on_each_other() -> None:
    w_NK = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    hessian_KK = inputs(256).T @ inputs(256)
    whole = Ggml(gain=True).quantize(w_NK, spec(3), hessian_KK)
    half = Ggml(gain=True).quantize(w_NK[4:], spec(3), hessian_KK)
    assert torch.equal(decoded(whole, 3)[4:], decoded(half, 3))


def test_what_is_refused() -> None:
    w_NK = torch.randn(4, 256)
    with pytest.raises(OptionError, match="no whole blocks of 32"):
        Ggml().quantize(w_NK[:, :40], spec(4), None)
    w_NK[1, 1] = torch.nan
    with pytest.raises(TensorError):
        Ggml().quantize(w_NK, spec(4), None)

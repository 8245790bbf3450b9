import pytest
import torch
from torch import Tensor

from moeq.format.records import dequantize
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec


def reference(w: Tensor, bits: int) -> Tensor:
    """Groups of 128 as the papers' code rounds them, in float64, with unrounded scales and zeros."""
    w = w.double().view(-1, 128)
    top = 2**bits - 1
    if bits == 1:
        mean = w.abs().mean(1, keepdim=True)
        return torch.where(w >= 0, mean, -mean).flatten()
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    best, least = w, torch.full_like(low, torch.inf)
    for p in [1.0] + [1 + i / 500 for i in range(1, 51)] + [1 - i / 500 for i in range(1, 51)]:
        scale, zero = p * (high - low) / top, -low * top / (high - low)
        rounded = ((w / scale + zero).round().clamp(0, top) - zero) * scale
        error = (rounded - w).abs().pow(2.4).sum(1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best.flatten()


def decoded(matrix: QuantizedMatrix, spec: QuantSpec) -> Tensor:
    return dequantize(matrix.codes_NK, matrix.scale_NG, matrix.zero_NG, spec)


def loss(d: Tensor, w: Tensor) -> float:
    return float((d - w).square().sum() / w.square().sum())


@pytest.mark.parametrize(("bits", "published"), [(1, 0.361), (2, 0.203), (3, 0.0382), (4, 0.0089)])
def test_with_an_identity_hessian_it_is_group_rounding_with_the_narrow_search(bits: int, published: float) -> None:
    w = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=bits, levels="asym16")
    d = decoded(make_quantizer("gptq-mc").quantize(w, spec, torch.eye(256)), spec)
    wanted = reference(w, bits).view(w.shape)
    # Stored scales and zeros are float16, which moves a few weights across a rounding boundary.
    assert float(((d - wanted).abs() > 0.02).float().mean()) < 0.01
    assert loss(d, w) == pytest.approx(loss(wanted, w), rel=0.01)
    assert loss(d, w) == pytest.approx(published, rel=0.03)


def test_up_to_three_bits_feedback_starts_after_the_block() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 256)
    x = torch.randn(1000, 256) @ (torch.eye(256) + 0.1 * torch.randn(256, 256))
    h = x.T @ x
    for bits, open_block in ((2, True), (3, True), (4, False)):
        spec = QuantSpec(bits=bits, levels="asym16")
        fed, plain = (make_quantizer("gptq-mc").quantize(w, spec, hessian) for hessian in (h, torch.eye(256)))
        assert torch.equal(fed.codes_NK[:, :128], plain.codes_NK[:, :128]) == open_block
        assert not torch.equal(fed.codes_NK[:, 128:], plain.codes_NK[:, 128:])


def test_dead_inputs_lose_their_weights_only_here_and_only_if_others_live() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 128)
    h = torch.eye(128)
    h[7, 7] = 0
    spec = QuantSpec(bits=4, levels="asym16")
    d = decoded(make_quantizer("gptq-mc").quantize(w, spec, h), spec)
    step = float(make_quantizer("gptq-mc").quantize(w, spec, h).scale_NG.max())
    assert float(d[:, 7].abs().max()) <= step / 2
    assert loss(decoded(make_quantizer("gptq").quantize(w, spec, h), spec)[:, 7], w[:, 7]) < 0.05
    starved = decoded(make_quantizer("gptq-mc").quantize(w, spec, torch.zeros(128, 128)), spec)
    assert loss(starved, w) < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plain_gptq_is_better(bits: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 256)
    x = torch.randn(1000, 256) @ (torch.eye(256) + 0.05 * torch.randn(256, 256))
    h = x.T @ x
    spec = QuantSpec(bits=bits, levels="asym16")
    errors = []
    for name in ("gptq", "gptq-mc"):
        d = decoded(make_quantizer(name).quantize(w, spec, h), spec) - w
        errors.append(float(((d @ h) * d).sum()))
    assert errors[0] < errors[1]

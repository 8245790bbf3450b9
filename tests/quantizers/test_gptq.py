import pytest
import torch
from torch import Tensor

from moeq.errors import OptionError
from moeq.format.records import dequantize
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.gptq import round_columns
from moeq.quantizers.hessian import factorize
from moeq.quantizers.registry import make_quantizer
from moeq.quantizers.rtn import fit_minmax
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of correlated inputs of unequal size."""
    torch.manual_seed(seed)
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    x = torch.randn(4 * columns, columns) @ mix * torch.exp(0.5 * torch.randn(columns))
    return torch.randn(rows, columns), x.T @ x


def decoded(matrix: QuantizedMatrix, spec: QuantSpec) -> Tensor:
    return dequantize(matrix.codes_NK, matrix.scale_NG, matrix.zero_NG, spec)


def output_error(matrix: QuantizedMatrix, spec: QuantSpec, w: Tensor, h: Tensor) -> float:
    d = decoded(matrix, spec) - w
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_beats_rounding_on_the_output_at_every_width(levels: str, bits: int, act_order: bool) -> None:
    w, h = problem(48, 300)
    for group_size in GROUP_SIZES:
        spec = QuantSpec(bits=bits, group_size=group_size, levels=levels)
        plain = output_error(make_quantizer("rtn").quantize(w, spec, None), spec, w, h)
        fed_back = output_error(make_quantizer("gptq", act_order=act_order).quantize(w, spec, h), spec, w, h)
        assert fed_back < plain * (0.97 if bits == 1 else 0.8)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_equals_the_textbook_loop(group_size: int) -> None:
    w, h = problem(8, 200)
    spec = QuantSpec(bits=3, group_size=group_size, levels="half")
    factor = factorize(h)

    def fit(groups):  # type: ignore[no-untyped-def]
        return fit_minmax(groups, 3)

    fast = round_columns(w, factor, spec, fit)
    work, upper, codes = w.double(), factor.upper_KK.double(), torch.empty(8, 200, dtype=torch.uint8)
    width = 200 if group_size == -1 else group_size
    for j in range(200):
        if j % width == 0:
            scale = (2 * work[:, j : j + width].abs().amax(1) / 7).half().double()
        codes[:, j] = (work[:, j] / scale + 3.5).round().clamp(0, 7)
        error = (work[:, j] - (codes[:, j] - 3.5) * scale) / upper[j, j]
        work[:, j:] -= torch.outer(error, upper[j, j:])
    # A last-bit difference may flip a code, and all later ones of its row follow; most rows have none.
    assert float((fast.codes_NK != codes).float().mean()) < 0.05


def test_without_correlations_it_is_rounding() -> None:
    w, _ = problem(16, 160)
    for act_order in (False, True):
        for levels in SCALAR_LEVELS:
            spec = QuantSpec(bits=3, group_size=64, levels=levels)
            m = make_quantizer("gptq", act_order=act_order).quantize(w, spec, torch.eye(160))
            plain = make_quantizer("rtn").quantize(w, spec, None)
            # Dividing by the scale in two steps or one may round a tie the other way.
            assert float((m.codes_NK != plain.codes_NK).float().mean()) < 1e-3
            torch.testing.assert_close(m.scale_NG, plain.scale_NG, rtol=1e-3, atol=0)


def test_act_order_helps_when_inputs_differ_in_size() -> None:
    w, h = problem(64, 256)
    spec = QuantSpec(bits=2)
    in_order, by_size = (
        output_error(make_quantizer("gptq", act_order=flag).quantize(w, spec, h), spec, w, h) for flag in (False, True)
    )
    assert by_size < in_order


def test_codes_are_those_of_the_decoded_weights() -> None:
    w, h = problem(16, 200)
    spec = QuantSpec(bits=3, group_size=64)
    m = make_quantizer("gptq").quantize(w, spec, h)
    scale = m.scale_NG.float().repeat_interleave(64, 1)[:, :200]
    assert m.zero_NG is not None
    zero = (m.zero_NG.float() * (7 / 255)).repeat_interleave(64, 1)[:, :200]
    assert torch.equal((decoded(m, spec) / scale + zero).round().to(torch.uint8), m.codes_NK)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_keep_their_weights(act_order: bool) -> None:
    w, h = problem(16, 128)
    dead = [3, 64, 127]
    h[dead] = 0
    h[:, dead] = 0
    spec = QuantSpec(bits=4, group_size=32)
    d = decoded(make_quantizer("gptq", act_order=act_order).quantize(w, spec, h), spec)
    torch.testing.assert_close(d[:, dead], w[:, dead], rtol=0, atol=0.35)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_or_no_tokens_do_no_harm(tokens: int) -> None:
    w, _ = problem(16, 128)
    x = torch.randn(tokens, 128)
    h = x.T @ x
    spec = QuantSpec(bits=3)
    m = make_quantizer("gptq").quantize(w, spec, h)
    plain = make_quantizer("rtn").quantize(w, spec, None)
    if not tokens:
        assert torch.equal(m.codes_NK, plain.codes_NK)
        return
    error = float((decoded(m, spec) - w).square().sum())
    assert error < 3 * float((decoded(plain, spec) - w).square().sum())
    assert output_error(m, spec, w, h) < 0.7 * output_error(plain, spec, w, h)


def test_a_singular_hessian_is_damped() -> None:
    w, _ = problem(16, 96)
    x = torch.randn(1000, 1).expand(1000, 96)
    m = make_quantizer("gptq", damp=0.0).quantize(w, QuantSpec(bits=4, group_size=32), x.T @ x)
    assert bool(torch.isfinite(decoded(m, QuantSpec(bits=4, group_size=32))).all())


def test_the_same_hessian_serves_gate_and_up() -> None:
    w, h = problem(16, 128)
    up, other = torch.randn(8, 128), problem(1, 128, seed=1)[1]
    spec = QuantSpec(bits=2)
    shared = make_quantizer("gptq")
    for weights, hessian in ((w, h), (up, h), (w, other), (up, h)):
        expected = make_quantizer("gptq").quantize(weights, spec, hessian)
        assert torch.equal(shared.quantize(weights, spec, hessian).codes_NK, expected.codes_NK)


def test_it_asks_for_a_hessian() -> None:
    with pytest.raises(OptionError, match="gptq needs calibration"):
        make_quantizer("gptq").quantize(torch.ones(2, 4), QuantSpec(bits=4), None)

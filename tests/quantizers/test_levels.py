"""Every quantizer on every level set, width, group size and on inputs that break naive code."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeq import native
from moeq.errors import TensorError
from moeq.format.records import decode_matrix, dequantize, pack_matrix
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.levels import fit_groups, levels_of, quantize_groups, store_scale
from moeq.quantizers.registry import QUANTIZERS, make_quantizer
from moeq.quantizers.rtn import fit_minmax, fit_range
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, ZERO_BYTES, QuantSpec, num_groups

specs = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    levels=st.sampled_from(SCALAR_LEVELS),
)
KINDS = ("gauss", "zeros", "constant", "subnormal", "tiny", "huge", "one outlier", "positive", "mixed")


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


def weights(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "mixed":
        return torch.cat([weights(other, (1, shape[1]), seed) for other in KINDS[:-1]])
    outlier = noise.clone()
    outlier[:, -1] = 1e4
    return {
        "gauss": noise,
        "zeros": torch.zeros(shape),
        "constant": torch.full(shape, -0.37),
        "subnormal": noise * 1e-40,
        "tiny": noise * 1e-8,
        "huge": noise.sign() * 3e38,
        "one outlier": outlier,
        "positive": noise.abs() + 3,
    }[kind]


def check(matrix: QuantizedMatrix, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """The decoded weights, once dtypes, shapes, ranges and the packed round trip are right."""
    rows, columns = shape
    groups = num_groups(columns, spec.group_size)
    assert matrix.codes_NK.dtype == torch.uint8
    assert matrix.codes_NK.shape == shape
    assert int(matrix.codes_NK.max()) < 2**spec.bits
    assert matrix.scale_NG.dtype == torch.float16
    assert matrix.scale_NG.shape == (rows, groups)
    assert bool(torch.isfinite(matrix.scale_NG).all())
    if ZERO_BYTES[spec.levels]:
        assert matrix.zero_NG is not None
        assert matrix.zero_NG.shape == (rows, groups)
        assert matrix.zero_NG.dtype == (torch.uint8 if spec.levels == "asym" else torch.float16)
        assert bool(torch.isfinite(matrix.zero_NG).all())
    else:
        assert matrix.zero_NG is None
    decoded = dequantize(matrix.codes_NK, matrix.scale_NG, matrix.zero_NG, spec)
    record = pack_matrix(matrix.codes_NK, matrix.scale_NG, matrix.zero_NG, spec)
    assert torch.equal(decode_matrix(record, spec, shape), decoded)
    assert bool(torch.isfinite(decoded).all())
    return decoded


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@settings(max_examples=40, deadline=None)
@given(
    spec=specs,
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_any_input_gives_finite_storable_codes(
    name: str, spec: QuantSpec, rows: int, columns: int, kind: str, seed: int
) -> None:
    w = weights(kind, (rows, columns), seed)
    x = torch.randn(columns + 3, columns, generator=torch.Generator().manual_seed(seed))
    decoded = check(make_quantizer(name).quantize(w, spec, x.T @ x), spec, (len(w), columns))
    if kind in ("zeros", "subnormal"):
        assert not decoded.any()


@settings(max_examples=60, deadline=None)
@given(
    spec=specs,
    columns=st.integers(2, 300),
    kind=st.sampled_from(("gauss", "constant", "one outlier", "tiny", "mixed")),
    seed=st.integers(0, 99),
)
def test_the_search_never_loses_to_zeros_and_codes_are_nearest(
    spec: QuantSpec, columns: int, kind: str, seed: int
) -> None:
    w = weights(kind, (3, columns), seed).clamp(-1e6, 1e6)
    matrix = make_quantizer("rtn").quantize(w, spec, None)
    decoded = check(matrix, spec, tuple(w.shape))
    error = (decoded - w).abs()
    width = columns if spec.group_size == -1 else spec.group_size
    scale = matrix.scale_NG.float().abs().repeat_interleave(width, 1)[:, :columns]
    for step in (-1, 1):
        neighbour = (matrix.codes_NK.int() + step).clamp(0, 2**spec.bits - 1).to(torch.uint8)
        other = (dequantize(neighbour, matrix.scale_NG, matrix.zero_NG, spec) - w).abs()
        assert bool((error <= other + 1e-4 * scale + 1e-6 * w.abs()).all())
    if kind != "mixed":
        # float16 scales end at 6e-8; above that, anything is better than nothing at all.
        assert float(error.square().sum()) <= float(w.square().sum()) * 1.0001 + columns * 3 * 1e-14


@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_matrix_survives(levels: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, group_size=64, levels=levels)
    for value in (0.37, -0.37):
        w = torch.full((2, 100), value)
        decoded = check(make_quantizer("rtn").quantize(w, spec, None), spec, (2, 100))
        torch.testing.assert_close(decoded, w, rtol=2e-3, atol=0)


def test_a_ragged_last_group_is_a_group_of_its_own() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 150)
    for levels in SCALAR_LEVELS:
        spec = QuantSpec(bits=3, group_size=128, levels=levels)
        whole = make_quantizer("rtn").quantize(w, spec, None)
        tail = make_quantizer("rtn").quantize(w[:, 128:], spec, None)
        assert torch.equal(whole.codes_NK[:, 128:], tail.codes_NK)
        assert torch.equal(whole.scale_NG[:, 1:], tail.scale_NG)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(name: str, value: float) -> None:
    for column in (0, 40, 99):
        w = torch.ones(2, 100)
        w[1, column] = value
        with pytest.raises(TensorError, match="NaN or infinity"):
            make_quantizer(name).quantize(w, QuantSpec(bits=4, group_size=32), torch.eye(100))


@pytest.mark.parametrize("w", [torch.ones(2, 3, 4), torch.ones(4), torch.ones(2, 3).int(), torch.ones(0, 3)])
def test_only_float_matrices_are_taken(w: Tensor) -> None:
    with pytest.raises(TensorError):
        make_quantizer("rtn").quantize(w, QuantSpec(bits=4), None)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_input_dtype_and_strides_do_not_matter_and_the_input_stays(name: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(160, 6).bfloat16()
    before = w.clone()
    h = torch.eye(160)
    spec = QuantSpec(bits=3, group_size=64)
    strided = make_quantizer(name).quantize(w.t(), spec, h)
    plain = make_quantizer(name).quantize(w.t().contiguous().double(), spec, h)
    assert torch.equal(strided.codes_NK, plain.codes_NK)
    assert torch.equal(strided.scale_NG, plain.scale_NG)
    assert torch.equal(w, before)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@pytest.mark.parametrize("bits", [2, 8])
def test_two_runs_agree_and_rows_are_independent(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 96)
    x = torch.randn(200, 96)
    spec = QuantSpec(bits=bits, group_size=32)
    first = make_quantizer(name).quantize(w, spec, x.T @ x)
    monkeypatch.setattr("moeq.quantizers.chunks.CHUNK", 96 * 7)
    second = make_quantizer(name).quantize(w, spec, x.T @ x)
    assert torch.equal(first.codes_NK, second.codes_NK)
    assert torch.equal(first.scale_NG, second.scale_NG)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@pytest.mark.parametrize("inference", [False, True])
def test_parameters_and_inference_mode_are_fine(name: str, inference: bool) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(bits=3, group_size=32)
    w = torch.randn(4, 64)
    expected = make_quantizer(name).quantize(w, spec, torch.eye(64))
    with torch.inference_mode(inference):
        m = make_quantizer(name).quantize(torch.nn.Parameter(w), spec, torch.eye(64))
    assert torch.equal(m.codes_NK, expected.codes_NK)
    assert not m.scale_NG.requires_grad


@pytest.mark.parametrize("inference", [False, True])
def test_threads_change_nothing(inference: bool) -> None:
    torch.manual_seed(0)
    w, root = torch.randn(700, 300), torch.rand(300)
    spec = QuantSpec(bits=3, group_size=64)
    results = []
    with torch.inference_mode(inference):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            codes = torch.empty(w.shape, dtype=torch.uint8)
            try:
                results.append((*fit_groups(w, spec, lambda groups: fit_range(groups, 3), codes, root), codes))
                assert torch.get_num_threads() == threads
            finally:
                torch.set_num_threads(1)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_errors_in_threads_reach_the_caller() -> None:
    w = torch.ones(700, 300)
    w[650, 7] = float("nan")
    torch.set_num_threads(2)
    try:
        with pytest.raises(TensorError, match="NaN"):
            make_quantizer("rtn").quantize(w, QuantSpec(bits=3), None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_refit_never_raises_the_error() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 128) ** 3
    for levels in SCALAR_LEVELS:
        for bits in (1, 2, 3, 4, 6):
            spec = QuantSpec(bits=bits, levels=levels)
            errors = []
            for refits in (0, 1, 2, 4):
                m = quantize_groups(w, spec, lambda groups, b=bits, r=refits: fit_range(groups, b, r))
                errors.append((dequantize(m.codes_NK, m.scale_NG, m.zero_NG, spec) - w).square().sum(1))
            for worse, better in pairwise(errors):
                assert bool((better <= worse * 1.002).all())
            assert float(errors[-1].sum()) < float(errors[0].sum()) * 0.999 or bits == 6


def test_column_weights_shift_the_fit_towards_heavy_columns() -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 256)
    root = torch.ones(256)
    root[::8] = 5.0
    for levels in SCALAR_LEVELS:
        spec = QuantSpec(bits=2, group_size=64, levels=levels)
        errors = []
        for root_K in (None, root):
            codes = torch.empty(w.shape, dtype=torch.uint8)
            scale, zero = fit_groups(w, spec, lambda groups: fit_range(groups, 2), codes, root_K)
            wide = [part.repeat_interleave(64, 1) for part in (scale, zero)]
            errors.append(float((((codes - wide[1]) * wide[0] - w) * root).square().sum()))
        assert errors[1] < errors[0] * 0.9


def test_scales_are_rounded_to_float16_but_never_to_zero_or_infinity() -> None:
    scale = torch.tensor([0.0, 1e-12, -1e-12, 1e9, -1e9, 0.1])
    stored = store_scale(scale)
    assert stored.tolist() == [0.0, 2.0**-24, -(2.0**-24), 65504.0, -65504.0, float(torch.tensor(0.1).half())]


def test_stored_zeros_are_the_ones_that_readers_use() -> None:
    torch.manual_seed(0)
    for bits in BITS:
        spec = QuantSpec(bits=bits, levels="asym")
        _, zero = fit_groups(torch.randn(50, 256), spec, lambda groups, b=bits: fit_minmax(groups, b))
        stored = (zero / levels_of(spec).zero_step).round()
        torch.testing.assert_close(stored * ((2**bits - 1) / 255), zero, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@pytest.mark.parametrize("levels", SCALAR_LEVELS)
def test_a_gpu_rounds_like_a_cpu(name: str, levels: str) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(64, 300), torch.randn(1000, 300)
    spec = QuantSpec(bits=3, group_size=128, levels=levels)
    h = x.T @ x
    here = check(make_quantizer(name).quantize(w, spec, h), spec, (64, 300))
    there = check(make_quantizer(name).quantize(w.cuda(), spec, h.cuda()), spec, (64, 300))
    # Feedback carries a last-bit difference through the rest of a row, so compare what matters: the output.
    errors = [float((((d - w) @ h) * (d - w)).sum()) for d in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)

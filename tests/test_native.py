"""The compiled kernels against the torch reference, which is the truth, and against themselves."""

import importlib
import warnings
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeq import native
from moeq.errors import TensorError
from moeq.format.records import decode_in_chunks, decode_matrix, dequantize, pack_codes
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.levels import quantize_groups
from moeq.quantizers.registry import make_quantizer
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec, stored_bytes

built = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
SHAPE = (80, 300)


def torch_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, "_module", None)
    patch.setattr(native, "_unsaid", [])


def both(name: str, w_NK: Tensor, spec: QuantSpec, **options: Any) -> tuple[QuantizedMatrix, QuantizedMatrix]:
    """What the kernels and what torch make of a matrix."""
    quantizer = make_quantizer(name, **options)
    compiled = quantizer.quantize(w_NK, spec, None)
    with pytest.MonkeyPatch.context() as patch:
        torch_only(patch)
        return compiled, quantizer.quantize(w_NK, spec, None)


def weights(kind: str, shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    heavy = noise / (torch.randn((4, *shape), generator=generator).square().sum(0) / 4).sqrt()  # Student-t (4)
    outlier = noise.clone()
    outlier[:, 7::50] *= 1e4
    sparse = torch.where(noise.abs() < 1, 0, noise)
    return {
        "gauss": noise * 0.02,
        "heavy": heavy * 0.02,
        "outlier": outlier,
        "sparse": sparse,
        "positive": noise.abs() + 3,
        "tiny": noise * 1e-8,
        "subnormal": noise * 1e-40,
        "huge": noise.sign() * 3e38,
        "zeros": torch.zeros(shape),
        "constant": torch.full(shape, -0.37),
    }[kind]


def squared_error(rounded: QuantizedMatrix, w_NK: Tensor, spec: QuantSpec) -> float:
    decoded = dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)
    return float((decoded.double() - w_NK.double()).square().sum())


def along(rounded: QuantizedMatrix, w_NK: Tensor, spec: QuantSpec) -> float:
    decoded = dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)
    return float((decoded.double() * w_NK.double()).sum())


@built
@pytest.mark.parametrize("name", ["minmax", "rtn", "hqq"])
@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_scales_and_zeros_are_those_of_torch(name: str, levels: str, bits: int) -> None:
    """But for the groups in which the last bit of a sum turns a scale, a zero or the choice of a candidate."""
    w_NK = torch.cat([weights("gauss"), weights("heavy", seed=1)])
    cases = zip(GROUP_SIZES, (torch.bfloat16, torch.float16, torch.float32, torch.float64), strict=True)
    for (group_size, dtype), gain in product(cases, (False, True) if name != "minmax" else (False,)):
        spec = QuantSpec(bits=bits, levels=levels, group_size=group_size)
        options = {"gain": gain} if name != "minmax" else {}
        ours, truth = both(name, w_NK.to(dtype), spec, **options)
        assert (ours.codes_NK != truth.codes_NK).float().mean() < 0.01
        assert (ours.scale_NG != truth.scale_NG).float().mean() < 0.03
        torch.testing.assert_close(squared_error(ours, w_NK, spec), squared_error(truth, w_NK, spec), rtol=1e-3, atol=0)
        torch.testing.assert_close(along(ours, w_NK, spec), along(truth, w_NK, spec), rtol=1e-4, atol=0)
        assert (ours.zero_NG is None) == (truth.zero_NG is None)
        if ours.zero_NG is not None and truth.zero_NG is not None:
            assert ours.zero_NG.dtype == truth.zero_NG.dtype
            assert (ours.zero_NG != truth.zero_NG).float().mean() < 0.03


# The same examples every time: of random ones, about three in a thousand have so few weights that last bits decide
# which of several answers a search ends in, and none of these is a defect.
@built
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["minmax", "rtn", "hqq"]),
    spec=st.builds(
        QuantSpec,
        bits=st.sampled_from(BITS),
        group_size=st.sampled_from(GROUP_SIZES),
        levels=st.sampled_from(SCALAR_LEVELS),
    ),
    kind=st.sampled_from(["outlier", "sparse", "positive", "tiny", "subnormal", "huge", "zeros", "constant"]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_odd_weights_are_rounded_as_well_as_by_torch(
    name: str, spec: QuantSpec, kind: str, rows: int, columns: int, seed: int
) -> None:
    w_NK = weights(kind, (rows, columns), seed)
    ours, truth = both(name, w_NK, spec)
    wanted = squared_error(truth, w_NK, spec)
    # Where a few codes fit anything, chance decides; what is left then is the resolution of a float16 scale.
    nothing = 1e-6 * float(w_NK.double().square().sum()) + w_NK.numel() * (2**spec.bits * 2.0**-25) ** 2
    assert squared_error(ours, w_NK, spec) == pytest.approx(wanted, rel=0.01, abs=nothing)
    decoded = dequantize(ours.codes_NK, ours.scale_NG, ours.zero_NG, spec)
    assert bool(torch.isfinite(decoded).all())
    if kind in ("subnormal", "zeros"):
        assert not decoded.any()


@built
@pytest.mark.parametrize("name", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_of_many_groups_is_that_of_torch(name: str, bits: int) -> None:
    w_NK = weights("gauss", (300, 2048)).bfloat16()
    for levels in ("asym", "half"):
        spec = QuantSpec(bits=bits, levels=levels)
        ours, truth = both(name, w_NK, spec)
        assert squared_error(ours, w_NK, spec) == pytest.approx(squared_error(truth, w_NK, spec), rel=1e-4)
        assert along(ours, w_NK, spec) == pytest.approx(along(truth, w_NK, spec), rel=1e-5)


@built
@pytest.mark.parametrize("p", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_the_shrinkage_takes_any_exponent(p: float, iterations: int) -> None:
    w_NK = weights("heavy")
    for bits, levels in ((2, "asym"), (3, "half"), (4, "asym16")):
        spec = QuantSpec(bits=bits, levels=levels, group_size=64)
        ours, truth = both("hqq", w_NK, spec, p=p, iterations=iterations)
        assert (ours.codes_NK != truth.codes_NK).float().mean() < 0.01
        assert (ours.scale_NG != truth.scale_NG).float().mean() < 0.02


@built
@pytest.mark.parametrize("name", ["minmax", "rtn", "hqq"])
@pytest.mark.parametrize("levels", SCALAR_LEVELS)
def test_instruction_sets_give_the_same_bits(name: str, levels: str) -> None:
    if len(native.isas()) == 1:
        pytest.skip("this machine has one")
    w_NK = torch.cat([weights(kind, (5, 300)) for kind in ("gauss", "heavy", "outlier", "sparse", "tiny", "huge")])
    for bits, dtype in product((1, 2, 3, 8), (torch.float32, torch.bfloat16)):
        spec = QuantSpec(bits=bits, levels=levels, group_size=128)
        fits = {
            "minmax": native.Rounding(fit="minmax"),
            "rtn": native.Rounding(fit="search", ratios=(1.0, 0.8, 0.5, -0.7), refits=2),
            "hqq": native.Rounding(fit="half-quadratic", ratios=(0.9, 0.5), iterations=3, settled=1e-3),
        }
        results = [
            native.round_matrix(w_NK.to(dtype).nan_to_num(), spec, fits[name], gain=True, isa=isa)
            for isa in native.isas()
        ]
        best = results[0]
        assert best is not None
        for other in results[1:]:
            assert other is not None
            for one, two in zip(best, other, strict=True):
                assert (one is None and two is None) or torch.equal(one, two)


@built
@pytest.mark.parametrize("name", ["rtn", "hqq"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_row_alone_is_rounded_as_among_others(name: str, group_size: int) -> None:
    w_NK = weights("heavy", (37, 300))
    spec = QuantSpec(bits=3, group_size=group_size)
    quantizer = make_quantizer(name, gain=True)
    whole = quantizer.quantize(w_NK, spec, None)
    for row in (0, 15, 16, 36):
        alone = quantizer.quantize(w_NK[row : row + 1], spec, None)
        assert torch.equal(alone.codes_NK[0], whole.codes_NK[row])
        assert torch.equal(alone.scale_NG[0], whole.scale_NG[row])


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for unit in (1.0, 1e-5, 1e-30):  # ranges around the number's size, so that its codes tell something
        numbers = every[torch.isfinite(every) & (every.float().abs() < 300 * unit)]
        numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 32)]).view(-1, 32)
        for bits in (1, 8):
            spec = QuantSpec(bits=bits, group_size=32, levels="asym16")
            narrow = make_quantizer("minmax").quantize(numbers, spec, None)
            wide = make_quantizer("minmax").quantize(numbers.float(), spec, None)
            assert torch.equal(narrow.codes_NK, wide.codes_NK)
            assert torch.equal(narrow.scale_NG, wide.scale_NG)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_place_is_searched_for_nan_and_infinity(dtype: torch.dtype, value: float) -> None:
    spec = QuantSpec(bits=4, group_size=32)
    for row, column in product((0, 15, 16, 18), (0, 1, 31, 32, 98, 99)):
        w_NK = torch.ones(19, 100, dtype=dtype)
        w_NK[row, column] = value
        with pytest.raises(TensorError, match="NaN or infinity"):
            make_quantizer("rtn").quantize(w_NK, spec, None)


@built
@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 400), seed=st.integers(0, 99))
def test_packing_is_that_of_torch_to_the_bit(bits: int, rows: int, columns: int, seed: int) -> None:
    spec = QuantSpec(bits=bits, group_size=32)
    generator = torch.Generator().manual_seed(seed)
    codes_NK = torch.randint(0, 2**bits, (rows, columns), generator=generator).byte()
    truth = torch.zeros(stored_bytes(spec, (rows, columns)), dtype=torch.uint8)
    pack_codes(codes_NK, spec, truth)
    for isa in native.isas():
        record = torch.zeros_like(truth)
        native.pack_codes(codes_NK, spec, record, isa=isa)
        assert torch.equal(record, truth)


@built
@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_that_of_torch_to_the_bit(bits: int, levels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for group_size, shape in product(GROUP_SIZES, ((3, 300), (2, 8), (5, 127), (1, 1), (4, 256))):
        spec = QuantSpec(bits=bits, levels=levels, group_size=group_size)
        # Any bytes: a damaged record has scales that are infinite or no numbers, and the result must show it.
        record = torch.randint(0, 256, (stored_bytes(spec, shape),), generator=generator).byte()
        for dtype, isa in product(native.DTYPES, native.isas()):
            truth = decode_in_chunks(record, spec, shape, dtype)
            found = native.decode_matrix(record, spec, shape, dtype, isa=isa)
            assert torch.equal(found.isnan(), truth.isnan())
            assert torch.equal(found.nan_to_num(7.0), truth.nan_to_num(7.0))


@built
def test_records_that_kernels_cannot_read_are_left_to_torch() -> None:
    spec, shape = QuantSpec(bits=4, group_size=32), (4, 128)
    record = torch.randint(0, 100, (stored_bytes(spec, shape),), generator=torch.Generator().manual_seed(0)).byte()
    expected = decode_matrix(record, spec, shape)
    spaced = torch.stack([record, record], dim=1)[:, 0]
    assert torch.equal(decode_matrix(spaced.contiguous(), spec, shape), expected)
    assert torch.equal(decode_matrix(record, spec, shape, torch.float64), expected.double())
    with pytest.raises(ValueError, match="ends before"):
        native.decode_matrix(record[:-64], spec, shape)


@built
def test_threads_change_nothing() -> None:
    w_NK = weights("heavy", (701, 300))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(make_quantizer("rtn", gain=True).quantize(w_NK, QuantSpec(bits=3, group_size=64), None))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, three = results
    assert torch.equal(one.codes_NK, three.codes_NK)
    assert torch.equal(one.scale_NG, three.scale_NG)
    assert one.zero_NG is not None
    assert three.zero_NG is not None
    assert torch.equal(one.zero_NG, three.zero_NG)


@built
def test_buffers_that_do_not_fit_are_refused() -> None:
    module: Any = importlib.import_module("moeq._native")
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="another size"):
        module.pack_plane(codes, 4, 0, torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no such plane"):
        module.pack_plane(codes, 3, 0, torch.zeros(96, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no such instruction set"):
        module.pack_plane(codes, 4, 0, torch.zeros(128, dtype=torch.uint8), isa="mmx")
    with pytest.raises(TypeError):  # and not packed into a copy that nobody sees
        module.pack_plane(codes.t(), 4, 0, torch.zeros(128, dtype=torch.uint8))
    spec, rounding = QuantSpec(bits=4), native.Rounding(fit="search")
    with pytest.raises(ValueError, match="candidates"):
        native.round_matrix(torch.ones(2, 128), spec, rounding, gain=False)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        native.round_matrix(torch.ones(2, 128).double(), spec, native.Rounding(fit="minmax"), gain=False)


def test_without_kernels_torch_does_the_work_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK = weights("gauss")
    spec = QuantSpec(bits=3)
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_unsaid", ["no kernels"])
    assert not native.available()
    assert native.isas() == ()
    with pytest.warns(UserWarning, match="no kernels"):
        first = make_quantizer("rtn").quantize(w_NK, spec, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = make_quantizer("rtn").quantize(w_NK, spec, None)
    assert torch.equal(first.codes_NK, second.codes_NK)


def test_a_missing_or_slow_extension_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert native._load() is None
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(worth_it=lambda: False))
    assert native._load() is None


@built
def test_weights_that_want_gradients_or_lie_transposed_are_taken() -> None:
    w_NK = weights("gauss", (64, 64))
    spec = QuantSpec(bits=4, group_size=32)
    expected = make_quantizer("rtn").quantize(w_NK, spec, None)
    for same in (torch.nn.Parameter(w_NK), w_NK.t().contiguous().t(), w_NK.double()):
        found = make_quantizer("rtn").quantize(same, spec, None)
        assert torch.equal(found.codes_NK, expected.codes_NK)


def test_fits_without_numbers_for_the_kernels_stay_with_torch() -> None:
    calls = []
    w_NK = weights("gauss", (4, 64))

    def fit(groups: Any) -> tuple[Tensor, Tensor]:
        calls.append(groups)
        return groups.stored(torch.ones_like(groups.unit_M1)), groups.zero_M1

    quantize_groups(w_NK, QuantSpec(bits=4, group_size=32), fit)
    assert calls

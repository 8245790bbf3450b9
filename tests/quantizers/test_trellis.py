"""Trellis codes: the search against all paths, feedback against gptq, errors against what training promised."""

from itertools import product

import pytest
import torch
from correlated import error, hessian, weights

from moeq import native
from moeq.errors import OptionError, TensorError
from moeq.format.records import decode_in_chunks, decode_matrix, dequantize, pack_matrix
from moeq.quantizers.gptq import Gptq
from moeq.quantizers.trellis import Trellis, best_path, search_columns
from moeq.recipe import Recipe
from moeq.spec import TRELLISES, QuantSpec, stored_bytes
from moeq.trellis import codes as trellis
from moeq.trellis.tables import ERRORS, TABLES, TAPS


def spec_of(bits: int, group_size: int = 128) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=group_size, levels="trellis")


def by_hand(codes: list[int], bits: int) -> list[float]:
    """What the codes of one column stand for, as docs/format.md says it."""
    found = []
    for row in range(len(codes)):
        lowest = [codes[above] % 2 for above in range(row, -1, -1)]
        number = codes[row] // 2
        for taps in reversed(TAPS[bits]):
            number = 2 * number + sum(bit for k, bit in enumerate(lowest) if taps >> k & 1) % 2
        found.append(float(TABLES[bits][number]))
    return found


@pytest.mark.parametrize("bits", TRELLISES)
def test_codes_stand_for_what_the_format_says(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes_NK = torch.randint(0, 1 << bits, (200, 3), generator=generator).byte()
    found_NK = trellis.entries(codes_NK, bits)
    for column in range(3):
        assert found_NK[:, column].tolist() == by_hand(codes_NK[:, column].tolist(), bits)
    assert len(TABLES[bits]) == 1 << (bits - 1 + len(TAPS[bits])) in (16, 32)
    # Bits of the newest code and of the oldest one are in the last parity alone: what can follow differs most.
    ends = 1 | 1 << TRELLISES[bits]
    assert [taps & ends for taps in TAPS[bits]] == [0] * (len(TAPS[bits]) - 1) + [ends]
    assert max(max(TAPS[bits]).bit_length() - 1 for bits in TRELLISES) <= 6, "csrc/trellis.cpp has room for no more"
    largest = {1: 31, 2: 31, 3: 63, 4: 127}[bits]
    assert max(map(abs, TABLES[bits])) == largest, "products of 8 bits would overflow, or a bit is idle"


@pytest.mark.parametrize("bits", TRELLISES)
def test_the_path_is_the_best_of_all(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    rows = {1: 10, 2: 5, 3: 4, 4: 3}[bits]
    w_N = 20 * torch.randn(rows, generator=generator)
    scale_N = torch.rand(rows, generator=generator) + 0.5
    every = [
        (
            sum((float(w) - float(s) * e) ** 2 for w, s, e in zip(w_N, scale_N, by_hand([*codes], bits), strict=True)),
            codes,
        )
        for codes in product(range(1 << bits), repeat=rows)
    ]
    assert best_path(w_N, scale_N, bits).tolist() == list(min(every)[1])


@pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("bits", TRELLISES)
def test_the_compiled_search_is_torchs(bits: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows in (1, 63, 64, 65, 200):
        w_SN = 20 * torch.randn(9, rows, generator=generator)
        scale_SN = torch.rand(9, rows, generator=generator) + 0.5
        upper_SS = torch.eye(9) * 1.5 + 0.1 * torch.randn(9, 9, generator=generator).triu(1)
        ours, theirs = w_SN.clone(), w_SN.clone()
        codes_SN, error_SN = native.trellis_columns(bits, ours, scale_SN, upper_SS, isa=isa)
        wanted_SN, missed_SN = search_columns(bits, theirs, scale_SN, upper_SS)
        # A tie in the last bit may be broken otherwise, and changes what comes after it.
        assert float((codes_SN[0] == wanted_SN[0]).float().mean()) > 0.98
        assert float(error_SN.square().sum()) == pytest.approx(float(missed_SN.square().sum()), rel=0.02)


@pytest.mark.parametrize("bits", TRELLISES)
def test_errors_are_those_of_the_tables(bits: int) -> None:
    w_NK = weights(512, 512)
    found = Trellis().quantize(w_NK, spec_of(bits, -1), None)
    lost = w_NK - dequantize(found.codes_NK, found.scale_NG, found.zero_NG, spec_of(bits, -1))
    assert float(lost.square().sum() / w_NK.square().sum()) == pytest.approx(ERRORS[bits], rel=0.02)


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.95), (2, 0.8), (3, 0.8), (4, 0.85)])
def test_less_is_lost_than_with_scalar_levels(bits: int, limit: float) -> None:
    w_NK, h_KK = weights(256, 256), hessian(256)
    found = []
    for quantizer, spec in ((Trellis(), spec_of(bits)), (Gptq(), QuantSpec(bits=bits, levels="half"))):
        q = quantizer.quantize(w_NK, spec, h_KK)
        found.append(error(w_NK, dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec), h_KK))
    assert found[0] < limit * found[1], found
    plain = Trellis().quantize(w_NK, spec_of(bits), None)
    lost = error(w_NK, dequantize(plain.codes_NK, plain.scale_NG, None, spec_of(bits)), h_KK)
    assert found[0] < 0.9 * lost, "feedback helps"


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("shape", [(300, 264), (5, 8), (1, 1), (65, 130)])
@pytest.mark.parametrize("bits", TRELLISES)
def test_what_is_stored_decodes_to_what_was_rounded(bits: int, shape: tuple[int, int], group_size: int) -> None:
    w_NK, spec = weights(*shape), spec_of(bits, group_size)
    q = Trellis(gain=True).quantize(w_NK, spec, hessian(shape[1]))
    expected = dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec)
    record = pack_matrix(q.codes_NK, q.scale_NG, q.zero_NG, spec)
    assert record.numel() == stored_bytes(spec, shape)
    for decode in (decode_matrix, decode_in_chunks):
        assert torch.equal(decode(record, spec, shape), expected)
        for rows in ((0, shape[0]), (shape[0] // 2, shape[0]), (shape[0] - 1, shape[0])):
            assert torch.equal(decode(record, spec, shape, rows=rows), expected[slice(*rows)])


@pytest.mark.parametrize("value", [0.0, 1e-7, 3e4, -2.0])
def test_odd_groups(value: float) -> None:
    w_NK = torch.full((70, 128), value)
    q = Trellis(gain=True).quantize(w_NK, spec_of(2), hessian(128))
    hat_NK = dequantize(q.codes_NK, q.scale_NG, None, spec_of(2))
    assert torch.isfinite(hat_NK).all()
    assert float((hat_NK - w_NK).abs().max()) <= 0.7 * abs(value) + 1e-6
    with pytest.raises(TensorError, match="NaN"):
        Trellis().quantize(torch.full((4, 128), float("nan")), spec_of(2), None)


def test_what_has_no_trellis() -> None:
    with pytest.raises(OptionError, match="no trellis of 5 bits"):
        spec_of(5)
    with pytest.raises(OptionError, match="layout spectral"):
        QuantSpec(bits=2, levels="trellis", layout="spectral")
    with pytest.raises(OptionError, match="stores no trellises"):
        Recipe(method="bitsmoe", bits=2.5, quantizer="trellis", calibration="x")
    recipe = Recipe(bits=2.5, quantizer="trellis", calibration="x")
    assert recipe.spec(2) == spec_of(2)
    assert recipe.spec(6).levels == "asym"
    w_NK = weights(8, 128)
    wide = QuantSpec(bits=6)
    assert torch.equal(
        Trellis().quantize(w_NK, wide, hessian(128)).codes_NK, Gptq().quantize(w_NK, wide, hessian(128)).codes_NK
    )

"""Codebooks of neighbouring weights with error feedback (TileQ notes, section 3, step 8)."""

import pytest
import torch
from correlated import error, hessian, weights

from moeq.errors import OptionError, TensorError
from moeq.format.records import decode_matrix, dequantize, pack_matrix
from moeq.quantizers.gptq import Gptq
from moeq.quantizers.vector import Vector, codebook, nearest
from moeq.spec import QuantSpec, sections, stored_bytes


def spec_of(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=-1, levels="vector")


@pytest.mark.parametrize("shape", [(300, 264), (5, 8), (256, 128)])
@pytest.mark.parametrize("bits", [2, 3])
def test_what_is_stored_decodes_to_what_was_rounded(bits: int, shape: tuple[int, int]) -> None:
    w_NK, spec = weights(*shape), spec_of(bits)
    q = Vector().quantize(w_NK, spec, hessian(shape[1]))
    expected = dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec)
    record = pack_matrix(q.codes_NK, q.scale_NG, q.zero_NG, spec)
    assert record.numel() == stored_bytes(spec, shape)
    assert torch.equal(decode_matrix(record, spec, shape), expected)
    assert torch.equal(decode_matrix(record, spec, shape, rows=(2, shape[0] - 1)), expected[2:-1])
    assert decode_matrix(record, spec, shape, torch.bfloat16).dtype == torch.bfloat16
    # By hand: the vector of a code is its entry in the codebook of its block.
    books = spec.codebooks
    assert books is not None
    row, vector = shape[0] - 1, shape[1] // books.dim - 1
    block = row // books.rows, vector * books.dim // books.columns
    entry = q.zero_NG[block].view(-1, books.dim)[q.codes_NK[row, vector].long()]  # type: ignore[index]
    torch.testing.assert_close(expected[row, -books.dim :], (entry.float() - 128) * q.scale_NG[row].float())


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.8), (3, 1.0)])
def test_codebooks_lose_less_than_scalar_levels(bits: int, limit: float) -> None:
    w_NK, h_KK = weights(256, 256), hessian(256)
    scalar = QuantSpec(bits=bits, levels="half" if bits == 2 else "asym")
    found = []
    for quantizer, spec in ((Vector(), spec_of(bits)), (Gptq(), scalar)):
        q = quantizer.quantize(w_NK, spec, h_KK)
        found.append(error(w_NK, dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec), h_KK))
    assert found[0] < limit * found[1]
    assert stored_bytes(spec_of(bits), (256, 256)) < 1.04 * stored_bytes(scalar, (256, 256))


def test_feedback_lowers_the_error() -> None:
    w_NK, h_KK = weights(64, 256), hessian(256)
    found = []
    for given in (h_KK, h_KK.diagonal().diag()):
        q = Vector().quantize(w_NK, spec_of(2), given)
        found.append(error(w_NK, dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec_of(2)), h_KK))
    assert found[0] < 0.9 * found[1]


def test_gain_makes_the_answers_as_long_as_they_were() -> None:
    w_NK, h_KK = weights(300, 128), hessian(128)
    lengths = []
    for gain in (False, True):
        q = Vector(gain=gain).quantize(w_NK, spec_of(2), h_KK)
        hat_NK = dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec_of(2))
        along = (w_NK @ h_KK)[:256]
        lengths.append((along * hat_NK[:256]).sum(1) / (along * w_NK[:256]).sum(1))
    assert float(lengths[0].mean()) < 0.99
    torch.testing.assert_close(lengths[1], torch.ones(256), rtol=0, atol=2e-3)


def test_other_widths_are_those_of_gptq() -> None:
    w_NK, h_KK = weights(16, 128), hessian(128)
    spec = QuantSpec(bits=4)
    for name in ("codes_NK", "scale_NG", "zero_NG"):
        assert torch.equal(
            getattr(Vector(gain=True).quantize(w_NK, spec, h_KK), name),
            getattr(Gptq(gain=True).quantize(w_NK, spec, h_KK), name),
        )


def test_inputs_without_tokens_are_rounded_plainly() -> None:
    w_NK = weights(32, 64)
    q = Vector(gain=True).quantize(w_NK, spec_of(3), torch.zeros(64, 64))
    hat_NK = dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec_of(3))
    assert float((hat_NK - w_NK).norm() / w_NK.norm()) < 0.25


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-9])
def test_constant_weights_survive(value: float) -> None:
    w_NK = torch.full((8, 16), value)
    q = Vector().quantize(w_NK, spec_of(2), torch.eye(16))
    hat_NK = dequantize(q.codes_NK, q.scale_NG, q.zero_NG, spec_of(2))
    assert bool(hat_NK.isfinite().all())
    torch.testing.assert_close(hat_NK, w_NK, rtol=1e-2, atol=1e-5)


def test_kmeans_finds_separate_clusters_and_weighs_columns() -> None:
    centres = torch.tensor([[-3.0, 1.0], [2.0, 2.0], [0.0, -4.0], [5.0, 0.0]])
    points = centres.repeat(50, 1) + 0.01 * weights(200, 2, seed=3)
    table = codebook(points, torch.ones(1, 2), 4)
    assert float(torch.cdist(table, centres).min(0).values.max()) < 0.1
    # A column that costs nothing does not decide.
    code = nearest(torch.tensor([[4.9 * 1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), centres)
    assert code.tolist() == [3]


def test_what_cannot_be_rounded_is_refused() -> None:
    bad = weights(4, 8)
    bad[1, 2] = torch.nan
    with pytest.raises(TensorError, match="NaN"):
        Vector().quantize(bad, spec_of(2), torch.eye(8))
    with pytest.raises(OptionError, match="calibration"):
        Vector().quantize(weights(4, 8), spec_of(2), None)
    with pytest.raises(OptionError, match="vectors of 4"):
        sections(spec_of(2), (4, 10))
    for options in ({"bits": 4}, {"group_size": 128}, {"layout": "spectral"}):
        with pytest.raises(OptionError):
            QuantSpec(**{"bits": 2, "group_size": -1, "levels": "vector", **options})  # type: ignore[arg-type]


def test_sizes_are_those_of_the_notes() -> None:
    """Codebooks cost 0.125 bit per weight at 2 bits and 0.031 at 3 bits, a row's scale 16 bits."""
    for bits, extra in ((2, 0.125), (3, 0.03125)):
        assert 8 * stored_bytes(spec_of(bits), (2048, 2048)) / 2048**2 == pytest.approx(
            bits + extra + 16 / 2048, abs=1e-4
        )

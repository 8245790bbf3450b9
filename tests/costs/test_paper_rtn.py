"""The papers' rounding: its known errors, and its formula on a group worked out by hand."""

import pytest
import torch

from moeq.costs.paper_rtn import paper_rtn
from moeq.errors import OptionError, TensorError
from moeq.format.records import dequantize
from moeq.quantizers.rtn import MinMax
from moeq.spec import WHOLE_ROW, QuantSpec


@pytest.mark.parametrize(("bits", "known"), [(1, 0.360), (2, 0.253), (3, 0.046), (4, 0.010)])
def test_error_on_gaussian_groups(bits: int, known: float) -> None:
    w_NK = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    error = (paper_rtn(w_NK, bits) - w_NK).square().sum() / w_NK.square().sum()
    assert float(error) == pytest.approx(known, abs=0.0025)


def test_one_bit_is_idempotent() -> None:
    w_NK = torch.randn(5, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = paper_rtn(w_NK, 1, 32)
    torch.testing.assert_close(paper_rtn(once, 1, 32), once, rtol=1e-12, atol=0)
    assert once[0, :32].abs().unique().numel() == 1


def test_a_group_by_hand() -> None:
    # lo -1, hi 2, so s 1 and z 1.
    assert paper_rtn(torch.tensor([[-1.0, -0.4, 0.6, 2.0]]), 2).tolist() == [[-1, 0, 1, 2]]
    # All positive: the range still starts at 0, so s 1 and z 0.
    assert paper_rtn(torch.tensor([[0.6, 1.2, 2.2, 3.0]]), 2).tolist() == [[1, 1, 2, 3]]
    # lo -1, hi 2.5: s 3.5/3, z round(0.857) = 1, an integer zero.
    got = paper_rtn(torch.tensor([[-1.0, 2.5]]), 2)
    torch.testing.assert_close(got, torch.tensor([[-3.5 / 3, 7 / 3]]))
    assert paper_rtn(torch.zeros(1, 4), 2).abs().max() < 0.5
    assert paper_rtn(torch.tensor([[0.0, -3.0]]), 1).tolist() == [[1.5, -1.5]]


def test_groups_are_independent_and_the_last_may_be_ragged() -> None:
    w_NK = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    parts = [paper_rtn(part, 3, WHOLE_ROW) for part in (w_NK[:, :64], w_NK[:, 64:])]
    assert torch.equal(paper_rtn(w_NK, 3, 64), torch.cat(parts, dim=1))
    assert torch.equal(paper_rtn(w_NK, 3, 128), paper_rtn(w_NK, 3, WHOLE_ROW))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_agrees_with_minmax_up_to_what_that_stores(bits: int) -> None:
    w_NK = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=bits, levels="asym16")
    rounded = MinMax().quantize(w_NK, spec)
    stored = dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)
    step = float(rounded.scale_NG.float().max())
    assert float((paper_rtn(w_NK, bits) - stored).abs().max()) <= 1.01 * step * (bits > 1) + 1e-3


def test_refusals() -> None:
    with pytest.raises(OptionError, match="bits"):
        paper_rtn(torch.ones(1, 2), 7)
    with pytest.raises(TensorError, match="NaN"):
        paper_rtn(torch.tensor([[1.0, torch.nan]]), 2)
    with pytest.raises(TensorError, match="shape"):
        paper_rtn(torch.ones(3), 2)

"""Products of 16-bit numbers come in few numbers of rows."""

import torch

from moeq.arch.hooks import filled_up


def test_few_numbers_of_rows_and_the_same_answers() -> None:
    w_KN = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes = set()
    for rows in range(1, 700):
        x_SK = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).bfloat16()
        filled = filled_up(x_SK)
        sizes.add(len(filled))
        assert len(filled) <= max(24, 1.5 * rows)
        assert torch.equal(filled[:rows], x_SK)
        if rows % 97 == 0:
            torch.testing.assert_close((filled @ w_KN)[:rows], x_SK @ w_KN, rtol=2**-7, atol=1e-2)
    assert len(sizes) <= 13


def test_other_products_make_no_code() -> None:
    x_SK = torch.ones(17, 4, dtype=torch.float32)
    assert filled_up(x_SK) is x_SK


def test_no_rows() -> None:
    assert filled_up(torch.empty(0, 4, dtype=torch.bfloat16)).shape[1] == 4

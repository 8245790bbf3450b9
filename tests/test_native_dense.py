"""Kernels for what is not packed, against torch in float64, on every instruction set that this machine has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moeq import native, native_dense

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

DTYPES = st.sampled_from(native.DTYPES)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def numbers(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    error = TOLERANCE[found.dtype] * max(1.0, float(wanted.abs().max()))
    assert torch.allclose(found.double(), wanted.double(), rtol=TOLERANCE[found.dtype], atol=error)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), tokens=st.integers(1, 9), dtype=DTYPES)
def test_linear(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    w_NK, x_SK = numbers(0, dtype, rows, columns), numbers(1, dtype, tokens, columns)
    wanted = x_SK.double() @ w_NK.double().T
    found = [native_dense.linear(x_SK, w_NK, isa=isa) for isa in native.isas()]
    for each in found:
        assert_close(each, wanted)
        assert torch.equal(each, found[0]), "the same bits on every instruction set"


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    each=st.integers(1, 4),
    keys=st.integers(1, 700),
    sizes=st.tuples(st.sampled_from((16, 48, 64, 128)), st.sampled_from((16, 80, 128))),
    dtype=DTYPES,
    masked=st.booleans(),
)
def test_attention(
    batch: int, shared: int, each: int, keys: int, sizes: tuple[int, int], dtype: torch.dtype, masked: bool
) -> None:
    q_BHD = numbers(0, dtype, batch, shared * each, sizes[0])
    k_BGTD, v_BGTD = (
        numbers(seed, dtype, batch, shared, keys + 9, size)[:, :, :keys] for seed, size in enumerate(sizes, start=1)
    )
    mask_BT = None
    if masked:  # sequences that are filled up on the left
        mask_BT = torch.arange(keys) >= (torch.arange(batch) * keys // batch).unsqueeze(-1)
    wanted = functional.scaled_dot_product_attention(
        q_BHD.double().unsqueeze(2),
        k_BGTD.double(),
        v_BGTD.double(),
        attn_mask=None if mask_BT is None else mask_BT[:, None, None],
        scale=0.3,
        enable_gqa=True,
    ).squeeze(2)
    found = [native_dense.attention(q_BHD, k_BGTD, v_BGTD, mask_BT, 0.3, isa=isa) for isa in native.isas()]
    for answer in found:
        assert_close(answer, wanted)
        assert torch.equal(answer, found[0]), "the same bits on every instruction set"


def test_attention_of_large_scores() -> None:
    """Scores that overflow exp unless the largest is taken off, and whole spans that nobody may look at."""
    q_BHD, k_BGTD = torch.full((1, 1, 16), 30.0), torch.full((1, 1, 400, 16), 10.0)
    k_BGTD[0, 0, 7] = 10.5
    v_BGTD = torch.arange(400.0).view(1, 1, 400, 1).expand(1, 1, 400, 16).contiguous()
    found = native_dense.attention(q_BHD, k_BGTD, v_BGTD, None, 1.0)
    assert torch.equal(found, torch.full((1, 1, 16), 7.0))
    mask_BT = torch.zeros(1, 400, dtype=torch.bool)
    mask_BT[0, 399] = True
    assert torch.equal(native_dense.attention(q_BHD, k_BGTD, v_BGTD, mask_BT, 1.0), torch.full((1, 1, 16), 399.0))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    q_BHD, k_BGTD = numbers(0, torch.bfloat16, 1, 8, 128), numbers(1, torch.bfloat16, 1, 2, 3000, 128)
    x_SK, w_NK = numbers(2, torch.bfloat16, 3, 1024), numbers(3, torch.bfloat16, 500, 1024)
    before = torch.get_num_threads()
    answers = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            answers.append((native_dense.attention(q_BHD, k_BGTD, k_BGTD, None, 0.1), native_dense.linear(x_SK, w_NK)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 5), size=st.integers(1, 500), dtype=DTYPES)
def test_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    x, w_K = numbers(0, dtype, tokens, 1, size), numbers(1, dtype, size)
    factor = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    found = [native_dense.rms_norm(x, w_K, 1e-6, isa=isa) for isa in native.isas()]
    for each in found:
        assert_close(each, w_K.double() * x.double() * factor)
        assert torch.equal(each, found[0])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 5),
    experts=st.integers(1, 200),
    dtype=DTYPES,
    normalized=st.booleans(),
    seed=st.integers(0, 99),
)
def test_route(tokens: int, experts: int, dtype: torch.dtype, normalized: bool, seed: int) -> None:
    x_SK, w_EK = numbers(seed, dtype, tokens, 40), numbers(seed + 1, dtype, experts, 40)
    top_k = min(8, experts)
    for isa in native.isas():
        logits_SE, weight_Sk, index_Sk = native_dense.route(x_SK, w_EK, top_k, normalized, isa=isa)
        assert torch.equal(logits_SE, native_dense.linear(x_SK, w_EK, isa=isa))
        wanted = logits_SE.double().softmax(-1).topk(top_k).values
        if normalized:
            wanted = wanted / wanted.sum(-1, keepdim=True)
        assert_close(weight_Sk, wanted)
        assert torch.equal(logits_SE.gather(-1, index_Sk), logits_SE.topk(top_k).values)
        assert all(len(set(row)) == top_k for row in index_Sk.tolist())


def test_shapes_that_do_not_fit_are_refused() -> None:
    q_BHD, k_BGTD = torch.randn(1, 4, 16), torch.randn(1, 3, 5, 16)
    with pytest.raises(ValueError, match="heads"):
        native_dense.attention(q_BHD, k_BGTD, k_BGTD, None, 1.0)
    with pytest.raises(ValueError, match="head size"):
        native_dense.attention(torch.randn(1, 3, 20), torch.randn(1, 3, 5, 20), torch.randn(1, 3, 5, 16), None, 1.0)
    mask_BT = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        native_dense.attention(torch.randn(1, 3, 16), torch.randn(1, 3, 5, 16), torch.randn(1, 3, 5, 16), mask_BT, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        native_dense.linear(torch.randn(2, 3), torch.randn(4, 5))
    with pytest.raises(ValueError, match="number of experts"):
        native_dense.route(torch.randn(2, 3), torch.randn(4, 3), 5, False)

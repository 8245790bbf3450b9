"""The question that kernels for what is not packed must answer (`moeq.native_dense`); torch answers in float64.

Legend: as in `moeq.native_dense`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from moeq import native_dense
from moeq.layouts.known_answers import EXACT, ROUNDED, Case, Cases, seeded

EPS: Final = 1e-5
WAYS: Final = ((torch.float32, EXACT), (torch.bfloat16, ROUNDED), (torch.float16, ROUNDED))
KEYS: Final = 300
"""More than two spans of keys, and a part of one."""


def _dense_cases(path: str, device: torch.device) -> Iterator[Case]:
    """Every call in every dtype: ragged columns and rows, shared heads, keys left out, equal experts."""
    del path, device  # they exist on CPUs alone
    for dtype, tolerance in WAYS:
        generator = seeded(0)

        def numbers(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        say = partial(Case, tolerance=tolerance)
        for count in (1, 5):
            x_SK, w_NK = numbers(count, 203), numbers(37, 203)
            wanted = x_SK.double() @ w_NK.double().T
            answer = partial(native_dense.linear, x_SK, w_NK)
            yield say(name=f"linear, {dtype}, {count} tokens", answer=answer, wanted=wanted)
        x_SK, w_K = numbers(3, 203), numbers(203)
        x = x_SK.double()
        wanted = w_K.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        yield say(name=f"norm, {dtype}", answer=partial(native_dense.rms_norm, x_SK, w_K, EPS), wanted=wanted)
        q_BHD, k_BGTD, v_BGTD = numbers(2, 6, 48), numbers(2, 3, KEYS, 48), numbers(2, 3, KEYS, 80)
        mask_BT = torch.arange(KEYS) >= torch.tensor([[150], [0]])
        for mask in (None, mask_BT):
            answer = partial(native_dense.attention, q_BHD, k_BGTD, v_BGTD, mask, 0.2)
            wanted = _attended(q_BHD.double(), k_BGTD.double(), v_BGTD.double(), mask, 0.2)
            yield say(name=f"attention, {dtype}", answer=answer, wanted=wanted)
        x_SK, w_EK = numbers(4, 64), numbers(24, 64) / 8
        wanted = (x_SK.double() @ w_EK.double().T).softmax(-1).topk(4).values
        answer = partial(_weights, x_SK, w_EK)
        yield say(name=f"router, {dtype}", answer=answer, wanted=wanted / wanted.sum(-1, keepdim=True))


def _attended(q_BHD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask_BT: Tensor | None, scale: float) -> Tensor:
    mask = None if mask_BT is None else mask_BT[:, None, None]
    found = functional.scaled_dot_product_attention(
        q_BHD.unsqueeze(2), k_BGTD, v_BGTD, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found.squeeze(2)


def _weights(x_SK: Tensor, w_EK: Tensor) -> Tensor:
    """The weights of four experts that a router chooses, if they are those of their numbers."""
    logits_SE, weight_Sk, index_Sk = native_dense.route(x_SK, w_EK, 4, True)
    chosen_Sk = logits_SE.float().gather(-1, index_Sk).softmax(-1)
    return (
        weight_Sk if torch.allclose(chosen_Sk, weight_Sk.float(), atol=1e-2) else torch.full_like(weight_Sk, torch.nan)
    )


CASES: Final[Mapping[str, Cases]] = {"dense": _dense_cases}

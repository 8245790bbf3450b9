"""The compiled kernels for what is not packed: products with floats, one query's attention, norms, choices of a router.

For few tokens on CPUs. torch does all of it, but with a dozen calls where one would do, and, on processors without
AVX-512, with 16-bit products that it imitates. They are torch operators too, for `torch.compile`; a call that nobody
traces does not go through torch's dispatcher, which takes longer than a norm does.

Legend: S tokens, N output rows, K input columns, B sequences, H heads, G heads of keys, T keys, D size of a head.
"""

from typing import Final, cast

import torch
from torch import Tensor

from moeq import native

HEAD_STEP: Final = 16
"""Sizes of heads are multiples of it."""

_LIBRARY: Final = torch.library.Library("moeq", "FRAGMENT")
_LIBRARY.define("dense_linear(Tensor x, Tensor w) -> Tensor")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_LIBRARY.define("rms_norm(Tensor x, Tensor w, float eps) -> Tensor")
_LIBRARY.define("route(Tensor x, Tensor w, int top_k, bool normalized) -> (Tensor, Tensor, Tensor)")


def linear(x_SK: Tensor, w_NK: Tensor, *, isa: str = "") -> Tensor:
    """x W^T with sums in float32, (S, N); both of one dtype of `native.DTYPES`, on the CPU, W contiguous."""
    if native.traced(x_SK):
        return cast(Tensor, torch.ops.moeq.dense_linear(x_SK, w_NK))
    x_SK = x_SK.contiguous()
    y_SN = x_SK.new_empty(x_SK.shape[0], w_NK.shape[0])
    w, x, y = native.arrays(w_NK.detach(), x_SK.detach(), y_SN)
    native.module().dense_linear(w, x, y, torch.get_num_threads(), isa)
    return y_SN


def attention(
    q_BHD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask_BT: Tensor | None, scale: float, *, isa: str = ""
) -> Tensor:
    """softmax(scale q k^T) v for one query of each head, with float32 sums, (B, H, D of the values).

    Args:
        q_BHD: queries of one dtype of `native.DTYPES`, on the CPU.
        k_BGTD: keys, G a divisor of H: neighbouring heads share them. Any strides but that of the last dimension.
        v_BGTD: values, likewise.
        mask_BT: bool, False leaves a key out; None leaves none out.
        scale: of the products.
        isa: one of `native.isas()` instead of the best.
    """
    if native.traced(q_BHD):
        return cast(Tensor, torch.ops.moeq.attention(q_BHD, k_BGTD, v_BGTD, mask_BT, scale))
    q_BHD = q_BHD.contiguous()
    y_BHD = q_BHD.new_empty(*q_BHD.shape[:2], v_BGTD.shape[3])
    q, k, v, y = native.arrays(q_BHD.detach(), k_BGTD.detach(), v_BGTD.detach(), y_BHD)
    mask = None if mask_BT is None else native.arrays(mask_BT.view(torch.uint8))[0]
    native.module().attention(q, k, v, mask, y, scale, torch.get_num_threads(), isa)
    return y_BHD


def rms_norm(x: Tensor, w_K: Tensor, eps: float, *, isa: str = "") -> Tensor:
    """w * (x / sqrt(mean of x^2 + eps)), the bracket rounded to x's dtype as models of the Llama kind do; (..., K)."""
    if native.traced(x):
        return cast(Tensor, torch.ops.moeq.rms_norm(x, w_K, eps))
    x = x.contiguous()
    out = torch.empty_like(x)
    native.module().rms_norm(*native.arrays(x.detach(), w_K.detach(), out), eps, isa)
    return out


def route(x_SK: Tensor, w_EK: Tensor, top_k: int, normalized: bool, *, isa: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """A softmax router: logits (S, E) in x's dtype, the weights of the chosen experts and their numbers (S, k).

    Weights are the largest of softmax(logits), largest first, divided by their sum if `normalized`, in x's dtype.
    """
    if native.traced(x_SK):
        return cast(tuple[Tensor, Tensor, Tensor], torch.ops.moeq.route(x_SK, w_EK, top_k, normalized))
    logits_SE = linear(x_SK, w_EK, isa=isa)
    weight_Sk = logits_SE.new_empty(x_SK.shape[0], top_k)
    index_Sk = torch.empty(weight_Sk.shape, dtype=torch.int64)
    native.module().choose(*native.arrays(logits_SE, weight_Sk, index_Sk), normalized, isa)
    return logits_SE, weight_Sk, index_Sk


_LIBRARY.impl("dense_linear", linear, "CPU")
_LIBRARY.impl("attention", attention, "CPU")
_LIBRARY.impl("rms_norm", rms_norm, "CPU")
_LIBRARY.impl("route", route, "CPU")
torch.library.register_fake("moeq::dense_linear", lambda x, w: x.new_empty(x.shape[0], w.shape[0]))
torch.library.register_fake("moeq::attention", lambda q, k, v, *_: q.new_empty(*q.shape[:2], v.shape[3]))
torch.library.register_fake("moeq::rms_norm", lambda x, *_: torch.empty_like(x))


def _route_fake(x: Tensor, w: Tensor, top_k: int, _normalized: bool) -> tuple[Tensor, Tensor, Tensor]:
    chosen = x.shape[0], top_k
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(chosen), x.new_empty(chosen, dtype=torch.int64)


torch.library.register_fake("moeq::route", _route_fake)

"""What is not packed, made cheap on CPUs: modules answer few tokens by kernels of ours where that changes nothing.

A token on a CPU meets a dozen small torch calls for every norm, router and attention, and, without AVX-512, 16-bit
products that torch imitates, six times slower than float32 ones (benchmarks/cpu.md). Numbers tell whether
a module is what it looks like; if not, it is left alone. What a kernel does not do (many tokens, gradients,
GPUs, unusual masks) is computed as before. The attention is registered with transformers as `moeq_sdpa`.

Legend: S tokens, N output rows, K input columns, E experts, k experts per token, B sequences, H heads, T keys,
D size of a head.
"""

from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moeq import native, native_dense
from moeq.layouts import trust
from moeq.layouts.grouped.cpu import FEW, TILE_BYTES, product_dtype

ATTENTION: Final = "moeq_sdpa"
"""Name of the attention in a model's config."""
SUBJECT: Final = "dense"
"""What `moeq.layouts.trust` is asked."""
UNUSUAL: Final = ("position_bias", "softcap", "cache", "s_aux")
"""Arguments of an attention that its kernel does not know."""


def lighten(model: nn.Module) -> bool:
    """Let a model's linears, norms, routers and attention answer few tokens by our kernels; False if those may not."""
    cpu = torch.device("cpu")
    if not native.available() or not trust.compiled(cpu, SUBJECT):
        return False
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.device != cpu or weight.dtype not in native.DTYPES or not weight.is_contiguous():
            continue
        if type(module) is nn.Linear:
            module.__class__ = LeanLinear
        elif [name for name, _ in module.named_parameters()] == ["weight"] and not list(module.named_buffers()):
            _lighten_leaf(module, weight)
    _lighten_attention(model)
    return True


class LeanLinear(nn.Linear):
    """A linear layer whose products are never imitated 16-bit ones."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        flat = hidden_states.reshape(-1, self.in_features)
        y_SN = _product(flat, self.weight)
        if y_SN is None:
            return super().forward(hidden_states)
        if self.bias is not None:
            y_SN += self.bias
        return y_SN.view(*hidden_states.shape[:-1], self.out_features)


def _product(x_SK: Tensor, w_NK: Tensor) -> Tensor | None:
    """x W^T, or None where torch's own is as good."""
    if w_NK.dtype != x_SK.dtype or x_SK.dtype == torch.float32 or not (is_ours(x_SK) and is_ours(w_NK)):
        return None
    dtype = product_dtype(x_SK.dtype)
    # Where torch has instructions for bfloat16, it multiplies more than two tokens faster (benchmarks/cpu.md).
    if x_SK.shape[0] <= (2 if dtype == x_SK.dtype == torch.bfloat16 else FEW):
        return native_dense.linear(x_SK, w_NK)
    if dtype == x_SK.dtype:
        return None
    x = x_SK.to(dtype)
    step = max(64, TILE_BYTES // (w_NK.shape[1] * dtype.itemsize))
    return torch.cat([(x @ w_nK.to(dtype).T).to(x_SK.dtype) for w_nK in w_NK.split(step)], dim=-1)


class Mixed(nn.Module):
    """Mixed into the class of a family's module, whose subclass the module becomes: whoever knew it knows it still."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        mixed = type(self)
        return _empty, mixed.__bases__, self.__dict__


class LeanNorm(Mixed):
    """Mixed into the class of a norm over the last dimension, w * x / sqrt(mean of x^2 + eps)."""

    weight: Tensor
    moeq_eps: float

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., K), likewise; norms that are given more than that, such as a gate, are the family's own."""
        few = not args and not kwargs and hidden_states.shape[:2].numel() <= FEW
        if few and hidden_states.dtype == self.weight.dtype and is_ours(hidden_states) and is_ours(self.weight):
            return native_dense.rms_norm(hidden_states, self.weight, self.moeq_eps)
        return cast(Tensor, super().forward(hidden_states, *args, **kwargs))


class LeanRouter(Mixed):
    """Mixed into the class of a router that takes the largest of softmax(x W^T)."""

    weight: Tensor
    top_k: int
    moeq_normalized: bool

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(S, K) -> logits (S, E), weights and numbers of the chosen experts (S, k)."""
        x_SK = hidden_states.reshape(-1, self.weight.shape[1])
        if len(x_SK) <= FEW and x_SK.dtype == self.weight.dtype and is_ours(x_SK) and is_ours(self.weight):
            return native_dense.route(x_SK, self.weight, self.top_k, self.moeq_normalized)
        logits_SE = _product(x_SK, self.weight)
        if logits_SE is not None:
            return (logits_SE, *_chosen(logits_SE, self.top_k, self.moeq_normalized))
        return cast(tuple[Tensor, Tensor, Tensor], super().forward(hidden_states))


def _chosen(logits_SE: Tensor, top_k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    weight_Sk, index_Sk = torch.topk(functional.softmax(logits_SE, dim=-1, dtype=torch.float32), top_k, dim=-1)
    if normalized:
        weight_Sk = weight_Sk / weight_Sk.sum(dim=-1, keepdim=True)
    return weight_Sk.to(logits_SE.dtype), index_Sk


_MIXED: Final[dict[tuple[Any, ...], Any]] = {}
"""Classes by what they are mixed of: those have no name that a pickle could hold."""


def mix(mixin: Any, module: Any, **attributes: Any) -> None:
    """Turn a module into one of its class and a mixin."""
    for name, value in attributes.items():
        setattr(module, name, value)
    module.__class__ = _mixed(mixin, type(module))


def _mixed(mixin: Any, cls: Any) -> Any:
    if (mixin, cls) not in _MIXED:
        # Of the family's name: device maps, adapters and messages go by it.
        facts = {"__module__": cls.__module__, "__doc__": mixin.__doc__}
        _MIXED[mixin, cls] = type(cls.__name__, (mixin, cls), facts)
    return _MIXED[mixin, cls]


def _empty(mixin: Any, cls: Any) -> Any:
    mixed = _mixed(mixin, cls)
    return mixed.__new__(mixed)


@torch.no_grad()
def _lighten_leaf(module: Any, weight: Tensor) -> None:
    """Swap a norm or a router, if its answers to a few numbers are those of ours."""
    x_SK = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    x_SK[1] *= 1e-3  # where eps counts
    x_SK = x_SK.to(weight.dtype)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    try:
        found = module(x_SK)
        if weight.ndim == 1 and isinstance(eps, float) and isinstance(found, Tensor):
            if _close(found, native_dense.rms_norm(x_SK, weight, eps)):
                mix(LeanNorm, module, moeq_eps=eps)
        elif weight.ndim == 2 and isinstance(getattr(module, "top_k", None), int) and isinstance(found, tuple):
            for normalized in (False, True):
                if _routes_alike(found, native_dense.route(x_SK, weight, module.top_k, normalized)):
                    return mix(LeanRouter, module, moeq_normalized=normalized)
    except Exception:  # whatever a family's module makes of such an input: it is another kind of module
        return


def _close(found: Any, ours: Tensor) -> bool:
    """Whether a module's answer is ours but for the rounding of its dtype."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (ours.shape, ours.dtype):
        return False
    if not found.is_floating_point():
        return torch.equal(found, ours)
    step = torch.finfo(ours.dtype).eps
    return torch.allclose(found.double(), ours.double(), rtol=4 * step, atol=step * float(ours.abs().max()))


def _routes_alike(found: tuple[Any, ...], ours: tuple[Tensor, ...]) -> bool:
    """Whether logits and weights are the same; of equal logits either may be chosen."""
    if len(found) != len(ours) or not all(_close(a, b) for a, b in zip(found[:2], ours[:2], strict=True)):
        return False
    logits_SE, _, index_Sk = found
    if not isinstance(index_Sk, Tensor) or (index_Sk.dtype, index_Sk.shape) != (torch.int64, ours[2].shape):
        return False
    return _close(logits_SE.gather(-1, index_Sk), logits_SE.gather(-1, ours[2]))


def _lighten_attention(model: nn.Module) -> None:
    """Choose our attention wherever transformers would have chosen torch's."""
    if any(hasattr(module, "kv_b_proj") or hasattr(module, "indexer") for module in model.modules()):
        return  # latent and sparse attention ask by name which function computes it
    register_attention()
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = ATTENTION  # type: ignore[union-attr]


def register_attention() -> None:
    """Make transformers know our attention; safe to call again."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """torch's attention, (B, H, S, D) and (B, G, T, D) twice -> (B, S, H, D); one query on a CPU goes to our kernel."""
    usual = not dropout and all(others.get(name) is None for name in UNUSUAL)
    if usual and query.shape[2] == 1 and _fits(query, key, value, attention_mask):
        mask_BT = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(query), -1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        answer_BHD = native_dense.attention(query.squeeze(2), key, value, mask_BT, scale)
        return answer_BHD.unsqueeze(1), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return found


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes this."""
    if not all(is_ours(each) and each.dtype == query.dtype for each in (query, key, value)):
        return False
    sizes = query.shape[3], value.shape[3]
    if any(size % native_dense.HEAD_STEP for size in sizes) or key.shape[3] != sizes[0]:
        return False
    shared, keys = key.shape[1:3]
    if value.shape[:3] != key.shape[:3] or len(key) != len(query) or not keys or query.shape[1] % shared:
        return False
    if key.stride(3) != 1 or value.stride(3) != 1:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == (1, 1, keys))


def is_ours(x: Tensor) -> bool:
    """Whether a tensor is where our kernels are, and wants no gradient."""
    return x.is_cpu and x.dtype in native.DTYPES and not (torch.is_grad_enabled() and x.requires_grad)

"""One token through a decoder layer of the usual kind in two calls of the compiled kernels, where that changes nothing.

A layer of `moeq.runtime.lean` modules still is fifty calls of Python and torch for a token, a quarter of its time on a
CPU (benchmarks/cpu.md). A layer that has the parts of Mixtral, OLMoE or Qwen3-MoE is watched for its first tokens: the
module answers, the kernels answer too, and only if the answers agree they serve from then on. Whatever is unusual about
a call (many tokens, masks, gradients, hooks on a part, another cache, changed parts) goes the old way.
"""

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from moeq import native
from moeq.arch import hooks
from moeq.layouts.grouped.serving import PackedExperts, PackedLinear
from moeq.runtime.growing import GrowingLayer, grown
from moeq.runtime.lean import ATTENTION, LeanLinear, LeanNorm, LeanRouter, Mixed, is_ours, mix
from moeq.spec import LEVELS

TRIALS: Final = 3
"""Tokens of which one must agree: two answers may choose other experts where a router hesitates."""
AGREES: Final = 0.05
"""Most that what a layer adds may differ, as a share of its length: as much as activations rounded otherwise make."""
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


class _Parts:
    """The kernels' view of a layer, and what it was made of.

    Attributes:
        attention: the compiled first half.
        experts: the compiled second half; None where the module does it.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._modules: list[Any] = [layer.input_layernorm, attention, *(getattr(attention, name) for name in LINEARS)]
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._modules += [norm for norm in norms if norm is not None]
        self._owner: Any = next((m for m in layer.modules() if isinstance(m, PackedExperts | PackedLinear)), None)
        self.attention = _attention(layer, norms)
        handler = getattr(getattr(mlp, "experts", None), hooks.HANDLER, None)
        self.experts = None
        if isinstance(handler, PackedExperts) and isinstance(getattr(mlp, "gate", None), LeanRouter):
            self.experts = _experts(layer, handler)
        if self.experts is not None:
            self._modules += [layer.post_attention_layernorm, mlp, mlp.gate, mlp.experts, handler]
        self._kept = list(_tensors(self._modules))
        self._places = [tensor.data_ptr() for tensor in self._kept]
        self._children = [(parent, dict(parent._modules)) for parent in (layer, *self._modules)]

    @property
    def exact(self) -> bool:
        """Whether activations stay floats, as the packed modules say now."""
        return self._owner is not None and bool(self._owner.exact)

    def hold(self) -> bool:
        """Whether nothing was changed or exchanged since."""
        if any(parent._modules != children for parent, children in self._children):
            return False
        return [tensor.data_ptr() for tensor in _tensors(self._modules)] == self._places

    def watched(self) -> bool:
        """Whether somebody listens at a part, or answers in its place."""
        return any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in self._modules
        )


def _tensors(modules: list[Any]) -> Iterator[Tensor]:
    for module in modules:
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def _attention(layer: Any, norms: list[Any]) -> Any:
    """The compiled first half.

    Raises:
        ValueError: the parts do not fit.
    """
    attention = layer.self_attn
    linears = [getattr(attention, name) for name in LINEARS]
    if any(linear.bias is not None for linear in linears) or not isinstance(layer.input_layernorm, LeanNorm):
        raise ValueError("not of the usual kind")
    if any(norm is not None and not isinstance(norm, LeanNorm) for norm in norms) or (norms[0] is None) != (
        norms[1] is None
    ):
        raise ValueError("not of the usual kind")
    size = int(attention.head_dim)
    norm = layer.input_layernorm
    half = native.module().AttentionHalf(
        *native.arrays(norm.weight.detach()),
        norm.moeq_eps,
        *(None if each is None else native.arrays(each.weight.detach())[0] for each in norms),
        0.0 if norms[0] is None else norms[0].moeq_eps,
        linears[0].out_features // size,
        linears[1].out_features // size,
        float(attention.scaling),
    )
    for linear in linears:
        if isinstance(linear, PackedLinear) and linear.matrix.compiled and linear.loose is None:
            spec, (rows, columns) = linear.matrix.spec, linear.matrix.shape
            form = rows, spec.bits, spec.group_size, LEVELS.index(spec.levels), columns
            half.add_packed(native.arrays(linear.matrix.record)[0], form)
        elif type(linear) is LeanLinear:
            half.add_plain(native.arrays(linear.weight.detach())[0])
        else:
            raise ValueError("not of the usual kind")
    return half


def _experts(layer: Any, handler: PackedExperts) -> Any | None:
    norm, router, packed = layer.post_attention_layernorm, layer.mlp.gate, handler.layer
    inner = packed.shapes["up"][0]
    usual = "gate" in packed.shapes and hooks.gates_by_silu(layer.mlp.experts, inner) and isinstance(norm, LeanNorm)
    if (
        not usual
        or packed.table is None
        or handler.loose is not None
        or packed.table.shape[0] != router.weight.shape[0]
    ):
        return None
    return native.module().ExpertsHalf(
        *native.arrays(norm.weight.detach()),
        norm.moeq_eps,
        *native.arrays(router.weight.detach()),
        router.top_k,
        router.moeq_normalized,
        *native.arrays(packed.data, packed.table),
        inner,
    )


class WholeLayer(Mixed):
    """Mixed into the class of a decoder layer: norm, attention, norm, experts, each half added to what came in."""

    self_attn: nn.Module
    moeq_parts: _Parts | None
    moeq_trials: int
    """Tokens that are still watched; 0 once the kernels agreed, below once they did not."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, H), and what the family's layer takes -> (B, S, H)."""
        if self.moeq_trials < 0 or args or hidden_states.shape[:2] != (1, 1):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        cache = self._cache(hidden_states, kwargs)
        if cache is None:
            return cast(Tensor, super().forward(hidden_states, **kwargs))
        if not self.moeq_trials:
            return self._answer(hidden_states, cache, kwargs, cache.get_seq_length())
        found = cast(Tensor, super().forward(hidden_states, **kwargs))
        try:
            ours = self._answer(hidden_states, cache, kwargs, cache.get_seq_length() - 1)
        except ValueError:  # sizes that the kernels do not take
            self.moeq_trials = -1
            return found
        error = (ours - found).float().norm() / (found - hidden_states).float().norm().clamp_min(1e-30)
        agrees = bool(error < AGREES + 4 * torch.finfo(found.dtype).eps * _growth(hidden_states, found))
        self.moeq_trials = 0 if agrees else -1 if self.moeq_trials == 1 else self.moeq_trials - 1
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, mixed, state = super().__reduce_ex__(protocol)
        return make, mixed, {**state, "moeq_parts": None, "moeq_trials": TRIALS}

    def _cache(self, x: Tensor, kwargs: dict[str, Any]) -> GrowingLayer | None:
        """The layer's cache, if this is a call that the kernels answer."""
        cache, turned = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if cache is None or turned is None or kwargs.get("attention_mask") is not None or native.traced(x):
            return None
        if self.training or not is_ours(x) or torch.is_grad_enabled():
            return None
        found = grown(cache, int(self.self_attn.layer_idx))  # type: ignore[arg-type]
        if found is None or not found.get_seq_length():
            return None
        return found if found.keys.dtype == x.dtype and len(found.keys) == 1 and self._holds() else None

    def _holds(self) -> bool:
        """Whether the kernels know the layer as it is, and nobody watches its parts."""
        attention: Any = self.self_attn
        if attention.config._attn_implementation != ATTENTION:
            return False
        if self.moeq_parts is None or not self.moeq_parts.hold():
            try:
                self.moeq_parts = _Parts(self)
            except (ValueError, AttributeError, KeyError, TypeError):  # a layer of another kind
                self.moeq_parts, self.moeq_trials = None, -1
                return False
            self.moeq_trials = TRIALS
        return not self.moeq_parts.watched()

    def _answer(self, x: Tensor, cache: GrowingLayer, kwargs: dict[str, Any], held: int) -> Tensor:
        """By the kernels; keys and values of the token go to place `held`."""
        parts = self.moeq_parts
        assert parts is not None
        if held == cache.get_seq_length():
            keys, values = cache.rooms()
        else:
            keys, values = cache.keys, cache.values
        half, threads, exact = torch.empty_like(x), torch.get_num_threads(), parts.exact
        turned = (each.contiguous() for each in kwargs["position_embeddings"])
        inputs, out = native.arrays(x, *turned, keys, values), native.arrays(half)[0]
        parts.attention.step(*inputs, held, out, exact, threads)
        if held == cache.get_seq_length():
            cache.advance(held + 1)
        if parts.experts is None:
            layer: Any = self
            return cast(Tensor, half + layer.mlp(layer.post_attention_layernorm(half)))
        answer = torch.empty_like(x)
        parts.experts.step(*native.arrays(half, answer), exact, threads)
        return answer


def _growth(x: Tensor, found: Tensor) -> float:
    """How much longer what came in is than what was added to it: that is rounded with it."""
    return float(found.float().norm() / (found - x).float().norm().clamp_min(1e-30))


def join_layers(model: nn.Module) -> None:
    """Let decoder layers that have the parts be answered whole, once they proved alike."""
    for module in model.modules():
        parts = [
            getattr(module, name, None) for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        ]
        attention = parts[0]
        if None in parts or not all(isinstance(getattr(attention, name, None), nn.Linear) for name in LINEARS):
            continue
        if all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx", "config")):
            mix(WholeLayer, module, moeq_parts=None, moeq_trials=TRIALS)

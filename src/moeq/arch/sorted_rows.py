"""Families whose experts do not follow transformers' experts protocol but hold the same stacked weights: made to.

Llama 4 gives its experts every token E times, weighted beforehand, and rows of zeros where an expert was not chosen. A
module of it becomes a subclass of its own class that says what the protocol's flags say, and hands rows to the
protocol's function. Nothing of transformers is patched: only modules of a model that moeq built or loads change.

Legend: E experts, T tokens, H hidden, I expert width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from moeq.arch.hooks import EXPERTS_IMPLEMENTATION, experts_forward

FAMILIES: Final = ("Llama4TextExperts",)
"""Classes of such modules."""


class _SortedRows(nn.Module):
    """What is put before such a class."""

    config: Any
    act_fn: Any
    num_experts: int

    def _apply_gate(self, fused: Tensor) -> Tensor:
        """(..., 2 I) -> (..., I)."""
        gate, up = fused.chunk(2, dim=-1)
        gated: Tensor = up * self.act_fn(gate)
        return gated

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(E * T, H), a row of zeros where an expert was not chosen -> (E * T, H)."""
        if self.config._experts_implementation != EXPERTS_IMPLEMENTATION:
            own: Tensor = super().forward(hidden_states)
            return own
        rows_ETH = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        chosen_Tk = chosen(hidden_states, self.num_experts)
        place = chosen_Tk[:, 0], torch.arange(len(chosen_Tk), device=chosen_Tk.device)
        x_TH = rows_ETH[place]
        out_ETH = torch.zeros_like(rows_ETH)
        out_ETH[place] = experts_forward(self, x_TH, chosen_Tk, torch.ones_like(chosen_Tk, dtype=x_TH.dtype))
        return out_ETH.view_as(hidden_states)


def chosen(hidden_states: Tensor, num_experts: int) -> Tensor:
    """The expert of every token, (T, 1), by its row that is not zero in (E * T, H)."""
    rows_ETH = hidden_states.view(num_experts, -1, hidden_states.shape[-1])
    return rows_ETH.abs().amax(dim=-1).t().topk(1, dim=-1).indices


def top_k_index(experts: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The experts of every token, (T, k), in a call of an experts module of any family."""
    if "top_k_index" in kwargs:
        index: Tensor = kwargs["top_k_index"]
    else:
        index = args[1] if len(args) > 1 else chosen(args[0], experts.num_experts)
    return index


def weighted_beforehand(model: nn.Module) -> bool:
    """Experts of the model get tokens that carry their routing weights: no gradient tells these from the tokens."""
    return any(type(module).__name__ in FAMILIES for module in model.modules())


def adopt(model: nn.Module) -> None:
    """Let the modules of `FAMILIES` in a model follow the protocol; safe to call again."""
    for name, module in model.named_modules():
        if type(module).__name__ not in FAMILIES or isinstance(module, _SortedRows):
            continue
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        if parent.top_k != 1:
            continue  # several rows of a token cannot be told apart: left alone, and called unsupported
        cls = type(module)
        module.__class__ = type(cls.__name__, (_SortedRows, cls), {"__module__": __name__})
        flags = {"has_gate": True, "has_bias": False, "has_post_expert_norm": False}
        flags |= {"is_transposed": True, "is_concatenated": True}
        vars(module).update(flags, config=parent.shared_expert.config)

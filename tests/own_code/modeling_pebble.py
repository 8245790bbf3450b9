"""A family that transformers does not have: its model, as a checkpoint would bring it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_pebble import PebbleConfig

RAN = Path(__file__).name


class PebbleExpert(nn.Module):
    def __init__(self, config: PebbleConfig) -> None:
        super().__init__()
        *inputs, output = config.scheme
        for name in inputs:
            setattr(self, name, nn.Linear(config.hidden_size, config.moe_inner, bias=False))
        setattr(self, output, nn.Linear(config.moe_inner, config.hidden_size, bias=False))
        self.inputs, self.output = inputs, output

    def forward(self, x: Tensor) -> Tensor:
        first, *more = (getattr(self, name)(x) for name in self.inputs)
        inner = nn.functional.silu(first)
        for each in more:
            inner = inner * each
        return getattr(self, self.output)(inner)


class PebbleBlock(nn.Module):
    def __init__(self, config: PebbleConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(PebbleExpert(config) for _ in range(config.n_routed_experts))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.mix(x.cumsum(1) / steps)
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return x + out


class PebbleForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PebbleConfig

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PebbleBlock(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))

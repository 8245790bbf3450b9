"""A family that transformers does not have: its config, as a checkpoint would bring it."""

from typing import Any

from transformers import PretrainedConfig


class PebbleConfig(PretrainedConfig):
    model_type = "pebble"

    def __init__(
        self,
        vocab_size: int = 128,
        hidden_size: int = 64,
        moe_inner: int = 48,
        num_hidden_layers: int = 2,
        n_routed_experts: int = 4,
        num_experts_per_tok: int = 2,
        scheme: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.moe_inner = moe_inner
        self.num_hidden_layers = num_hidden_layers
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.scheme = list(scheme)
        super().__init__(**more)

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

from moeq.evals.forward import evaluating
from moeq.evals.observe import find_experts, observe, tap_routing


def tiny_mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=3, output_router_logits=True,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def tiny_deepseek() -> nn.Module:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=4, n_group=2,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def test_routing_is_the_routers_top_k(ids: Tensor) -> None:
    model = tiny_mixtral()
    with evaluating(model):
        seen = observe(model, ids, routing=True)
        outputs = model(input_ids=ids)
    assert len(seen.routing) == len(outputs.router_logits) == 3
    for chosen, logits in zip(seen.routing, outputs.router_logits, strict=True):
        assert chosen.shape == (2, 7, 3)
        wanted = logits.view(2, 7, 8).topk(3).indices
        assert torch.equal(chosen.sort().values, wanted.sort().values)
    torch.testing.assert_close(seen.logits_BPV, outputs.logits[:, :-1])


def test_dense_layers_are_no_moe_layers(ids: Tensor) -> None:
    model = tiny_deepseek()
    assert len(find_experts(model)) == 2
    with evaluating(model):
        assert [tuple(chosen.shape) for chosen in observe(model, ids, routing=True).routing] == [(2, 7, 4)] * 2


def test_nothing_is_left_behind(ids: Tensor) -> None:
    model = tiny_mixtral()
    with pytest.raises(IndexError), evaluating(model):
        observe(model, ids + 64, routing=True)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with evaluating(model):
        assert observe(model, ids, routing=False).routing == ()


class Splitting(nn.Module):
    """Calls its experts by keyword, in two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Identity()
        self.experts.forward = lambda hidden_states, top_k_index: hidden_states
        self.experts.has_gate = True
        self.experts.is_transposed = False

    def forward(self, index: Tensor) -> None:
        for piece in index.chunk(2):
            self.experts(piece.float(), top_k_index=piece)


def test_keywords_and_several_calls() -> None:
    model = Splitting()
    index = torch.arange(12).view(6, 2)
    with tap_routing(model) as records:
        model(index)
    assert torch.equal(torch.cat(records[0]), index)


def test_model_without_experts() -> None:
    assert find_experts(nn.Linear(2, 2)) == []

"""Packed modules compute what dense ones with the decoded weights compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq import native
from moeq.arch import hooks
from moeq.format.records import pack_matrix
from moeq.layouts.grouped.packed import PackedMatrix
from moeq.layouts.grouped.serving import PackedExperts, PackedLinear
from moeq.quantizers.rtn import Rtn
from moeq.spec import BITS, QuantSpec, stored_bytes


def pack(weights: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    rounded = Rtn().quantize(weights, spec, None)
    return pack_matrix(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)


def packed_mixtral(num_experts: int = 7) -> tuple[MixtralExperts, MixtralExperts]:
    """A packed experts module with another width for every matrix, and a dense twin with its weights."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=40, intermediate_size=72, num_local_experts=num_experts, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    dense = MixtralExperts(config)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.1)
    shapes = {"gate": (72, 40), "up": (72, 40), "down": (40, 72)}
    records, entries, offset = [], [], 0
    for expert in range(num_experts):
        row = []
        for position, (name, shape) in enumerate(shapes.items()):
            spec = QuantSpec(bits=BITS[(expert + position) % len(BITS)], group_size=32)
            stacked = dense.down_proj if name == "down" else dense.gate_up_proj
            weights = stacked.data[expert]
            if name != "down":
                weights = weights[:72] if name == "gate" else weights[72:]
            record = pack(weights, spec)
            records.append(record)
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
            weights.copy_(PackedMatrixView(record, spec, shape))
        entries.append(tuple(row))
    packed_config = AutoConfig.for_model("mixtral", **{k: v for k, v in config.to_dict().items() if k != "model_type"})
    packed = MixtralExperts(packed_config)
    handler = PackedExperts(shapes)
    handler.bind(torch.cat(records), tuple(entries))
    hooks.register_experts()
    hooks.attach_handler(hooks.strip_weights(nn.ModuleDict({"experts": packed}), "experts"), handler)
    return packed, dense


def PackedMatrixView(record: torch.Tensor, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:  # noqa: N802
    from moeq.format.records import decode_matrix

    matrix = PackedMatrix(record=record, spec=spec, shape=shape)
    return decode_matrix(matrix.record, matrix.spec, matrix.shape)


@pytest.mark.parametrize("num_tokens", [1, 3, 50])
def test_experts_of_mixed_widths_equal_their_dense_twin(num_tokens: int) -> None:
    packed, dense = packed_mixtral()
    x_TH = torch.randn(num_tokens, 40, requires_grad=True)
    index_Tk = torch.stack([torch.randperm(7)[:2] for _ in range(num_tokens)])
    weights_Tk = torch.rand(num_tokens, 2)
    answer, wanted = packed(x_TH, index_Tk, weights_Tk), dense(x_TH, index_Tk, weights_Tk)
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(wanted)
    (gradient,) = torch.autograd.grad((answer * probe).sum(), x_TH)
    (wanted_gradient,) = torch.autograd.grad((wanted * probe).sum(), x_TH)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


def test_sentinels_of_expert_parallelism_add_nothing() -> None:
    packed, _ = packed_mixtral()
    x_TH, weights_Tk = torch.randn(2, 40), torch.rand(2, 2)
    index_Tk = torch.tensor([[1, 7], [7, 7]])
    answer = packed(x_TH, index_Tk, weights_Tk)
    alone = packed(x_TH[:1], index_Tk[:1, :1], weights_Tk[:1, :1])
    torch.testing.assert_close(answer[:1], alone)
    assert not answer[1].any()


def test_the_same_expert_twice_counts_twice() -> None:
    packed, _ = packed_mixtral()
    x_TH = torch.randn(1, 40)
    twice = packed(x_TH, torch.tensor([[3, 3]]), torch.tensor([[0.25, 0.5]]))
    once = packed(x_TH, torch.tensor([[3]]), torch.tensor([[0.75]]))
    torch.testing.assert_close(twice, once)


def test_nothing_dense_is_kept() -> None:
    packed, _ = packed_mixtral()
    assert not list(packed.parameters())
    assert {buffer.dtype for buffer in packed.buffers()} == {torch.uint8}
    assert set(packed.state_dict()) == {"moeq.data"}


def test_facts_for_kernels_follow_the_bytes() -> None:
    handler = packed_mixtral()[0].get_submodule("moeq")
    assert handler.layer.facts is None  # on a CPU nobody asks for them
    facts = handler.to("meta").layer.facts
    assert facts.table.device.type == "meta"
    assert facts.table.shape[:2] == (len(handler.entries), 3)
    assert handler.layer.facts is facts


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear(bias: bool) -> None:
    linear = nn.Linear(100, 12, bias=bias)
    spec = QuantSpec(bits=4, group_size=32)
    packed = PackedLinear(linear)
    packed.bind(pack(linear.weight.data, spec), spec)
    x = torch.randn(2, 3, 100, requires_grad=True)
    twin = nn.Linear(100, 12, bias=bias)
    twin.load_state_dict({**linear.state_dict(), "weight": packed.weight})
    torch.testing.assert_close(packed(x), twin(x), rtol=1e-5, atol=1e-6)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, twin.weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)
    assert "bits=4" in repr(packed)


def test_packed_bytes_are_mapped_not_copied(packed_demo: Path) -> None:
    import moeq

    model = moeq.load(packed_demo, device="cpu")
    data = model.model.layers[0].mlp.experts.moeq.data
    assert data.data_ptr() % 64 == 0
    again = moeq.load(packed_demo, device="cpu")
    assert again.model.layers[0].mlp.experts.moeq.data.data_ptr() != data.data_ptr()
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config))), "the stock class"


@pytest.mark.skipif(not native.available(), reason="the torch reference waits for numbers")
def test_a_whole_model_compiles_to_one_graph(packed_demo: Path) -> None:
    import moeq

    model = moeq.load(packed_demo, device="cpu", dtype=torch.float32)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        answer = torch.compile(logits, backend=backend, fullgraph=True)(ids)
        torch.testing.assert_close(answer, logits(ids))
    assert seen.count("moeq.packed_experts") == len(model.model.layers)
    assert "moeq.packed_linear" in seen

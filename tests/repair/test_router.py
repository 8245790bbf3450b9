"""Routers are found in every family by what they feed, and nothing else is."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import moeq
from moeq.errors import OptionError
from moeq.format.manifest import read_manifest
from moeq.repair.router import decoder_blocks, find_routers, trainable

Pack = Callable[[str], Path]

WANTED: dict[str, set[str]] = {
    "deepseek_v3": {"mlp.gate.weight"},  # not the score correction, a buffer
    "gemma4_text": {"router.proj.weight", "router.scale", "router.per_expert_scale"},  # beside attention in its block
    "gpt_oss": {"mlp.router.weight", "mlp.router.bias"},
    "hunyuan_v1_moe": {"mlp.gate.wg.weight"},
    "jamba": {"feed_forward.router.weight"},
    "mixtral": {"mlp.gate.weight"},
    "olmoe": {"mlp.gate.weight"},
    "qwen2_moe": {"mlp.gate.weight"},  # not the gate of the shared expert
    "qwen3_moe": {"mlp.gate.weight"},
}


def paths_of(packed: Path) -> list[str]:
    return [layer.path for layer in read_manifest(packed).layers]


@pytest.mark.parametrize("model_type", WANTED)
def test_family(model_type: str, pack: Pack) -> None:
    packed = pack(model_type)
    model = moeq.load(packed, device="cpu")
    found = find_routers(model, paths_of(packed))
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in found.items())
    layers: dict[str, set[str]] = {}
    for name in found:
        parts = name.split(".")
        layers.setdefault(parts[2], set()).add(".".join(parts[3:]))
    assert len(layers) == len(paths_of(packed))
    assert all(names == WANTED[model_type] for names in layers.values()), layers


def test_a_router_of_many_parts_is_found_whole(pack: Pack) -> None:
    """zaya's router is a small network, with a state that goes from layer to layer."""
    model = moeq.load(packed := pack("zaya"), device="cpu")
    inside = {name for name, _ in model.named_parameters() if ".mlp.gate." in name}
    assert set(find_routers(model, paths_of(packed))) == inside
    assert len(inside) > 20


def test_experts_that_text_never_reaches_have_no_router(pack: Pack) -> None:
    model = moeq.load(packed := pack("ernie4_5_vl_moe"), device="cpu")
    found = find_routers(model, paths_of(packed))
    assert len(paths_of(packed)) == 2 * len(found)
    assert all("text_moe" in name for name in found)


def test_a_model_without_a_trainable_router_is_refused(pack: Pack) -> None:
    model = moeq.load(packed := pack("qwen3_moe"), device="cpu")
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, output: tuple(part.detach() for part in output))
    with pytest.raises(OptionError, match=r"Qwen3MoeForCausalLM has no router .*option router.*router none"):
        find_routers(model, paths_of(packed))


def test_the_model_is_as_before_afterwards(pack: Pack) -> None:
    model = moeq.load(packed := pack("qwen3_moe"), device="cpu").train()
    model.model.norm.eval()
    frozen = model.model.norm.weight.requires_grad_(False)
    find_routers(model, paths_of(packed))
    assert model.training
    assert not model.model.norm.training
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())
    handlers = [model.get_submodule(path).moeq for path in paths_of(packed)]
    assert not any(handler._forward_pre_hooks for handler in handlers)


def test_trainable_frees_exactly_what_it_is_given() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with contextlib.suppress(ZeroDivisionError), trainable(model, [model[0].bias]):
        assert model[0].bias.requires_grad
        assert not model[0].weight.requires_grad
        assert not model[1].training
        raise ZeroDivisionError
    assert model[0].weight.requires_grad
    assert model[1].training


def test_blocks_are_all_decoder_layers(pack: Pack) -> None:
    packed = pack("deepseek_v3")  # its first layer is dense
    model = moeq.load(packed, device="cpu")
    assert len(paths_of(packed)) == 2
    assert decoder_blocks(model, paths_of(packed)) == ("model.layers.0", "model.layers.1", "model.layers.2")

"""Gradients streamed block by block are those of the whole model, for every kind of family."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import zoo
from moeq.arch import hooks
from moeq.calibration import backprop
from moeq.calibration.backprop import Backprop
from moeq.calibration.spill import SpillPool
from moeq.calibration.tap import Asked
from moeq.errors import CalibrationError, OptionError
from moeq.model_parts import MatrixSource, MoeLayer

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",  # adds its shared expert in place
    "deepseek_v2",  # a dense first block
    "deepseek_v4",  # several residual streams, a routing table
    "gemma4_text",  # norms after the experts
    "glm_moe_dsa",  # hands choices of tokens from block to block
    "gpt_oss",  # biases, interleaved, transposed
    "nemotron_h",  # no gate; blocks of one mixer each
    "zaya",  # hands differentiable router states from block to block
)
IDS = torch.randint(3, 120, (5, 12), generator=torch.Generator().manual_seed(0))


class Eager(nn.Module):
    """A handler that lets the experts do what they would do without one."""

    def forward(self, experts: nn.Module, *args: Tensor) -> Tensor:
        return type(experts).forward.__wrapped__(experts, *args)


class Loader:
    """Blocks of a model in memory; notes which are in use."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.blocks = blocks
        self.loaded: list[str] = []
        self.most = 0

    def __call__(self, block: str) -> nn.Module:
        self.loaded.append(block)
        self.most = max(self.most, len(self.loaded))
        return self.blocks[block]

    def unload(self, block: str) -> None:
        self.loaded.remove(block)


def make(model_type: str, tmp_path: Path, model: PreTrainedModel | None = None, **options: Any) -> Backprop:
    hooks.register_experts()
    driver = model or zoo.make_model(model_type)
    layers = []
    for path, experts in driver.named_modules():
        down = experts._parameters.get("down_proj")
        if down is not None and down.ndim == 3:
            hidden = down.shape[2] if experts.is_transposed else down.shape[1]
            shapes = {"up": (1, hidden), "down": (hidden, 1)}
            source = dict.fromkeys(shapes, MatrixSource(name="w", stacked=True))
            block = path[: path.index(".layers.") + len(".layers.") + 1]
            layers.append(
                MoeLayer(path=path, block=block, num_experts=len(down), top_k=1, shapes=shapes, sources=source)
            )
            hooks.attach_handler(experts, Eager().eval())
    parent = layers[0].block.rpartition(".")[0]
    blocks = {f"{parent}.{name}": block for name, block in driver.get_submodule(parent).named_children()}
    return Backprop(
        driver=driver,
        blocks=tuple(blocks),
        loader=Loader(blocks),
        layers=tuple(layers),
        pool=SpillPool(tmp_path),
        device=torch.device("cpu"),
        **options,
    )


def collect(stream: Backprop, ids_NT: Tensor = IDS, **options: Any) -> dict[int, list[Asked]]:
    """Everything that visits see, by layer; stores must be copied, as they go with the layer."""
    seen: dict[int, list[Asked]] = {}

    def visit(layer: int, experts: nn.Module, asked: Asked) -> None:
        assert asked.experts is experts
        copies = {name: getattr(asked, name) for name in ("x_TH", "index_Tk", "weights_Tk", "grad_TH")}
        copies = {name: None if value is None else value.clone() for name, value in copies.items()}
        seen.setdefault(layer, []).append(Asked(experts=experts, **copies))

    stream.run(ids_NT, visit, **options)
    return seen


def gradients(stream: Backprop, ids_NT: Tensor = IDS, **options: Any) -> list[Tensor]:
    """dL/dz of every layer, all sequences."""
    seen = collect(stream, ids_NT, gradients=True, **options)
    assert sorted(seen) == list(range(len(stream.layers)))
    return [torch.cat([asked.grad_TH for asked in seen[layer]]) for layer in sorted(seen)]


def whole_model(
    model: PreTrainedModel, paths: list[str], ids_NT: Tensor, targets: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Gradients of the summed sequence losses at the outputs of some modules, by plain autograd."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def keep(_: nn.Module, args: Any, output: Any, path: str = path) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            if not value.requires_grad:
                value = value.detach().requires_grad_().clone()
            value.retain_grad()
            outputs[path] = value
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    model.requires_grad_(False)
    logits = model(input_ids=ids_NT, use_cache=False).logits.float()[:, :-1]
    wanted = ids_NT[:, 1:] if targets is None else targets(logits.detach())
    losses = functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(dim=1)
    losses.sum().backward()
    for handle in handles:
        handle.remove()
    return [outputs[path].grad.flatten(0, -2) for path in paths]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_autograd_of_the_whole_model(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backprop, "HEAD_BYTES", 4 * zoo.VOCABULARY * 5)  # the head sees 5 tokens at once
    stream = make(model_type, tmp_path, micro_batch_tokens=24)
    wanted = whole_model(stream.driver, [layer.path for layer in stream.layers], IDS)
    for found, value in zip(gradients(stream), wanted, strict=True):
        assert value.norm() > 0
        assert relative(found, value) < 1e-5
    assert stream.loader.loaded == []
    assert stream.loader.most == 1


def test_gradient_of_the_layer_is_that_of_its_experts(tmp_path: Path) -> None:
    """Where nothing follows the experts but the residual sum (GEMQ, derivation of the cost)."""
    stream = make("qwen3_moe", tmp_path)
    blocks = whole_model(stream.driver, [layer.block for layer in stream.layers], IDS)
    for found, wanted in zip(gradients(stream), blocks, strict=True):
        assert relative(found, wanted) < 1e-6


def test_sampled_labels_come_from_the_model(tmp_path: Path) -> None:
    stream = make("mixtral", tmp_path)
    uniform_NT = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3))[:, :-1]
    drawn: list[Tensor] = []

    def targets(logits: Tensor) -> Tensor:
        drawn.append((logits.double().softmax(-1).cumsum(-1) <= uniform_NT.unsqueeze(-1)).sum(-1))
        return drawn[0]

    wanted = whole_model(stream.driver, [layer.path for layer in stream.layers], IDS, targets)
    assert not torch.equal(drawn[0], IDS[:, 1:])
    found = gradients(stream, labels="sampled", seed=3)
    for one, value in zip(found, wanted, strict=True):
        assert relative(one, value) < 1e-5
    other = gradients(stream, labels="sampled", seed=4)
    assert relative(other[0], found[0]) > 0.1


def test_drawing_follows_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 2.0, -1.0, 1.0, -20.0])
    count = 20_000
    uniform_T = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = backprop._draw(logits_V.expand(count, -1), uniform_T)
    torch.testing.assert_close(
        drawn.bincount(minlength=5) / count, logits_V.softmax(0), rtol=0, atol=4 * 0.5 / count**0.5
    )
    edges = backprop._draw(logits_V.expand(2, -1), torch.tensor([0.0, 1.0 - 2**-24]))
    assert edges.tolist()[0] == 0
    assert edges.tolist()[1] in (3, 4)


@pytest.mark.parametrize("labels", ["text", "sampled"])
def test_sizes_of_batches_do_not_matter(labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.calibration.spill.IN_MEMORY_BYTES", 0)
    model = zoo.make_model("mixtral")
    runs = []
    row = 12 * 64 * 4 * (3 + 4)  # what one sequence takes on disk
    for micro, size, head, batches in ((12, 10**9, 1, 1), (36, 2 * row, 7, 3), (10_000, 1, 1000, 5)):
        monkeypatch.setattr(backprop, "HEAD_BYTES", 4 * zoo.VOCABULARY * head)
        done: list[tuple[int, int]] = []

        def progress(count: int, total: int, done: list[tuple[int, int]] = done) -> None:
            done.append((count, total))

        stream = make("", tmp_path, model, micro_batch_tokens=micro, batch_bytes=size, progress=progress)
        runs.append(gradients(stream, labels=labels))
        assert done == [(count, 6 * batches) for count in range(1, 6 * batches + 1)]
    for other in runs[1:]:
        for found, wanted in zip(other, runs[0], strict=True):
            assert relative(found, wanted) < 1e-5
    assert list(tmp_path.iterdir()) == []


def test_as_many_sequences_as_tokens(tmp_path: Path) -> None:
    stream = make("qwen3_moe", tmp_path, micro_batch_tokens=8)
    ids_NT = IDS.view(-1)[:36].view(6, 6)
    wanted = whole_model(stream.driver, [layer.path for layer in stream.layers], ids_NT)
    for found, value in zip(gradients(stream, ids_NT), wanted, strict=True):
        assert relative(found, value) < 1e-5


def test_without_gradients_layers_come_in_order(tmp_path: Path) -> None:
    stream = make("mixtral", tmp_path, micro_batch_tokens=24)
    calls: list[tuple[Tensor, ...]] = []
    for layer in stream.layers:
        stream.driver.get_submodule(layer.path).register_forward_hook(lambda _, args, __: calls.append(args))
    with torch.no_grad():
        stream.driver(input_ids=IDS, use_cache=False)
    wanted, order = calls[:], []
    for layer, (asked,) in collect(stream, gradients=False).items():
        order.append(layer)
        assert asked.grad_TH is None
        for found, value in zip((asked.x_TH, asked.index_Tk, asked.weights_Tk), wanted[layer], strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    assert order == [0, 1, 2]
    assert list(collect(stream, gradients=True)) == [2, 1, 0]


def test_with_gradients_the_questions_are_the_same(tmp_path: Path) -> None:
    stream = make("deepseek_v2", tmp_path, micro_batch_tokens=24)
    forward, backward = collect(stream, gradients=False), collect(stream, gradients=True)
    assert sorted(backward) == sorted(forward)
    for layer, (asked,) in forward.items():
        assert torch.equal(asked.x_TH, backward[layer][0].x_TH)
        assert torch.equal(asked.index_Tk, backward[layer][0].index_Tk)
        assert torch.equal(asked.weights_Tk, backward[layer][0].weights_Tk)


@pytest.mark.parametrize("model_type", ["mixtral", "gemma4_text", "deepseek_v4", "glm_moe_dsa", "zaya"])
def test_the_head_on_the_last_hidden_states(model_type: str, tmp_path: Path) -> None:
    stream = make(model_type, tmp_path, micro_batch_tokens=24)
    with torch.no_grad():
        wanted = stream.driver(input_ids=IDS, use_cache=False).logits
    hidden = stream.last_hidden(IDS)
    assert hidden.shape[:2] == IDS.shape
    for rows in (slice(0, 2), slice(3, 4)):
        found = stream.logits(IDS[rows], hidden[rows])
        torch.testing.assert_close(found, wanted[rows], rtol=1e-4, atol=1e-5)


def test_bfloat16_gradients_are_close_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    exact = gradients(make("mixtral", tmp_path))
    model = zoo.make_model("mixtral").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    stream = make("", tmp_path, model)
    for found, wanted in zip(gradients(stream), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found.float(), wanted) < 0.3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())


def test_gradients_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = zoo.make_model("mixtral")
    with torch.no_grad():
        model.model.layers[2].post_attention_layernorm.weight[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"MoE layer 2 .*float32") as caught:
        gradients(make("", tmp_path, model))
    assert caught.value.tensor == "model.layers.2.mlp.experts"


def test_after_an_error_everything_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.calibration.spill.IN_MEMORY_BYTES", 0)
    stream = make("mixtral", tmp_path)
    modules = dict(stream.driver.named_modules())

    def visit(layer: int, experts: nn.Module, asked: Asked) -> None:
        if layer == 1:
            raise KeyError("enough")

    for wanted in (True, False):
        with pytest.raises(KeyError, match="enough"):
            stream.run(IDS, visit, gradients=wanted)
        assert list(tmp_path.iterdir()) == []
        assert stream.loader.loaded == []
        after = dict(stream.driver.named_modules())
        assert list(after) == list(modules)
        assert all(after[name] is module for name, module in modules.items())


def test_refusals(tmp_path: Path) -> None:
    stream = make("mixtral", tmp_path)
    with pytest.raises(OptionError, match="seqlen"):
        gradients(stream, IDS[:, :1])
    with pytest.raises(OptionError, match="'real' are no labels"):
        gradients(stream, labels="real")
    stream.driver.train()
    with pytest.raises(AssertionError, match="evaluation mode"):
        gradients(stream)
    with pytest.raises(CalibrationError, match=r"OpenAIPrivacyFilter.* 33 classes"):
        gradients(make("openai_privacy_filter", tmp_path))


def test_blocks_that_talk_behind_our_back_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values shared through a dict would be those of the last micro-batch."""
    family = zoo.FAMILIES["gemma4_text"]
    shared = replace(family, text={**family.text, "num_kv_shared_layers": 1})
    monkeypatch.setitem(zoo.FAMILIES, "gemma4_text", shared)
    with pytest.raises(CalibrationError, match=r"Gemma4ForCausalLM: block model\.layers\.0 leaves notes"):
        gradients(make("gemma4_text", tmp_path, micro_batch_tokens=24))

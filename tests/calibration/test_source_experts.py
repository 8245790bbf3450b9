"""Experts read matrix by matrix answer, and differentiate, as the family's own do."""

import pytest
import torch
from torch import Tensor, nn

import zoo
from moeq.arch import hooks
from moeq.calibration.source_experts import SourceExperts
from moeq.model_parts import MatrixSource, MoeLayer

FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "aria", "gemma4_text")
"""Concatenated; interleaved, transposed, with biases; without a gate; transposed; another activation."""


def stock_experts(model_type: str) -> nn.Module:
    """The first experts module of a family's tiny model."""
    hooks.register_experts()
    for module in zoo.make_model(model_type).modules():
        if "down_proj" in module._parameters and module.down_proj.ndim == 3:
            module.config._experts_implementation = "eager"
            return module
    raise AssertionError(model_type)


class Source:
    """Reads matrices out of the stacked parameters, and counts."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts
        self.weights = {name: experts._parameters[name] for name in hooks.WEIGHTS if name in experts._parameters}
        self.reads: list[tuple[int, str]] = []

    def matrix(self, expert: int, projection: str) -> Tensor:
        fused_name = next(name for name in self.weights if name != "down_proj")
        fused = self.weights["down_proj" if projection == "down" else fused_name]
        w_NK = fused.data[expert].T if self.experts.is_transposed else fused.data[expert]
        if projection == "down" or "up_proj" in self.weights:
            return w_NK
        part = int(projection == "up")
        return w_NK.chunk(2)[part] if self.experts.is_concatenated else w_NK[part::2]

    def __call__(self, expert: int, projection: str) -> Tensor:
        self.reads.append((expert, projection))
        return self.matrix(expert, projection)

    def layer(self) -> MoeLayer:
        names = ("up", "down") if "up_proj" in self.weights else ("gate", "up", "down")
        shapes = {name: tuple(self.matrix(0, name).shape) for name in names}
        sources = dict.fromkeys(names, MatrixSource(name="w", stacked=True))
        num_experts = len(self.weights["down_proj"])
        return MoeLayer(path="experts", block="", num_experts=num_experts, top_k=2, shapes=shapes, sources=sources)


def ask(experts: nn.Module, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Answer, gradient of the inputs, gradient of the routing weights; expert 3 is never chosen."""
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(9, hidden, generator=generator).requires_grad_()
    index_Tk = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(9)])
    weights_Tk = torch.rand(9, 2, generator=generator).requires_grad_()
    y_TH = experts(x_TH, index_Tk, weights_Tk)
    y_TH.backward(torch.randn(y_TH.shape, generator=generator))
    assert x_TH.grad is not None
    assert weights_Tk.grad is not None
    return y_TH.detach(), x_TH.grad, weights_Tk.grad


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_the_stock_experts(model_type: str) -> None:
    experts = stock_experts(model_type)
    source = Source(experts)
    layer = source.layer()
    hidden = layer.shapes["down"][0]
    wanted = ask(experts, hidden)
    hooks.strip_weights(nn.ModuleDict({"experts": experts}), "experts")
    hooks.attach_handler(experts, SourceExperts(layer, source))
    for found, value in zip(ask(experts, hidden), wanted, strict=True):
        assert bool(value.abs().sum() > 0)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_weights_are_read_again_not_kept() -> None:
    """Forward saves no weight for backward, and experts without tokens are not read at all."""
    experts = stock_experts("mixtral")
    source = Source(experts)
    layer = source.layer()
    handler = SourceExperts(layer, source)
    x_TH = torch.randn(6, layer.shapes["down"][0], requires_grad=True)
    index_Tk = torch.tensor([[0, 2]]).repeat(6, 1)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TH = handler(experts, x_TH, index_Tk, torch.rand(6, 2))
    assert saved
    assert not {weight.untyped_storage().data_ptr() for weight in source.weights.values()} & set(saved)
    once = [(expert, projection) for expert in (0, 2) for projection in ("gate", "up", "down")]
    assert source.reads == once
    y_TH.sum().backward()
    assert sorted(source.reads) == sorted(once + once)


def test_weights_of_another_dtype_are_converted() -> None:
    experts = stock_experts("mixtral").bfloat16()
    source = Source(experts)
    handler = SourceExperts(source.layer(), source)
    x_TH = torch.randn(4, source.layer().shapes["down"][0])
    y_TH = handler(experts, x_TH, torch.tensor([[0, 1]] * 4), torch.rand(4, 2))
    assert y_TH.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 31, 32, 33])
def test_16_bit_products_of_any_number_of_rows(rows: int) -> None:
    experts = stock_experts("mixtral").bfloat16()
    source = Source(experts)
    layer = source.layer()
    x_TH = torch.randn(rows, layer.shapes["down"][0]).bfloat16()
    weights_Tk = torch.rand(rows, 1).bfloat16()
    answers = []
    for handler in (None, SourceExperts(layer, source)):
        if handler is not None:
            hooks.attach_handler(experts, handler)
        leaf = x_TH.clone().requires_grad_()
        y_TH = experts(leaf, torch.ones(rows, 1, dtype=torch.int64), weights_Tk)
        y_TH.sum().backward()
        answers.append((y_TH.detach(), leaf.grad))
    for found, wanted in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)

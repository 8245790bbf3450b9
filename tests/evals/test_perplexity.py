import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moeq.evals.perplexity import perplexity


def test_agrees_with_the_models_own_loss(model: nn.Module, rows: list[Tensor]) -> None:
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    weights = [len(row) - 1 for row in rows]
    wanted = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    got = perplexity(model, rows, batch_size=3)
    assert got.nll == pytest.approx(wanted, rel=1e-5)
    assert got.value == pytest.approx(math.exp(wanted), rel=1e-5)
    assert got.tokens == sum(weights) == 355
    # The text must be real to the model: a uniform guess would have perplexity 4096.
    assert 100 < got.value < 400


def test_batching_changes_nothing(model: nn.Module, rows: list[Tensor]) -> None:
    values = [perplexity(model, rows, batch_size=size).nll for size in (1, 2, 16)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert perplexity(model, rows, batch_size=2) == perplexity(model, rows, batch_size=2)


def test_stored_dtype_is_close(demo_model: nn.Module, model: nn.Module, rows: list[Tensor]) -> None:
    assert perplexity(demo_model, rows).value == pytest.approx(perplexity(model, rows).value, rel=0.01)


def test_training_mode_is_lifted_and_restored(model: nn.Module, rows: list[Tensor]) -> None:
    trained = copy.deepcopy(model).train()
    trained.config.attention_dropout = 0.5
    for layer in trained.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert perplexity(trained, rows) == perplexity(model, rows)
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_progress_counts_windows(model: nn.Module, rows: list[Tensor]) -> None:
    seen = []
    perplexity(model, rows, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (5, 6), (6, 6)]


class Uniform(nn.Module):
    """Finds all of 8 tokens equally likely; the last position's logits, which predict nothing, are NaN."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 8)
        logits[:, -1] = math.nan
        return SimpleNamespace(logits=logits)


def test_any_callable_with_logits() -> None:
    got = perplexity(Uniform(), [torch.arange(5), torch.arange(3)])
    assert got.value == pytest.approx(8.0)
    assert got.tokens == 6
    assert got.nll_stderr == pytest.approx(0.0, abs=1e-7)

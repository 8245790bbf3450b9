import math

import pytest
import torch
from torch import nn

from moeq.errors import CalibrationError, OptionError
from moeq.evals import forward
from moeq.evals.forward import batches, device_of, evaluating, mean_and_stderr, perplexity_of, target_log_probs


def test_batches_keep_order_and_never_mix_lengths() -> None:
    rows = [torch.arange(n) + 10 * n for n in (4, 4, 4, 3, 3, 4)]
    got = list(batches(rows, 2))
    assert [(start, tuple(ids.shape)) for start, ids in got] == [(0, (2, 4)), (2, (1, 4)), (3, (2, 3)), (5, (1, 4))]
    assert torch.equal(torch.cat([ids.flatten() for _, ids in got]), torch.cat(rows))


def test_batches_refuse_windows_with_nothing_to_predict() -> None:
    for rows in ([], [torch.tensor([1])], [torch.zeros(2, 2, dtype=torch.int64)]):
        with pytest.raises(CalibrationError):
            list(batches(rows, 1))
    with pytest.raises(OptionError, match="batch-size"):
        list(batches([torch.arange(3)], 0))


def test_evaluating_restores_every_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model.train()
    model[1].eval()

    def fail_inside() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert torch.is_inference_mode_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not torch.is_inference_mode_enabled()


def test_device_of_models_without_real_parameters() -> None:
    assert device_of(nn.Identity()).type == "cpu"
    assert device_of(nn.Linear(2, 2, device="meta")).type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_log_probs_in_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(forward, "CHUNK_ELEMENTS", 3 * 17 + 1)
    logits = (10 * torch.randn(2, 8, 17, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(16).view(2, 8)
    wanted = -nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    got = target_log_probs(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.flatten().double(), wanted, rtol=1e-5, atol=1e-5)


def test_stderr_of_equal_windows_is_the_usual_one() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    mean, stderr = mean_and_stderr((values * 5).tolist(), [5] * 4)
    assert mean == pytest.approx(values.mean().item())
    assert stderr == pytest.approx(values.std().item() / 2)


def test_stderr_counts_tokens() -> None:
    assert mean_and_stderr([30.0, 1.0], [10, 1])[0] == pytest.approx(31 / 11)
    assert mean_and_stderr([30.0], [10]) == (3.0, None)
    # A window of the common mean adds no spread, however long it is.
    assert mean_and_stderr([20.0, 2.0], [10, 1])[1] == 0.0


def test_huge_losses_are_infinite_perplexities() -> None:
    assert perplexity_of(1e4) == math.inf
    assert perplexity_of(math.log(7.0)) == pytest.approx(7.0)
    assert math.isnan(perplexity_of(math.nan))

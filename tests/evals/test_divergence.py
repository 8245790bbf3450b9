import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moeq.errors import OptionError
from moeq.evals import forward
from moeq.evals.divergence import divergence
from moeq.evals.perplexity import perplexity


def test_a_model_is_no_way_from_itself(model: nn.Module, rows: list[Tensor]) -> None:
    got = divergence(model, model, rows, batch_size=2)
    assert (got.kl, got.kl_stderr, got.top1_agreement) == (0.0, 0.0, 1.0)
    assert got.perplexity == got.reference_perplexity
    assert got.tokens == 355


def test_matches_a_naive_loop(model: nn.Module, noisy: nn.Module, rows: list[Tensor]) -> None:
    kl, agree = [], []
    for row in rows:
        with torch.inference_mode():
            p = model(input_ids=row[None]).logits[0].double().softmax(-1)
            q = noisy(input_ids=row[None]).logits[0].double().softmax(-1)
        for t in range(len(row) - 1):
            kl.append(float((p[t] * (p[t] / q[t]).log()).sum()))
            agree.append(int(p[t].argmax()) == int(q[t].argmax()))
    got = divergence(noisy, model, rows, batch_size=4)
    assert got.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert got.kl > 0.01
    assert got.top1_agreement == pytest.approx(sum(agree) / len(agree), abs=1.5 / len(agree))
    assert 0.3 < got.top1_agreement < 0.99
    assert got.perplexity == pytest.approx(perplexity(noisy, rows).value, rel=1e-5)
    assert got.reference_perplexity == pytest.approx(perplexity(model, rows).value, rel=1e-5)
    assert got.perplexity != got.reference_perplexity


def test_direction_matters(model: nn.Module, noisy: nn.Module, rows: list[Tensor]) -> None:
    there, back = divergence(noisy, model, rows), divergence(model, noisy, rows)
    assert there.kl != pytest.approx(back.kl, rel=1e-4)
    assert there.perplexity == pytest.approx(back.reference_perplexity, rel=1e-6)


def test_chunks_change_nothing(
    model: nn.Module, noisy: nn.Module, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = divergence(noisy, model, rows)
    monkeypatch.setattr(forward, "CHUNK_ELEMENTS", 5 * 4096)
    pieces = divergence(noisy, model, rows)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-6)
    assert pieces.top1_agreement == whole.top1_agreement
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_spread_over_windows(model: nn.Module, noisy: nn.Module, rows: list[Tensor]) -> None:
    singles = [divergence(noisy, model, [row]) for row in rows[:5]]
    assert all(single.kl_stderr is None for single in singles)
    values = torch.tensor([single.kl for single in singles], dtype=torch.float64)
    assert divergence(noisy, model, rows[:5]).kl_stderr == pytest.approx(float(values.std()) / math.sqrt(5), rel=1e-3)


class Fixed(nn.Module):
    """The same logits at every position."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(logits))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.values.expand(*input_ids.shape, -1))


def test_known_value_in_nats() -> None:
    p, q = Fixed([math.log(3.0), 0.0]), Fixed([0.0, 0.0])
    got = divergence(q, p, [torch.tensor([0, 0, 1])])
    assert got.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert got.reference_perplexity == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.25)) / 2))


def test_tokens_masked_with_minus_infinity() -> None:
    rows = [torch.tensor([0, 1, 0])]
    masked = Fixed([1.0, 0.0, -math.inf])
    assert divergence(masked, masked, rows).kl == 0.0
    # Possible to the reference and impossible to the subject: infinitely surprised.
    assert divergence(masked, Fixed([1.0, 0.0, 0.0]), rows).kl == math.inf


def test_nan_is_not_swept_under_the_rug() -> None:
    rows = [torch.tensor([0, 1, 0])]
    assert math.isnan(divergence(Fixed([math.nan, 0.0]), Fixed([0.0, 0.0]), rows).kl)
    assert math.isnan(divergence(Fixed([0.0, 0.0]), Fixed([math.nan, 0.0]), rows).kl)


def test_vocabularies_must_match() -> None:
    with pytest.raises(OptionError, match="vocabulary has 3 tokens, the model's 2"):
        divergence(Fixed([0.0, 0.0]), Fixed([0.0, 0.0, 0.0]), [torch.tensor([0, 1])])


def test_one_batch_of_logits_at_a_time(model: nn.Module, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from moeq.evals import reference

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    original = reference.observe

    def counting(*args, **kwargs):
        nonlocal most
        seen = original(*args, **kwargs)
        alive.append(weakref.ref(seen.logits_BPV))
        most = max(most, sum(ref() is not None for ref in alive))
        return seen

    monkeypatch.setattr(reference, "observe", counting)
    divergence(model, model, rows)
    assert len(alive) == 12
    assert most == 2

"""Training moves routers and nothing else, downhill, and does not lose small steps to rounding."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeq
from moeq.errors import CalibrationError, OptionError
from moeq.evals.perplexity import perplexity
from moeq.format.manifest import read_manifest
from moeq.repair import tune as tune_module
from moeq.repair.router import decoder_blocks, find_routers, find_vectors, trainable
from moeq.repair.tune import Teacher, Tuned, TuneOptions, held_out_of, recomputing, tune
from moeq.runtime.load import load_any

Pack = Callable[[str], Path]

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")


def opened(packed: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, nn.Parameter], list[str]]:
    model = moeq.load(packed, device="cpu", dtype=dtype)
    paths = [layer.path for layer in read_manifest(packed).layers]
    return model, find_routers(model, paths), paths


def tuned(packed: Path, ids_NT: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> Tuned:
    model, routers, _ = opened(packed, dtype)
    return tune(model, routers, ids_NT, TuneOptions(**options))


def original(packed: Path) -> Teacher:
    model = load_any(packed.parent / "source", "cpu", torch.float32)

    def teacher(start: int, ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids_BT, use_cache=False).logits

    return teacher


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_routers_move_and_the_loss_drops(model_type: str, pack: Pack, ids: Tensor) -> None:
    model, routers, paths = opened(pack(model_type))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = [model.get_submodule(path).moeq.data.clone() for path in paths]
    result = tune(model, routers, ids, TuneOptions(lr=2e-3, epochs=3), blocks=decoder_blocks(model, paths))
    assert result.steps == 12
    assert result.loss_after < result.loss_before - 0.005
    after = model.state_dict()
    assert list(after) == list(before)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == set(routers) == set(result.weights)
    assert all(torch.equal(model.get_submodule(path).moeq.data, data) for path, data in zip(paths, packed, strict=True))
    assert all(torch.equal(after[name], weight) for name, weight in result.weights.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_kl_drops(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    model, routers, _ = opened(packed)
    result = tune(model, routers, ids, TuneOptions(loss="kl", lr=1e-3, epochs=3), teacher=original(packed))
    assert 0 < result.loss_after < 0.97 * result.loss_before


def test_vectors_help_and_only_they_move(pack: Pack, ids: Tensor) -> None:
    """What is trained on some sequences is judged by others."""
    packed = pack("qwen3_moe")
    model, routers, _ = opened(packed)
    everything = routers | find_vectors(model)
    assert len(everything) > len(routers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = TuneOptions(what="model", loss="kl", lr=4e-3, epochs=4)
    held_out = held_out_of([0] * (len(ids) - 2) + [1, 1])
    assert held_out == [[1], [len(ids) - 1]]
    result = tune(model, everything, ids, options, teacher=original(packed), held_out=held_out)
    assert result.steps in {epoch * (len(ids) - 2) for epoch in range(1, 5)}
    assert result.loss_after < 0.97 * result.loss_before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= set(everything)
    assert any("norm" in name for name in changed)


def test_what_helps_no_text_that_was_held_out_is_not_kept(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    model, routers, _ = opened(packed)
    everything = routers | find_vectors(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wild = TuneOptions(what="model", loss="kl", lr=0.3, epochs=2)
    result = tune(model, everything, ids, wild, teacher=original(packed), held_out=[[0], [1]])
    assert result.steps == 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_kl_is_the_mean_over_all_positions(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    model, routers, _ = opened(packed)
    teacher = original(packed)
    with torch.no_grad():
        log_q = model(input_ids=ids).logits.double().log_softmax(-1).flatten(0, 1)
    log_p = teacher(0, ids).double().log_softmax(-1).flatten(0, 1)
    wanted = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    result = tune(model, routers, ids, TuneOptions(loss="kl", lr=1e-9), teacher=teacher)
    assert result.loss_before == pytest.approx(float(wanted), rel=1e-4)


def test_task_loss_is_that_of_perplexity(pack: Pack, ids: Tensor) -> None:
    packed = pack("mixtral")
    wanted = perplexity(opened(packed)[0], list(ids)).nll
    assert tuned(packed, ids, lr=1e-9).loss_before == pytest.approx(wanted, rel=1e-5)


def test_a_large_vocabulary_is_taken_in_chunks(pack: Pack, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack("qwen3_moe")
    whole = tuned(packed, ids, lr=1e-3)
    monkeypatch.setattr(tune_module, "CHUNK_ELEMENTS", 700)  # five of 128 logits each
    monkeypatch.setattr(tune_module, "MEASURED_TOKENS", 1)
    parts = tuned(packed, ids, lr=1e-3)
    assert parts.loss_before == pytest.approx(whole.loss_before, rel=1e-5)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], weight, rtol=0, atol=2e-4)


def test_masked_words_of_the_original_do_no_harm(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    model, routers, _ = opened(packed)
    plain = original(packed)

    def teacher(start: int, ids_BT: Tensor) -> Tensor:
        logits = plain(start, ids_BT)
        logits[..., -5:] = -math.inf
        return logits

    result = tune(model, routers, ids, TuneOptions(loss="kl"), teacher=teacher)
    assert math.isfinite(result.loss_after)
    assert all(bool(weight.isfinite().all()) for weight in result.weights.values())


def test_the_first_step_is_adamw(pack: Pack, ids: Tensor) -> None:
    """w - lr * (wd * w + g / (|g| + eps)): bias correction cancels in the first step."""
    model, routers, _ = opened(pack("gpt_oss"))
    start = {name: parameter.detach().clone() for name, parameter in routers.items()}
    with trainable(model, routers.values()):
        logits = model(input_ids=ids[:1], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    grads = {name: parameter.grad for name, parameter in routers.items()}
    for parameter in routers.values():
        parameter.grad = None
    result = tune(model, routers, ids[:1], TuneOptions(lr=1e-3, weight_decay=0.5))
    for name, weight in result.weights.items():
        grad, seen = grads[name], grads[name].abs() > 1e-6
        wanted = start[name] * (1 - 1e-3 * 0.5) - 1e-3 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(weight[seen], wanted[seen], rtol=1e-4, atol=1e-6)


def test_small_steps_add_up(pack: Pack, ids: Tensor) -> None:
    """Each step is lost in bfloat16; thirty of them are not."""
    packed = pack("qwen3_moe")
    lr = 2e-5
    _, routers, _ = opened(packed, torch.bfloat16)
    start = {name: parameter.detach().clone() for name, parameter in routers.items()}
    result = tuned(packed, ids[:1], torch.bfloat16, lr=lr, epochs=30, weight_decay=0.0)
    moved = lost = 0
    for name, weight in result.weights.items():
        assert weight.dtype == torch.bfloat16
        old = start[name]
        gone = ((old.float() - lr).bfloat16() == old) & ((old.float() + lr).bfloat16() == old)
        moved += int((weight != old).sum())
        lost += int(((weight != old) & gone).sum())
    assert moved
    assert lost > 0.5 * moved


def test_what_is_stored_in_16_bits_is_rounded_once_at_the_end(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    exact = tuned(packed, ids, lr=1e-3)
    model, routers, _ = opened(packed)
    rounded = tune(model, routers, ids, TuneOptions(lr=1e-3), stored=dict.fromkeys(routers, torch.bfloat16))
    for name, weight in rounded.weights.items():
        assert torch.equal(weight, exact.weights[name].bfloat16())
        assert torch.equal(routers[name], weight.float()), "the loss after is that of what is stored"
    assert rounded.loss_after != exact.loss_after


def test_recomputing_changes_no_bit_and_saves_memory(pack: Pack, ids: Tensor) -> None:
    kept: list[int] = []
    grads: list[dict[str, Tensor | None]] = []
    model, routers, paths = opened(pack("deepseek_v3"))
    inside = model.model.layers[1]
    for blocks in ((), decoder_blocks(model, paths)):
        size = 0

        def count(value: Tensor) -> Tensor:
            nonlocal size
            size += value.numel()
            return value

        with (
            trainable(model, routers.values()),
            recomputing(model, blocks),
            torch.autograd.graph.saved_tensors_hooks(count, lambda value: value),
        ):
            logits = model(input_ids=ids, use_cache=False).logits
            kept.append(size)
            logits.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in routers.items()})
        for parameter in routers.values():
            parameter.grad = None
    assert kept[1] < kept[0] / 4
    for name, grad in grads[0].items():
        assert bool(grad.abs().sum() > 0)
        assert torch.equal(grad, grads[1][name])
    assert model.model.layers[1] is inside


def test_the_same_call_gives_the_same_bits(pack: Pack, ids: Tensor) -> None:
    packed = pack("olmoe")
    first, second = (tuned(packed, ids, torch.bfloat16, lr=1e-3) for _ in range(2))
    assert (first.loss_before, first.loss_after) == (second.loss_before, second.loss_after)
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())
    other = tuned(packed, ids.flip(0), torch.bfloat16, lr=1e-3)
    assert any(not torch.equal(weight, other.weights[name]) for name, weight in first.weights.items())


def test_dropout_and_balance_losses_stay_out(pack: Pack, ids: Tensor) -> None:
    packed = pack("mixtral")
    plain = tuned(packed, ids, lr=1e-3)
    model, routers, _ = opened(packed)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 100.0
    model.model.layers[0].input_layernorm.register_forward_hook(
        lambda module, _, output: output * 0 if module.training else output
    )
    model.train()
    result = tune(model, routers, ids, TuneOptions(lr=1e-3))
    assert model.training
    assert all(torch.equal(weight, plain.weights[name]) for name, weight in result.weights.items())


def test_progress_counts_every_sequence(pack: Pack, ids: Tensor) -> None:
    model, routers, _ = opened(pack("qwen3_moe"))
    seen: list[tuple[int, int]] = []
    tune(model, routers, ids, TuneOptions(epochs=2), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 16) for done in range(1, 17)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "none"}, "'none'.*option loss.*task, kl"),
        ({"lr": 0.0}, "option router-lr"),
        ({"lr": math.nan}, "option router-lr"),
        ({"lr": 3e38}, "option router-lr"),
        ({"epochs": 0}, "option router-epochs"),
        ({"what": "everything"}, "option tune"),
        ({"weight_decay": -1.0}, "option weight-decay"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        TuneOptions(**options)
    assert {field.default for field in dataclasses.fields(TuneOptions)} == {"routers", "task", 1e-4, 1}


def test_refusals(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    with pytest.raises(OptionError, match=r"KL needs the original model.*option reference"):
        tuned(packed, ids, loss="kl")
    for bad in (ids[:, :1], ids[:0]):
        with pytest.raises(CalibrationError, match="nothing to predict"):
            tuned(packed, bad)
    model, routers, _ = opened(packed)
    teacher = original(packed)
    with pytest.raises(OptionError, match=r"127 words.*128.*option reference"):
        tune(model, routers, ids, TuneOptions(loss="kl"), teacher=lambda *args: teacher(*args)[..., 1:])


def test_divergence_is_an_error(pack: Pack, ids: Tensor) -> None:
    packed = pack("qwen3_moe")
    model, routers, _ = opened(packed)
    plain, calls = original(packed), []

    def teacher(start: int, ids_BT: Tensor) -> Tensor:
        calls.append(start)
        return plain(start, ids_BT) * (math.nan if len(calls) == 3 else 1.0)

    with pytest.raises(CalibrationError, match=r"nan in step 2.*smaller learning rate"):
        tune(model, routers, ids, TuneOptions(loss="kl"), teacher=teacher)
    assert calls == [0, 0, 1], "measured together, then one a step"
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(CalibrationError, match="when it was measured"):
        tune(model, routers, ids, TuneOptions())
    assert type(model.model.layers[0]).__name__ == "Qwen3MoeDecoderLayer"

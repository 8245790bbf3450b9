import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from moeq.artifacts import EvalResult
from moeq.calibration.tokens import read_text, windows
from moeq.errors import ArtifactError, CalibrationError
from moeq.evals.divergence import divergence
from moeq.evals.perplexity import perplexity
from moeq.evals.reference import save_reference
from moeq.evals.routing import router_overlap
from moeq.evals.suite import Baseline, Suite, evaluate
from moeq.evals.tasks import minimal_pairs, read_pairs


@pytest.fixture(scope="module")
def suite(text_dir: Path) -> Suite:
    text = read_text(text_dir / "eval.txt")
    return Suite(text=text, source="eval.txt", seqlen=64, max_tokens=300, batch_size=2)


def test_a_model_alone(model: nn.Module, demo_tokenizer, suite: Suite, tmp_path: Path) -> None:
    result = evaluate(model, demo_tokenizer, suite, subject="demo")
    rows = windows(demo_tokenizer, suite.text, 64, max_tokens=300)
    wanted = perplexity(model, rows, batch_size=2)
    assert result.metrics == {"perplexity": wanted.value}
    assert (result.subject, result.reference, result.tokens) == ("demo", None, 295)
    assert result.provenance["text"] == "eval.txt"
    assert result.provenance["windows"] == 5
    result.save(tmp_path / "result.json")
    assert EvalResult.load(tmp_path / "result.json") == result


def test_against_a_reference_and_pairs(
    model: nn.Module, noisy: nn.Module, demo_tokenizer, suite: Suite, text_dir: Path, tmp_path: Path
) -> None:
    pairs = tuple(read_pairs(text_dir / "blimp.jsonl")[::67])
    full = Suite(text=suite.text, source="eval.txt", seqlen=64, max_tokens=300, batch_size=2, pairs=pairs)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        noisy,
        demo_tokenizer,
        full,
        subject="noisy",
        reference=Baseline(name="demo", model=model),
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = windows(demo_tokenizer, suite.text, 64, max_tokens=300)
    wanted = divergence(noisy, model, rows, batch_size=2)
    assert result.metrics == {
        "perplexity": wanted.perplexity,
        "reference_perplexity": wanted.reference_perplexity,
        "kl": wanted.kl,
        "kl_stderr": wanted.kl_stderr,
        "top1_agreement": wanted.top1_agreement,
        "router_overlap": router_overlap(noisy, model, rows, batch_size=2).value,
        "blimp": minimal_pairs(noisy, demo_tokenizer, pairs).accuracy,
    }
    assert result.reference == "demo"
    assert sum(result.provenance["blimp"]["fields"].values()) > 0
    assert seen == sorted(seen)
    assert seen[-1] == (25, 25)

    path = tmp_path / "reference"
    save_reference(model, rows, path, batch_size=2)
    stored = evaluate(noisy, demo_tokenizer, full, subject="noisy", reference=Baseline(name="demo", model=path))
    assert stored == result


def test_one_window_has_no_spread(model: nn.Module, demo_tokenizer) -> None:
    short = Suite(text="a few words, less than one window", source="words")
    result = evaluate(model, demo_tokenizer, short, subject="demo", reference=Baseline(name="demo", model=model))
    assert "kl_stderr" not in result.metrics
    assert result.metrics["kl"] == 0.0
    assert result.metrics["router_overlap"] == 1.0


def test_a_broken_model_is_no_result(model: nn.Module, demo_tokenizer, suite: Suite) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[7, 0] = math.nan
    with pytest.raises(ArtifactError, match="'perplexity' is not finite"):
        evaluate(broken, demo_tokenizer, suite, subject="broken")


def test_a_foreign_tokenizer_is_noticed(model: nn.Module, suite: Suite) -> None:
    class Foreign:
        bos_token_id = None
        eos_token_id = None

        def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [5, 4096, 7]}

    with pytest.raises(CalibrationError, match="has token 4096, the model knows 4096"):
        evaluate(model, Foreign(), suite, subject="demo")

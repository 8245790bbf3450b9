"""The real lm-evaluation-harness on packed checkpoints, with tasks whose data is here."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeq
from moeq.errors import CalibrationError, OptionError
from moeq.evals.protocols import PROTOCOLS, protocol
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import evaluate

pytest.importorskip("lm_eval")

HEAD = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: ""
metadata: {{version: 1.0}}
"""
CHOICE = (
    HEAD
    + """output_type: multiple_choice
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
)
ROLLING = (
    HEAD
    + """output_type: loglikelihood_rolling
doc_to_target: "{{{{good}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""
)
PAIRS = [
    ("The old man looked at the sea.", "The old man looked at at sea the."),
    ("She said that she had been there before.", "She said that had she there before been."),
    ("He went to the house and sat down.", "He went the to house sat and down."),
    ("It is a good day.", "It a is day good."),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    data = root / "pairs.jsonl"
    data.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in PAIRS))
    (root / "pairs.yaml").write_text(CHOICE.format(task="moeq_pairs", file=data))
    (root / "text.yaml").write_text(ROLLING.format(task="moeq_text", file=data))
    return root


def test_figures_are_those_of_the_model(packed_demo: Path, tasks: Path, text_dir: Path) -> None:
    """Against log-probabilities of our own; a text is measured in the same call."""
    seen: list[tuple[int, int]] = []
    found = evaluate.run(
        packed_demo,
        text_dir / "eval.txt",
        seqlen=64,
        max_tokens=256,
        tasks="moeq_pairs, moeq_text",
        task_path=tasks,
        batch_size=3,
        device="cpu",
        questions=lambda done, total: seen.append((done, total)),
    )
    model, tokenizer = load_any(packed_demo, "cpu"), load_tokenizer(packed_demo)

    def total(text: str, start: int) -> float:
        ids = [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            logs_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return sum(float(row_V[token]) for row_V, token in zip(logs_TV, ids[1:], strict=False))

    start = tokenizer.eos_token_id
    right = sum(total(good, start) > total(bad, start) for good, bad in PAIRS) / len(PAIRS)
    assert found.metrics["moeq_pairs/acc"] == right > 0.5
    words = sum(len(good.split()) for good, _ in PAIRS)
    wanted = math.exp(-sum(total(good, start) for good, _ in PAIRS) / words)
    assert found.metrics["moeq_text/word_perplexity"] == pytest.approx(wanted, rel=0.02)  # bfloat16, other batches
    assert (
        found.metrics["perplexity"]
        == moeq.evaluate(packed_demo, text_dir / "eval.txt", seqlen=64, max_tokens=256).metrics["perplexity"]
    )
    assert found.provenance["harness"]["questions"] == {"moeq_pairs": 4, "moeq_text": 4}
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.nightly
def test_limit_and_errors(packed_demo: Path, tasks: Path) -> None:
    found = evaluate.run(packed_demo, tasks="moeq_pairs", task_path=tasks, limit=2, device="cpu")
    assert found.provenance["harness"]["questions"] == {"moeq_pairs": 2}
    assert set(found.metrics) == {"moeq_pairs/acc"}
    with pytest.raises(OptionError, match="no task 'moeq_pears'"):
        evaluate.run(packed_demo, tasks="moeq_pears", task_path=tasks, device="cpu")
    with pytest.raises(OptionError, match="limit"):
        evaluate.run(packed_demo, tasks="moeq_pairs", limit=0)
    with pytest.raises(OptionError, match="nothing to measure"):
        evaluate.run(packed_demo)
    (tasks / "broken.yaml").write_text(CHOICE.format(task="moeq_broken", file=tasks / "absent.jsonl"))
    with pytest.raises(OptionError, match="the harness failed"):
        evaluate.run(packed_demo, tasks="moeq_broken", task_path=tasks, device="cpu")
    (tasks / "broken.yaml").unlink()


def test_presets(packed_demo: Path, text_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given beside a preset wins; a text that cannot be had is said with its name."""
    found = evaluate.run(packed_demo, text_dir / "eval.txt", preset="gptq-paper", max_tokens=4096, device="cpu")
    assert (found.provenance["preset"], found.provenance["seqlen"], found.provenance["windows"]) == (
        "gptq-paper",
        2048,
        2,
    )

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(CalibrationError, match="wikitext-2-raw-v1, joined by blank lines"):
        evaluate.run(packed_demo, preset="gptq-paper")
    with pytest.raises(OptionError, match="is no way of measuring"):
        protocol("gptq")


@pytest.mark.nightly
def test_the_harness_knows_the_tasks_of_presets() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert {task for each in PROTOCOLS.values() for task in each.tasks} <= known


@pytest.mark.nightly
def test_its_own_command_knows_the_model_type(packed_demo: Path, tasks: Path) -> None:
    words = [sys.executable, "-m", "moeq.evals.harness", "run", "--model", "moeq", "--tasks", "moeq_pairs"]
    words += ["--model_args", f"pretrained={packed_demo}", "--include_path", str(tasks)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "moeq_pairs" in done.stdout

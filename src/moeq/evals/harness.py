"""Packed checkpoints in lm-evaluation-harness: the model type "moeq", and tasks for `moeq eval`.

The harness has no entry points for model types, so its command knows ours when it is started through this module:

    python -m moeq.evals.harness run --model moeq --model_args pretrained=DIR --tasks arc_easy
"""

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeq.arch.gguf_source import open_source
from moeq.errors import OptionError
from moeq.evals.forward import Progress
from moeq.runtime.load import NO_LIMIT, context_length, load_any, load_tokenizer

try:
    import lm_eval
    from lm_eval.api import task
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise OptionError(
        f"tasks need a package that is missing: {error.name}", option="tasks", fix="pip install 'moeq[eval]'"
    ) from error


USUAL_LENGTH: Final = 2048
"""Tokens of a question at most, for models that do not say how many they hold."""


@register_model("moeq")
class PackedLM(HFLM):
    """A packed checkpoint, or any causal model that transformers loads, for the harness.

    Args:
        pretrained: directory, hub id, or a model that is loaded.
        tokenizer: the tokenizer of a loaded model.
        device: where to compute.
        trust_remote_code: code in the directory may run.
        told: called with (sequences done, sequences known so far); the harness's bars are then off.
        options: those of the harness's own class.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        told: Progress | None = None,
        **options: Any,
    ) -> None:
        self.told, self.done, self.total = told, 0, 0
        if not isinstance(pretrained, PreTrainedModel):
            directory = open_source(pretrained)
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
            if str(device).startswith("cuda") and not torch.cuda.is_available():  # what its command says if you do not
                device = None
            pretrained = load_any(directory, device or "auto", trust_remote_code=trust_remote_code)
        longest = context_length(pretrained)
        usual = {"backend": "causal", "max_length": USUAL_LENGTH if longest == NO_LIMIT else longest}
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **usual | options)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the harness has it; its bars are off while `told` is told."""
        self.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.told is not None)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Likewise."""
        self.total += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.told is not None)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Likewise."""
        self.total += len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self.told is not None)

    def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
        if self.told is not None:
            self.done += len(inps)
            self.told(min(self.done, self.total), self.total)
        return super()._model_call(inps, *args, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """What is asked.

    Attributes:
        names: tasks and groups of the harness.
        shots: examples shown before each question; None takes each task's own number.
        limit: questions of each task at most; such figures are for trying out only.
        path: directory with further task files.
        chat: questions go through the chat template.
        seed: of the choice of examples.
        batch_size: questions per forward pass.
    """

    names: tuple[str, ...]
    shots: int | None = None
    limit: int | None = None
    path: Path | None = None
    chat: bool = False
    seed: int = 0
    batch_size: int = 1


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, progress: Progress | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Values by "task/metric", and what the figures depend on.

    Raises:
        OptionError: a task that the harness does not know, or data that cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks)
    asked = PackedLM(model, tokenizer, batch_size=tasks.batch_size, told=progress or _silent)
    try:
        found = _without_bars(
            lm_eval.simple_evaluate,
            model=asked,
            tasks=list(tasks.names),
            num_fewshot=tasks.shots,
            limit=tasks.limit,
            task_manager=manager,
            apply_chat_template=tasks.chat,
            log_samples=False,
            random_seed=tasks.seed,
            numpy_random_seed=tasks.seed,
            torch_random_seed=tasks.seed,
            fewshot_random_seed=tasks.seed,
        )
    except (OSError, ValueError) as error:  # data that is not here, files that are no tasks
        message = " ".join(str(error).split())[:300]
        fix = "check the network, or give --task-path with tasks whose data is here"
        raise OptionError(f"the harness failed: {message}", option="tasks", fix=fix) from error
    assert found is not None
    metrics, errors = _metrics(found["results"])
    facts = {
        "tasks": list(tasks.names),
        "shots": dict(found.get("n-shot", {})),
        "versions": {name: found.get("versions", {}).get(name) for name in sorted(found["results"])},
        "questions": {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()},
        "limit": tasks.limit,
        "chat": tasks.chat,
        "seed": tasks.seed,
        "stderr": errors,
        "lm_eval": lm_eval.__version__,
    }
    return metrics, facts


def _manager(tasks: Tasks) -> TaskManager:
    """What knows all tasks that are asked for.

    Reading the thousands of files of the harness takes ten seconds: tasks of the user's directory need not wait.
    """
    path = None if tasks.path is None else str(tasks.path)
    for own in (False, True) if path is not None else (True,):
        manager = TaskManager(include_path=path, include_defaults=own)
        unknown = [name for name in tasks.names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise OptionError(f"the harness has no task {unknown[0]!r}", option="tasks", fix="lm-eval ls tasks lists them")


def _silent(_done: int, _total: int) -> None:
    pass


def _without_bars(call: Callable[..., Any], **arguments: Any) -> Any:
    """The harness's bar of questions that are written down has no switch: for the call it is another tqdm."""
    before = task.tqdm
    task.tqdm = functools.partial(before, disable=True)
    try:
        return call(**arguments)
    finally:
        task.tqdm = before


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """ "task/metric" -> value and standard error; a filter is named only where a metric has several."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, row in results.items():
        names = [key.partition(",")[0] for key in row]
        for key, value in row.items():
            name, _, strained = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or name == "sample_len":
                continue
            several = names.count(name) > 1
            error = name.endswith("_stderr")
            label = f"{task}/{name.removesuffix('_stderr')}" + (f"/{strained}" if several else "")
            (errors if error else metrics)[label] = float(value)
    return metrics, errors


def main() -> None:
    """The harness's own command, which now knows the model type."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.modules["moeq.evals.harness"] = sys.modules["__main__"]
    main()

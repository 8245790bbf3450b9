"""Checkpoints side by side: bytes, quality on the same texts, speed."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from moeq.arch.gguf_source import open_source
from moeq.calibration.tokens import read_text
from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.checkpoint.read import file_bytes, read_headers
from moeq.errors import AlreadyQuantizedError, NotMoeError, OptionError
from moeq.evals import suite
from moeq.evals.tasks import minimal_pairs, read_pairs
from moeq.notebook import Shows, Table
from moeq.progress import Progress
from moeq.report.tables import human_bytes
from moeq.runtime.growing import growing_cache
from moeq.runtime.load import load_any, load_tokenizer, set_exact
from moeq.stages import inspect
from moeq.stages.evaluate import baseline_of

STEPS: Final = 24
"""Tokens decoded to measure speed."""
PROMPT: Final = 64
PAIRS: Final = "minimal pairs"
"""What stands among the texts where minimal pairs were asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One checkpoint.

    Attributes:
        name: its directory's name, with a number where several have the same.
        model: its directory.
        kind: "moeq", the quant_method of another tool, or "plain".
        stored_bytes: its weight files.
        expert_bits_per_weight: stored bits of an expert weight; None where experts are not told apart.
        quality: text -> metric -> value, as `moeq eval` has them.
        decode_tokens_per_second: one token after the other, by the median step; None if not measured.
    """

    name: str
    model: str
    kind: str
    stored_bytes: int
    expert_bits_per_weight: float | None
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    decode_tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport(Shows):
    """What was measured; field names are those of the JSON document (docs/json.md)."""

    reference: str | None
    texts: dict[str, str]
    seqlen: int
    tokens: dict[str, int]
    checkpoints: tuple[Compared, ...]

    def tables(self) -> Iterator[Table]:
        """A row for each checkpoint."""
        metric, word = ("perplexity", "perplexity") if self.reference is None else ("kl", "KL")
        pairs = any(PAIRS in each.quality for each in self.checkpoints)
        header = ["checkpoint", "made by", "weights", "bits/weight", *(f"{word} {text}" for text in self.texts)]
        header += ["same top token"] * (metric == "kl") + [PAIRS] * pairs + ["tokens/s"]
        rows = []
        for each in self.checkpoints:
            bits, speed = each.expert_bits_per_weight, each.decode_tokens_per_second
            row = [each.name, each.kind, human_bytes(each.stored_bytes), "" if bits is None else f"{bits:.3f}"]
            row += [f"{each.quality[text][metric]:.4g}" for text in self.texts]
            if metric == "kl":
                row.append(f"{statistics.fmean(each.quality[text]['top1_agreement'] for text in self.texts):.1%}")
            if pairs:
                row.append(f"{each.quality[PAIRS]['blimp']:.1%}")
            rows.append((*row, "" if speed is None else f"{speed:.1f}"))
        yield Table(title=f"against {self.reference}" if self.reference else "side by side", header=header, rows=rows)


def run(
    models: Sequence[str | Path],
    texts: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    pairs: str | Path | None = None,
    seqlen: int = 2048,
    max_tokens: int | None = None,
    batch_size: int = 1,
    speed: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CompareReport:
    """Measure checkpoints on the same texts, one in memory at a time beside the reference.

    Args:
        models: packed checkpoints, or any causal models that transformers loads.
        texts: text or jsonl files.
        reference: the original: adds KL, top-1 agreement and router overlap.
        pairs: minimal pairs, jsonl: adds accuracy.
        seqlen: tokens per window.
        max_tokens: use only the start of each text.
        batch_size: windows per forward pass.
        speed: measure tokens per second too.
        device: where to compute.
        trust_remote_code: code in a model's directory may run, where transformers does not have the model.
        progress: called as checkpoints are done.

    Raises:
        OptionError: nothing to compare, or numbers that make no sense.
        CheckpointError, PackedError, CalibrationError: a model or a text cannot be read.
    """
    if not models:
        raise OptionError("there is nothing to compare", fix="give directories")
    if not texts:
        raise OptionError("there is no text to compare on", option="text", fix="give one or more files")
    directories = _named([open_source(model) for model in models], lambda path: path.resolve().name)
    named = _named([Path(text) for text in texts], lambda path: path.stem)
    plans = {
        name: suite.Suite(
            text=read_text(path), source=path.name, seqlen=seqlen, max_tokens=max_tokens, batch_size=batch_size
        )
        for name, path in named.items()
    }
    minimal = tuple(read_pairs(Path(pairs))) if pairs is not None else ()
    facts = {name: _facts(name, path) for name, path in directories.items()}
    baseline = None if reference is None else baseline_of(reference, device, trust_remote_code)
    found, tokens = [], dict.fromkeys(named, 0)
    for number, (name, path) in enumerate(directories.items()):
        if progress is not None:
            progress("checkpoints", number, len(directories))
        loaded = load_any(path, device, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        quality = {}
        for text, plan in plans.items():
            result = suite.evaluate(loaded, tokenizer, plan, subject=str(path), reference=baseline)
            quality[text], tokens[text] = result.metrics, result.tokens
        if minimal:
            accuracy = minimal_pairs(loaded, tokenizer, minimal)
            quality[PAIRS] = {"blimp": accuracy.accuracy}
        rate = decoding(loaded) if speed else None
        found.append(replace(facts[name], quality=quality, decode_tokens_per_second=rate))
        del loaded
    if progress is not None:
        progress("checkpoints", len(directories), len(directories))
    return CompareReport(
        reference=None if baseline is None else baseline.name,
        texts={name: str(path) for name, path in named.items()},
        seqlen=seqlen,
        tokens=tokens,
        checkpoints=tuple(found),
    )


def _named(paths: Sequence[Path], name: Callable[[Path], str]) -> dict[str, Path]:
    """Names that differ -> paths."""
    found: dict[str, Path] = {}
    for path in paths:
        same = sum(name(path) == name(other) for other in found.values())
        found[f"{name(path)} ({same + 1})" if same else name(path)] = path
    return found


def _facts(name: str, path: Path) -> Compared:
    """What its files say."""
    config = read_config(path / CONFIG_NAME)
    try:
        bits: float | None = inspect.run(path).expert_bits_per_weight
    except (NotMoeError, AlreadyQuantizedError):  # it is measured all the same
        bits = None
    return Compared(
        name=name,
        model=str(path),
        kind=str((config.get("quantization_config") or {}).get("quant_method", "plain")),
        stored_bytes=file_bytes(path, read_headers(path)),
        expert_bits_per_weight=bits,
    )


def decoding(model: PreTrainedModel) -> float:
    """Tokens per second, one after the other behind a short prompt, as people run it: by the median step."""
    set_exact(model, None)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids_1T = torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    steps, cache = [], growing_cache(model)
    with torch.inference_mode():
        for _ in range(STEPS + 1):
            started = time.perf_counter()
            done: Any = model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
            cache, ids_1T = done["past_key_values"], done["logits"][:, -1:].argmax(-1)
            ids_1T.tolist()  # waits for a GPU
            steps.append(time.perf_counter() - started)
    return 1 / statistics.median(steps[1:])

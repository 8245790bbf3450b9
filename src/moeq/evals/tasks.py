"""Zero-shot accuracy on minimal pairs: is the good sentence likelier than the bad one? (BLiMP, Warstadt et al. 2020.)

Legend: B sentences, T tokens, P = T - 1 predicted positions.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeq.calibration.tokens import Tokenizer, read_json_lines
from moeq.errors import CalibrationError, OptionError
from moeq.evals.forward import Progress, device_of, evaluating, target_log_probs


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimalPair:
    """Two sentences that differ in one point of grammar.

    Attributes:
        field: what the pair is about, such as "syntax".
        good: the acceptable sentence.
        bad: the other one.
    """

    field: str
    good: str
    bad: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAccuracy:
    """Result of `minimal_pairs`.

    Attributes:
        accuracy: share of pairs whose good sentence is likelier; a tie is a miss.
        stderr: binomial standard error of `accuracy`.
        fields: field -> accuracy.
        pairs: number of pairs.
    """

    accuracy: float
    stderr: float
    fields: dict[str, float]
    pairs: int


def read_pairs(path: Path) -> list[MinimalPair]:
    """Pairs from a .jsonl file in BLiMP's form: {"field", "sentence_good", "sentence_bad"}.

    Raises:
        CalibrationError: the file cannot be read, is empty, or a line lacks a key.
    """
    pairs = []
    for line, row in read_json_lines(path):
        values = [row.get(key) for key in ("field", "sentence_good", "sentence_bad")]
        field, good, bad = values
        if not (isinstance(field, str) and isinstance(good, str) and isinstance(bad, str)):
            raise CalibrationError(
                f'line {line} lacks one of the strings "field", "sentence_good", "sentence_bad"',
                file=path,
                fix="give a file in BLiMP's form",
            )
        pairs.append(MinimalPair(field=field, good=good, bad=bad))
    if not pairs:
        raise CalibrationError("there are no pairs in it", file=path, fix="give a file in BLiMP's form")
    return pairs


def minimal_pairs(
    model: nn.Module,
    tokenizer: Tokenizer,
    pairs: Sequence[MinimalPair],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> PairAccuracy:
    """Accuracy on minimal pairs by the total log-probability of each sentence.

    A sentence is preceded by the tokenizer's start token, or its end token if it has no start; if it
    has neither, the first token of the sentence is not scored.

    Args:
        model: called as model(input_ids=..., attention_mask=..., use_cache=False), returns `.logits`.
        tokenizer: the model's tokenizer.
        pairs: what to compare.
        batch_size: sentences per forward pass.
        progress: called with (sentences done, sentences).

    Raises:
        CalibrationError: no pairs, or a sentence with nothing to score.
    """
    if not pairs:
        raise CalibrationError("there are no minimal pairs", fix="give at least one pair")
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    rows = [_encode(tokenizer, sentence) for sentence in sentences]
    scores = sentence_log_probs(model, rows, batch_size=batch_size, progress=progress)
    hits: dict[str, list[bool]] = defaultdict(list)
    for pair, good, bad in zip(pairs, scores[::2], scores[1::2], strict=True):
        hits[pair.field].append(good > bad)
    accuracy = sum(map(sum, hits.values())) / len(pairs)
    return PairAccuracy(
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(pairs)),
        fields={field: sum(found) / len(found) for field, found in sorted(hits.items())},
        pairs=len(pairs),
    )


def sentence_log_probs(
    model: nn.Module, rows: Sequence[Tensor], *, batch_size: int = 32, progress: Progress | None = None
) -> list[float]:
    """Sum of log p(token | tokens before it) of each row but for its first token, in nats.

    Rows of similar length share a batch, padded on the right: with causal attention no real token
    sees a padded one, and the attention mask says so too.

    Args:
        model: a causal language model.
        rows: int64 ids, 1-D, two or more each.
        batch_size: rows per forward pass.
        progress: called with (rows done, rows).
    """
    if batch_size < 1:
        raise OptionError(f"{batch_size} is too small", option="batch-size", fix="give 1 or more")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    scores = [0.0] * len(rows)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, score in zip(chosen, _batch_log_probs(model, [rows[i] for i in chosen]), strict=True):
                scores[index] = score
            if progress is not None:
                progress(start + len(chosen), len(rows))
    return scores


def _batch_log_probs(model: nn.Module, rows: Sequence[Tensor]) -> list[float]:
    # Token 0 pads: it exists in every vocabulary, and what it is does not matter.
    ids_BT = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths_B = torch.tensor([len(row) for row in rows])
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    device = device_of(model)
    logits_BTV = model(
        input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device, torch.int64), use_cache=False
    ).logits
    log_probs_BP = target_log_probs(logits_BTV[:, :-1], ids_BT[:, 1:])
    scored_BP = torch.where(mask_BT[:, 1:].to(log_probs_BP.device), log_probs_BP, 0.0)
    scores: list[float] = scored_BP.double().sum(dim=1).tolist()
    return scores


def _encode(tokenizer: Tokenizer, sentence: str) -> Tensor:
    ids: list[int] = tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        ids = [start, *ids]
    if len(ids) < 2:
        raise CalibrationError(f"the sentence {sentence!r} has nothing to score", fix="give longer sentences")
    return torch.tensor(ids, dtype=torch.int64)

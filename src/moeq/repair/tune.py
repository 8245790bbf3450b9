"""Trains the routers of a packed model, and nothing else (GEMQ, section on router fine-tuning).

Experts that were rounded answer differently, so the routers' old preferences are no longer the best ones. Their
parameters are a few hundredths of a percent of the model: they keep their 16 bits, and tuning them costs no byte.

A step of AdamW at the paper's rate of 1e-4 is about one unit in the last place of a bfloat16 weight: most of it
would be lost to rounding. The sums are therefore kept in float32; the model computes with their rounded copies.

Legend: N sequences, B sequences of a batch (here 1), T tokens, R rows (positions), V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeq.calibration.standin import replaced
from moeq.errors import CalibrationError, OptionError
from moeq.repair.router import trainable

Teacher = Callable[[int, Tensor], Tensor]
"""(index of the first sequence, ids (B, T)) -> the original model's logits (B, T, V)."""
Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences), the measuring of the loss before and after included."""

LOSSES = ("task", "kl")
BETAS = (0.9, 0.999)
EPS = 1e-8
CHUNK_ELEMENTS = 1 << 24
"""Logits that are widened to float32 at a time: 64 MiB."""
MEASURED_TOKENS = 2048
"""Tokens that are measured at once, but at least one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """How routers are trained; the defaults are the paper's (GEMQ, implementation details).

    Attributes:
        loss: "task", the mean cross-entropy of the next token; "kl", the mean KL(original || packed).
        lr: AdamW's rate, constant.
        epochs: passes over the sequences, in their order, one sequence a step.
        weight_decay: AdamW's decoupled decay.
    """

    loss: str = "task"
    lr: float = 1e-4
    epochs: int = 1
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise OptionError(f"{self.loss!r} is no loss", option="loss", fix=f"choose one of {', '.join(LOSSES)}")
        if not 0 < self.lr <= 1:
            raise OptionError(f"{self.lr} is no learning rate", option="router-lr", fix="the paper's is 1e-4")
        if self.epochs < 1:
            raise OptionError(f"{self.epochs} is too small", option="router-epochs", fix="give 1 or more")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise OptionError(f"{self.weight_decay} is negative", option="weight-decay", fix="give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuned:
    """What training did.

    Attributes:
        weights: parameter name -> trained value on the CPU, in the dtype it is stored in; the model holds the same.
        loss_before: mean loss over all sequences before the first step, in nats per predicted token.
        loss_after: the same with the trained, rounded routers.
        steps: optimizer steps.
    """

    weights: dict[str, Tensor]
    loss_before: float
    loss_after: float
    steps: int


def tune(
    model: nn.Module,
    routers: Mapping[str, nn.Parameter],
    ids_NT: Tensor,
    options: TuneOptions,
    *,
    blocks: Iterable[str] = (),
    stored: Mapping[str, torch.dtype] | None = None,
    teacher: Teacher | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Train the routers of a packed model in place; everything else keeps its bytes.

    Balance losses of the family play no part: the loss is computed here, from the logits alone. There is no
    dropout (evaluation mode), no warm-up and no clipping. On a CPU the same call gives the same bits.

    Args:
        model: a packed model of `moeq.runtime.load`.
        routers: its router parameters, by name (`moeq.repair.router.find_routers`).
        ids_NT: the sequences, int64.
        options: how to train.
        blocks: module paths of decoder blocks that forget their activations and compute them again in the
            backward pass (`moeq.repair.router.decoder_blocks`): memory is then that of one block instead of all.
        stored: parameter -> dtype of its tensor on disk, to which it is rounded at the end; its own by default.
        teacher: the original's logits, for the loss "kl".
        progress: called after each sequence.

    Raises:
        OptionError: the teacher is missing or has another vocabulary.
        CalibrationError: a sequence predicts nothing, or the loss is not finite.
    """
    if options.loss == "kl" and teacher is None:
        raise OptionError("KL needs the original model", option="reference", fix="give it, or use the loss task")
    if ids_NT.shape[0] < 1 or ids_NT.shape[1] < 2:
        raise CalibrationError(
            f"{ids_NT.shape[0]} sequences of {ids_NT.shape[1]} tokens leave nothing to predict",
            fix="give at least one sequence of two tokens",
        )
    objective = _Objective(model=model, loss=options.loss, teacher=teacher if options.loss == "kl" else None)
    count = len(ids_NT)
    tick = _ticker(progress, count * (options.epochs + 2))
    with trainable(model, routers.values()), recomputing(model, blocks):
        before = _measure(objective, ids_NT, tick)
        masters = _train(objective, routers, ids_NT, options, tick)
        dtypes = {name: parameter.dtype for name, parameter in routers.items()} | dict(stored or {})
        weights = {name: master.to(dtypes[name]) for name, master in masters.items()}
        _assign(routers, weights)
        after = _measure(objective, ids_NT, tick)
    return Tuned(
        weights={name: weight.cpu() for name, weight in weights.items()},
        loss_before=before,
        loss_after=after,
        steps=count * options.epochs,
    )


def _train(
    objective: "_Objective",
    routers: Mapping[str, nn.Parameter],
    ids_NT: Tensor,
    options: TuneOptions,
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    """Step through the sequences; the model's parameters always hold the rounded masters."""
    masters = {name: parameter.detach().to(torch.float32, copy=True) for name, parameter in routers.items()}
    optimizer = torch.optim.AdamW(
        masters.values(), lr=options.lr, betas=BETAS, eps=EPS, weight_decay=options.weight_decay
    )
    for epoch in range(options.epochs):
        for index in range(len(ids_NT)):
            loss = objective(index, ids_NT[index : index + 1])
            _check_finite(float(loss.detach()), epoch * len(ids_NT) + index)
            loss.backward()
            for name, parameter in routers.items():
                masters[name].grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            _assign(routers, masters)
            tick()
    return masters


@torch.no_grad()
def _assign(routers: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in routers.items():
        parameter.copy_(values[name])


@torch.no_grad()
def _measure(objective: "_Objective", ids_NT: Tensor, tick: Callable[[], None]) -> float:
    """The mean loss over all sequences; short ones go together, since every pass decodes all experts it needs."""
    step = max(1, MEASURED_TOKENS // ids_NT.shape[1])
    losses = []
    for start in range(0, len(ids_NT), step):
        ids_BT = ids_NT[start : start + step]
        losses.append(float(objective(start, ids_BT)) * len(ids_BT))
        _check_finite(losses[-1], None)
        for _ in ids_BT:
            tick()
    return math.fsum(losses) / len(ids_NT)


def _check_finite(loss: float, step: int | None) -> None:
    if not math.isfinite(loss):
        when = "when it was measured" if step is None else f"in step {step + 1}"
        raise CalibrationError(
            f"the loss of the routers became {loss} {when}", fix="use a smaller learning rate, or look at the model"
        )


def _ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Objective:
    """The loss of one batch, a scalar in nats per position."""

    model: nn.Module
    loss: str
    teacher: Teacher | None

    def __call__(self, start: int, ids_BT: Tensor) -> Tensor:
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        largest = int(ids_BT.max())
        ids_BT = ids_BT.to(device)
        wanted_RV = None
        if self.teacher is not None:
            wanted_RV = self.teacher(start, ids_BT).detach().flatten(0, 1).to(device)
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        if largest >= logits_BTV.shape[-1]:
            raise CalibrationError(
                f"the text has token {largest}, the model predicts {logits_BTV.shape[-1]}",
                fix="use the tokenizer that belongs to the model",
            )
        if wanted_RV is None:
            return _mean(_cross_entropy, logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        if wanted_RV.shape[-1] != logits_BTV.shape[-1]:
            raise OptionError(
                f"the original has {wanted_RV.shape[-1]} words, the packed model {logits_BTV.shape[-1]}",
                option="reference",
                fix="give the model that this one was made from",
            )
        return _mean(_divergence, logits_BTV.flatten(0, 1), wanted_RV)


def _mean(term: Callable[[Tensor, Tensor], Tensor], logits_RV: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows; float32 copies of the logits exist for one chunk at a time, forward and backward."""
    step = max(1, CHUNK_ELEMENTS // logits_RV.shape[-1])
    total = logits_RV.new_zeros((), dtype=torch.float32)
    for logits, wanted in zip(logits_RV.split(step), targets.split(step), strict=True):
        total = total + checkpoint(term, logits, wanted, use_reentrant=False, preserve_rng_state=False)
    return total / logits_RV.shape[0]


def _cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_RV.float(), targets_R, reduction="sum")


def _divergence(logits_RV: Tensor, wanted_RV: Tensor) -> Tensor:
    """Sum over rows of KL(wanted || logits)."""
    log_p_RV = wanted_RV.float().log_softmax(dim=-1)
    log_q_RV = logits_RV.float().log_softmax(dim=-1)
    # Words that the original masks with -inf would give 0 * (-inf - -inf).
    impossible = log_p_RV == -math.inf
    terms_RV = log_p_RV.exp() * (log_p_RV.masked_fill(impossible, 0.0) - log_q_RV.masked_fill(impossible, 0.0))
    return terms_RV.sum()


@contextmanager
def recomputing(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """While open, the blocks at these paths keep no activations for the backward pass."""
    blocks = tuple(blocks)
    inside = {path: model.get_submodule(path) for path in blocks}

    def run(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return checkpoint(inside[path], *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    with replaced(model, blocks, run):
        yield

"""Trains the routers of a packed model (GEMQ, section on router fine-tuning), or all that is small in it.

Experts that were rounded answer differently, so the routers' old preferences are no longer the best ones. Their
parameters are a few hundredths of a percent of the model: they keep their 16 bits, and tuning them costs no byte. So do
norms and biases, which set how large what goes in and out of rounded matrices is, and the scales of the rounded
matrices themselves, which are trained as gains (`moeq.layouts.serving.Loose`).

What is trained on some sequences is judged by others, of every text: if one of these is worse off, all stays as it was.

A step of AdamW at the paper's rate of 1e-4 is about one unit in the last place of a bfloat16 weight: most of it
would be lost to rounding. The sums are therefore kept in float32; the model computes with their rounded copies.

Legend: N sequences, B sequences of a batch (here 1), T tokens, R rows (positions), V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
RATES = {"routers": 1e-4, "model": 1.5e-4}
"""What may be trained, routers alone or with all that is small (norms, biases, scales) -> its usual rate.

That of "model" falls to nothing in the end: steps of one sequence each would else leave their noise behind.
"""
BETAS = (0.9, 0.999)
EPS = 1e-8
CHUNK_ELEMENTS = 1 << 24
"""Logits that are widened to float32 at a time: 64 MiB."""
HELD_OUT = 8
MEASURED_TOKENS = 2048
"""Tokens that are measured at once, but at least one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """How routers are trained; the defaults are the paper's (GEMQ, implementation details).

    Attributes:
        what: one of `RATES`.
        loss: "task", the mean cross-entropy of the next token; "kl", the mean KL(original || packed).
        lr: AdamW's rate; constant for routers, as the paper has it, and falling linearly for "model".
        epochs: passes over the sequences, in their order, one sequence a step.
        weight_decay: AdamW's decoupled decay.
    """

    what: str = "routers"
    loss: str = "task"
    lr: float = 1e-4
    epochs: int = 1
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.what not in RATES:
            raise OptionError(f"{self.what!r} is not supported", option="tune", fix="choose routers or model")
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
        loss_before: mean loss before the first step, in nats per predicted token: over the sequences that were held
            out if there were any, else over all.
        loss_after: the same with the trained, rounded parameters.
        steps: optimizer steps whose outcome was kept.
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
    held_out: Sequence[Sequence[int]] = (),
    progress: Progress | None = None,
) -> Tuned:
    """Train parameters of a packed model in place; everything else keeps its bytes.

    Balance losses of the family play no part: the loss is computed here, from the logits alone. There is no
    dropout (evaluation mode), no warm-up and no clipping. On a CPU the same call gives the same bits.

    Args:
        model: a packed model of `moeq.runtime.load`.
        routers: the parameters, by name (`moeq.repair.router.find_routers`, `find_vectors`).
        ids_NT: the sequences, int64.
        options: how to train.
        blocks: module paths of decoder blocks that forget their activations and compute them again in the
            backward pass (`moeq.repair.router.decoder_blocks`): memory is then that of one block instead of all.
        stored: parameter -> dtype of its tensor on disk, to which it is rounded at the end; its own by default.
        teacher: the original's logits, for the loss "kl".
        held_out: for each text, sequences that are not trained on. After every epoch they are measured; the best
            outcome for which no text has a higher loss than before is kept, or what was there.
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
    seen = [index for index in range(len(ids_NT)) if not any(index in each for each in held_out)]
    judged = [list(each) for each in held_out if len(each)] or [list(range(len(ids_NT)))]
    measures = sum(map(len, judged)) * (1 + (options.epochs if held_out else 1))
    tick = _ticker(progress, len(seen) * options.epochs + measures)
    dtypes = {name: parameter.dtype for name, parameter in routers.items()} | dict(stored or {})
    with trainable(model, routers.values()), recomputing(model, blocks):
        kept = {name: parameter.detach().to(dtypes[name], copy=True) for name, parameter in routers.items()}
        before = best = [_measure(objective, ids_NT, each, tick) for each in judged]
        steps = 0
        for epoch, masters in enumerate(_train(objective, routers, ids_NT, seen, options, tick), start=1):
            if not held_out and epoch < options.epochs:
                continue
            weights = {name: master.to(dtypes[name]) for name, master in masters.items()}
            _assign(routers, weights)
            after = [_measure(objective, ids_NT, each, tick) for each in judged]
            helps = math.fsum(after) < math.fsum(best) and all(
                new <= old for new, old in zip(after, before, strict=True)
            )
            if helps or not held_out:
                best, kept, steps = after, weights, epoch * len(seen)
            _assign(routers, masters)
        _assign(routers, kept)
    return Tuned(
        weights={name: weight.cpu() for name, weight in kept.items()},
        loss_before=math.fsum(before) / len(before),
        loss_after=math.fsum(best) / len(best),
        steps=steps,
    )


@torch.no_grad()
def divergences(model: nn.Module, ids_NT: Tensor, groups: Sequence[Sequence[int]], teacher: Teacher) -> list[float]:
    """Mean KL(original || packed) over each group of sequences, in nats per position.

    Raises:
        CalibrationError: it is not finite.
    """
    objective = _Objective(model=model, loss="kl", teacher=teacher)
    return [_measure(objective, ids_NT, group, lambda: None) for group in groups]


def held_out_of(domain_N: Sequence[int]) -> list[list[int]]:
    """Every `HELD_OUT`-th sequence of each text, for texts of two sequences or more."""
    return [indices[1::HELD_OUT] for indices in by_domain(domain_N).values() if len(indices) > 1]


def by_domain(domain_N: Sequence[int]) -> dict[int, list[int]]:
    """Text -> its sequences."""
    texts: dict[int, list[int]] = {}
    for index, domain in enumerate(domain_N):
        texts.setdefault(domain, []).append(index)
    return texts


def _train(
    objective: "_Objective",
    routers: Mapping[str, nn.Parameter],
    ids_NT: Tensor,
    seen: Sequence[int],
    options: TuneOptions,
    tick: Callable[[], None],
) -> Iterator[dict[str, Tensor]]:
    """Step through the sequences; float32 values after each epoch. The model holds them, rounded to its dtype."""
    masters = {name: parameter.detach().to(torch.float32, copy=True) for name, parameter in routers.items()}
    optimizer = torch.optim.AdamW(
        masters.values(), lr=options.lr, betas=BETAS, eps=EPS, weight_decay=options.weight_decay
    )
    total = options.epochs * len(seen)
    for epoch in range(options.epochs):
        for step, index in enumerate(seen):
            if options.what == "model":
                optimizer.param_groups[0]["lr"] = options.lr * (1 - (epoch * len(seen) + step) / total)
            loss = objective(index, ids_NT[index : index + 1])
            _check_finite(float(loss.detach()), epoch * len(seen) + step)
            loss.backward()
            for name, parameter in routers.items():
                masters[name].grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            _assign(routers, masters)
            tick()
        yield masters


@torch.no_grad()
def _assign(routers: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in routers.items():
        parameter.copy_(values[name])


@torch.no_grad()
def _measure(objective: "_Objective", ids_NT: Tensor, wanted: Sequence[int], tick: Callable[[], None]) -> float:
    """The mean loss over some sequences; short neighbours go together, since every pass decodes experts again."""
    most = max(1, MEASURED_TOKENS // ids_NT.shape[1])
    losses = []
    at = 0
    while at < len(wanted):
        count = 1
        while count < most and at + count < len(wanted) and wanted[at + count] == wanted[at] + count:
            count += 1
        ids_BT = ids_NT[wanted[at] : wanted[at] + count]
        losses.append(float(objective(wanted[at], ids_BT)) * count)
        _check_finite(losses[-1], None)
        for _ in range(count):
            tick()
        at += count
    return math.fsum(losses) / len(wanted)


def _check_finite(loss: float, step: int | None) -> None:
    if not math.isfinite(loss):
        when = "when it was measured" if step is None else f"in step {step + 1}"
        raise CalibrationError(
            f"the loss became {loss} {when}", fix="use a smaller learning rate, or look at the model"
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

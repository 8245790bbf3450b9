"""Loss gradients through a model of any size, one decoder block in memory at a time.

The family's own model drives, as in `moeq.calibration.stream`. Its blocks are stand-ins, each one node of
autograd: forward runs the block over micro-batches and keeps its inputs on disk; backward loads the block
once more, runs it again from those inputs with gradients, and passes on the gradients of the inputs.
Whatever a family computes between its blocks, or hands from block to block beside the hidden states, is
thus differentiated by autograd itself. The head (norm, logits) is the family's own too, run on a part of one
sequence at a time.

No term but the cross-entropy enters the gradients: labels never reach the family's code, and with them no
auxiliary loss. Nothing is trained. Routing decisions carry no gradient, routing weights do.

Legend: N sequences of one batch, B sequences, T tokens of a sequence, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeq.calibration.node import BlockNode, Layout, Pass, Step, Visit
from moeq.calibration.spill import SpillPool
from moeq.calibration.standin import EnoughError, replaced
from moeq.calibration.stream import BlockLoader
from moeq.calibration.tap import Hear
from moeq.errors import CalibrationError, OptionError
from moeq.model_parts import MoeLayer

MICRO_BATCH_TOKENS: Final = 2048
BATCH_BYTES: Final = 16 * 2**30
HEAD_BYTES: Final = 128 * 2**20
"""Logits, in float32, that are held at once."""

Labels = Literal["text", "sampled"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backprop:
    """Runs sequences through a model forward, and the gradients of their losses backward.

    Attributes:
        driver: the family's causal language model in evaluation mode; its decoder blocks are replaced while
            it runs, the rest must be loaded.
        blocks: module paths of all decoder blocks, in order of execution.
        loader: gives a block with its weights and a differentiable handler (`moeq.arch.hooks`) at its experts.
        layers: the MoE layers, by index.
        pool: makes the activation stores.
        device: where blocks and head run.
        micro_batch_tokens: tokens that one block sees at once, but at least one sequence.
        batch_bytes: what the inputs of all blocks may take on disk; decides how many sequences make a batch,
            at least one. Every batch loads every block twice (once without gradients).
        progress: called with (blocks done, blocks), all batches and both directions counted.
    """

    driver: nn.Module
    blocks: tuple[str, ...]
    loader: BlockLoader
    layers: tuple[MoeLayer, ...]
    pool: SpillPool
    device: torch.device
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    batch_bytes: int = BATCH_BYTES
    progress: Callable[[int, int], None] | None = None
    _last: dict[str, Layout] = field(default_factory=dict, init=False, repr=False)
    """What the blocks return, as seen in the latest run."""

    def run(
        self,
        ids_NT: Tensor,
        visit: Visit,
        *,
        gradients: bool,
        labels: Labels = "text",
        seed: int = 0,
        linears: Mapping[str, Hear] = MappingProxyType({}),
    ) -> None:
        """Show `visit` every MoE layer once for each batch of sequences.

        With gradients the layers of a batch come from last to first, without from first to last. The loss
        of a sequence is the mean cross-entropy of its T - 1 predicted tokens (GEMQ, section on the cost
        table); sequences are not averaged.

        Args:
            ids_NT: token ids of all sequences.
            visit: told what the experts were asked.
            gradients: whether to give it dL/dz too, z being the experts' joint output.
            labels: "text" predicts the next token (empirical Fisher); "sampled" draws what to predict from
                the model's own distribution (true Fisher).
            seed: of the drawing. The same seed draws the same tokens, whatever the sizes of batches.
            linears: module path of a linear in a block -> who is told of its calls.

        Raises:
            OptionError: sequences of fewer than two tokens, or unknown labels.
            CalibrationError: a gradient is not finite, the family's blocks cannot be run by themselves, or the
                model predicts no tokens.
        """
        if labels not in ("text", "sampled"):
            raise OptionError(f"{labels!r} are no labels", option="labels", fix="give text or sampled")
        uniform_NT = None
        if labels == "sampled":
            uniform_NT = torch.rand(ids_NT.shape, generator=torch.Generator().manual_seed(seed))
        for ids, uniform, tick in self._batches(ids_NT, uniform_NT, 2 if gradients else 1):
            self._run_batch(ids, uniform, visit, gradients, linears, tick)

    def _run_batch(
        self,
        ids_NT: Tensor,
        uniform_NT: Tensor | None,
        visit: Visit,
        gradients: bool,
        linears: Mapping[str, Hear],
        tick: Callable[[], None],
    ) -> None:
        with torch.set_grad_enabled(gradients):
            passed = self._forward(ids_NT, visit, gradients, tick, linears)
            if gradients:
                tensors, grads = self._head(passed, ids_NT, uniform_NT)
                torch.autograd.backward(tensors, grads)

    @torch.no_grad()
    def last_hidden(self, ids_NT: Tensor) -> Tensor:
        """What the last block returns, (N, T, H) on the CPU, on disk when large; raises as `run`."""
        whole: Tensor | None = None
        start = 0
        for ids, _, tick in self._batches(ids_NT, None, 1):
            outputs = self._forward(ids, None, False, tick)[-1][1]
            hidden = outputs[0]
            if whole is None:
                whole = self.pool.empty((ids_NT.shape[0], *hidden.shape[1:]), hidden.dtype)
            whole[start : start + len(ids)] = hidden
            start += len(ids)
        assert whole is not None
        return whole

    def logits(self, ids_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        """The family's head on what the last block returned: (B, T, V) on the device, differentiable.

        Args:
            ids_BT: the token ids.
            hidden_BTH: the rows of `last_hidden`, or others that shall take their place.
        """
        hidden = hidden_BTH.to(self.device)

        def through(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            layout = self._last.get(path)
            return hidden if layout is None else layout.fill([hidden] + [None] * (len(layout.places) - 1))

        with replaced(self.driver, self.blocks, through):
            self.driver.to(self.device)
            return self._answer(ids_BT)

    def _answer(self, ids_BT: Tensor) -> Tensor:
        """Logits of the driver, whatever its blocks do."""
        output = self.driver(input_ids=ids_BT.to(self.device), use_cache=False)
        if "logits" not in output:
            raise self._not_causal("gives no logits")
        return output["logits"]

    def _not_causal(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"{type(self.driver).__name__} {what}: there is no next token to predict",
            fix="use a cost without gradients for it, for bitsmoe --cost-options importance=routing",
        )

    def _batches(
        self, ids_NT: Tensor, uniform_NT: Tensor | None, passes: int
    ) -> Iterator[tuple[Tensor, Tensor | None, Callable[[], None]]]:
        num_sequences, seqlen = ids_NT.shape
        if num_sequences < 1 or seqlen < 2:
            raise OptionError(f"{num_sequences} sequences of {seqlen} tokens", option="seqlen", fix="give 2 or more")
        if any(module.training for module in self.driver.modules()):
            raise AssertionError("the model must be in evaluation mode: dropout would enter the gradients")
        self.driver.requires_grad_(False)
        size = self._batch_size(ids_NT)
        total = -(-num_sequences // size) * len(self.blocks) * passes
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if self.progress is not None:
                self.progress(done, total)

        for start in range(0, num_sequences, size):
            rows = slice(start, start + size)
            yield ids_NT[rows], None if uniform_NT is None else uniform_NT[rows], tick

    def _batch_size(self, ids_NT: Tensor) -> int:
        """Sequences of a batch: the input of every block is kept, and a layer's gradients beside it."""
        num_bytes = 0

        def measure(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal num_bytes
            tensors = Layout.of((args, kwargs))[1]
            num_bytes = tensors[0].numel() * tensors[0].element_size()
            raise EnoughError

        with torch.no_grad(), replaced(self.driver, self.blocks, measure), suppress(EnoughError):
            self.driver.to("cpu")
            self.driver.base_model(input_ids=ids_NT[:1].cpu(), use_cache=False)  # type: ignore[operator]
        fitting = self.batch_bytes // max(1, num_bytes * (len(self.blocks) + 4))
        # As many sequences as tokens would make it ambiguous which tensors have a row for each sequence.
        return max(1, min(len(ids_NT), fitting, ids_NT.shape[1] - 1))

    def _forward(
        self,
        ids_NT: Tensor,
        visit: Visit | None,
        gradients: bool,
        tick: Callable[[], None],
        linears: Mapping[str, Hear] = MappingProxyType({}),
    ) -> list[tuple[Step, tuple[Tensor, ...]]]:
        """Run all blocks; returns each with what it answered."""
        passed: list[tuple[Step, tuple[Tensor, ...]]] = []
        shared = Pass(
            family=type(self.driver).__name__,
            shape=(ids_NT.shape[0], ids_NT.shape[1]),
            loader=self.loader,
            layers=self.layers,
            pool=self.pool,
            device=self.device,
            micro_batch_tokens=self.micro_batch_tokens,
            visit=visit,
            gradients=gradients,
            linears=linears,
            tick=tick,
        )

        def run(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs, tensors = Layout.of((args, kwargs))
            step = Step(shared, path, inputs)
            anchor = torch.zeros((), requires_grad=gradients)
            outputs = BlockNode.apply(step, anchor, *tensors)  # type: ignore[no-untyped-call]
            passed.append((step, outputs))
            self._last[path] = step.outputs
            if path == self.blocks[-1]:
                raise EnoughError  # the head would take all sequences at once
            return step.outputs.fill(outputs)

        with replaced(self.driver, self.blocks, run), suppress(EnoughError):
            self.driver.to("cpu")
            self.driver.base_model(input_ids=ids_NT.cpu(), use_cache=False)  # type: ignore[operator]
        return passed

    def _head(
        self, passed: list[tuple[Step, tuple[Tensor, ...]]], ids_NT: Tensor, uniform_NT: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the losses with respect to everything blocks returned that the head looks at."""
        num_sequences, seqlen = ids_NT.shape
        grads: dict[tuple[int, int], Tensor] = {}
        leaves: list[list[Tensor]] = []
        tokens = slice(0, 0)
        sequence = 0

        def through(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            step, outputs = passed[len(leaves)]
            parts = [_tokens(value.detach(), sequence, tokens, seqlen).to(self.device) for value in outputs]
            leaves.append([part.requires_grad_(part.is_floating_point()) for part in parts])
            return step.outputs.fill(leaves[-1])

        vocabulary = self.driver.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        span = max(1, HEAD_BYTES // (4 * vocabulary))
        with replaced(self.driver, self.blocks, through):
            self.driver.to(self.device)
            for sequence in range(num_sequences):
                for start in range(0, seqlen - 1, span):
                    leaves.clear()
                    tokens = slice(start, min(start + span, seqlen - 1))
                    logits = self._answer(ids_NT[sequence : sequence + 1, tokens])[0]
                    targets = ids_NT[sequence, tokens.start + 1 : tokens.stop + 1].to(self.device)
                    if uniform_NT is not None:
                        targets = _draw(logits, uniform_NT[sequence, tokens])
                    elif int(targets.max()) >= logits.shape[-1]:
                        raise self._not_causal(f"tells {logits.shape[-1]} classes apart")
                    loss = functional.cross_entropy(logits.float(), targets, reduction="sum") / (seqlen - 1)
                    loss.backward()
                    for position, values in enumerate(leaves):
                        for place, leaf in enumerate(values):
                            if leaf.grad is None:
                                continue
                            key = (position, place)
                            if key not in grads:
                                like = passed[position][1][place]
                                grads[key] = self.pool.empty(tuple(like.shape), like.dtype).zero_()
                            _tokens(grads[key], sequence, tokens, seqlen).add_(leaf.grad.cpu())
        return [passed[position][1][place] for position, place in grads], list(grads.values())


def _tokens(value: Tensor, sequence: int, tokens: slice, seqlen: int) -> Tensor:
    """Some tokens of one sequence, a view."""
    row = value[sequence : sequence + 1]
    return row[:, tokens] if row.ndim > 1 and row.shape[1] == seqlen else row


def _draw(logits_TV: Tensor, uniform_T: Tensor) -> Tensor:
    """Token ids (T,) drawn from softmax(logits), by inverting the cumulative distribution at `uniform_T`."""
    cumulative_TV = logits_TV.detach().float().softmax(dim=-1).cumsum(dim=-1)
    wanted_T1 = uniform_T.to(cumulative_TV).unsqueeze(-1) * cumulative_TV[:, -1:]
    return torch.searchsorted(cumulative_TV, wanted_T1, right=True).squeeze(-1).clamp_(max=logits_TV.shape[-1] - 1)

"""One decoder block as a node of autograd that keeps its inputs, on disk, and none of its weights.

Forward loads the block and runs it over micro-batches; backward loads it again, runs it again from the same
inputs with gradients, and passes on theirs.

Legend: N sequences of one batch, T tokens of a sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeq.arch import hooks
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import BlockLoader
from moeq.calibration.tap import Asked, ExpertsTap, Hear, Heard, hear_calls
from moeq.checkpoint.read import is_finite
from moeq.errors import CalibrationError
from moeq.model_parts import MoeLayer


class Visit(Protocol):
    """What to do with one layer and one batch of sequences."""

    def __call__(self, layer: int, experts: nn.Module, asked: Asked) -> None:
        """Look at what the experts of MoE layer `layer` were asked; the tensors live on the CPU."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """A nest of arguments or results without its tensors."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> tuple["Layout", list[Tensor]]:
        """The layout of `value` and its tensors."""
        leaves, spec = pytree.tree_flatten(value)
        places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(spec=spec, leaves=others, places=places), [leaves[place] for place in places]

    def fill(self, tensors: Sequence[Tensor | None]) -> Any:
        """The nest with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def mapping_sizes(self) -> list[int]:
        """Lengths of the dict-like leaves."""
        return [len(leaf) for leaf in self.leaves if isinstance(leaf, Mapping)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """What all blocks share while one batch of sequences goes through them.

    Attributes:
        family: name of the model's class, for messages.
        shape: (N, T).
        loader: gives a block with its weights.
        layers: the MoE layers, by index.
        pool: makes the activation stores.
        device: where blocks run.
        micro_batch_tokens: tokens that one block sees at once, but at least one sequence.
        visit: told what the experts were asked; None if nobody wants to know.
        gradients: tell it on the way back, with gradients, instead of on the way forth.
        linears: module path -> who is told of this linear's calls, on the way back if there is one.
        tick: called whenever a block is done.
    """

    family: str
    shape: tuple[int, int]
    loader: BlockLoader
    layers: tuple[MoeLayer, ...]
    pool: SpillPool
    device: torch.device
    micro_batch_tokens: int
    visit: Visit | None
    gradients: bool
    linears: Mapping[str, Hear]
    tick: Callable[[], None]


class Step:
    """One block and one batch of sequences: how to run it, and how to run it backward.

    Attributes:
        path: module path of the block.
        outputs: what it returns; known once it ran.
    """

    outputs: Layout

    def __init__(self, shared: Pass, path: str, inputs: Layout) -> None:
        self.path = path
        self._shared = shared
        self._inputs = inputs
        self._num_sequences, self._seqlen = shared.shape

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the block; its results are in stores of the pool."""
        stores: list[Tensor] = []
        with self._loaded(listen=not self._shared.gradients) as block:
            for rows in self._micro_batches():
                self.outputs, results = self._call(block, [self._cut(tensor, rows) for tensor in tensors])
                if any(result.ndim < 2 or result.shape[0] != rows.stop - rows.start for result in results):
                    raise self._refusal("returns a tensor without a row for each sequence")
                if not stores:
                    shapes = [(self._num_sequences, *result.shape[1:]) for result in results]
                    stores = [
                        self._shared.pool.empty(shape, result.dtype)
                        for shape, result in zip(shapes, results, strict=True)
                    ]
                for store, result in zip(stores, results, strict=True):
                    store[rows] = result
        self._check_hidden(stores)
        self._shared.tick()
        return tuple(stores)

    def backward(
        self, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the inputs from those of the results."""
        found: list[Tensor | None] = [
            self._shared.pool.empty(tuple(tensor.shape), tensor.dtype).zero_() if needed else None
            for tensor, needed in zip(tensors, needs, strict=True)
        ]
        with self._loaded(listen=True) as block:
            block.requires_grad_(False)
            for rows in self._micro_batches():
                with torch.enable_grad():
                    cuts = [
                        self._cut(tensor, rows).detach().requires_grad_(needed)
                        for tensor, needed in zip(tensors, needs, strict=True)
                    ]
                    results = self._call(block, cuts)[1]
                pairs = [
                    (result, grad[rows].to(result.device))
                    for result, grad in zip(results, grads, strict=True)
                    if grad is not None and result.requires_grad
                ]
                if pairs:
                    torch.autograd.backward([result for result, _ in pairs], [grad for _, grad in pairs])
                for whole, cut in zip(found, cuts, strict=True):
                    if whole is not None and cut.grad is not None:
                        target = whole[rows] if self._is_batched(whole) else whole
                        target += cut.grad.to(target.device)
        self._shared.tick()
        return found

    def _check_hidden(self, outputs: Sequence[Tensor]) -> None:
        if not outputs or not outputs[0].is_floating_point():
            raise self._refusal("does not return hidden states first")

    def _refusal(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"{self._shared.family}: block {self.path} {what}",
            fix="use a cost that needs no calibration text for this family",
        )

    def _micro_batches(self) -> Iterator[slice]:
        step = max(1, self._shared.micro_batch_tokens // self._seqlen)
        for start in range(0, self._num_sequences, step):
            yield slice(start, min(start + step, self._num_sequences))

    def _is_batched(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and tensor.shape[0] == self._num_sequences

    def _cut(self, tensor: Tensor, rows: slice) -> Tensor:
        return (tensor[rows] if self._is_batched(tensor) else tensor).to(self._shared.device)

    def _call(self, block: nn.Module, tensors: Sequence[Tensor]) -> tuple[Layout, list[Tensor]]:
        args, kwargs = self._inputs.fill(tensors)
        sizes = self._inputs.mapping_sizes()
        result = block(*args, **kwargs)
        # Every micro-batch has its own plain dicts; those that are no pytrees are shared by all of them.
        if pytree.tree_structure((args, kwargs)) != self._inputs.spec or sizes != self._inputs.mapping_sizes():
            raise self._refusal("leaves notes for later blocks in its arguments")
        return Layout.of(result)

    @contextmanager
    def _loaded(self, *, listen: bool) -> Iterator[nn.Module]:
        """The block with its weights; if somebody listens, he is told of its experts at the end."""
        shared = self._shared
        block = shared.loader(self.path)
        assert not block.training, "dropout would enter the gradients"
        taps: dict[int, tuple[nn.Module, ExpertsTap]] = {}
        ears = []
        try:
            if listen:
                for path, hear in shared.linears.items():
                    if path.startswith(self.path + "."):
                        linear = block.get_submodule(path.removeprefix(self.path + "."))
                        ears.append(hear_calls(linear, partial(self._hear, path, hear), gradients=shared.gradients))
            if listen and self._shared.visit is not None:
                for index, layer in enumerate(shared.layers):
                    if layer.path.startswith(self.path + "."):
                        experts = block.get_submodule(layer.path.removeprefix(self.path + "."))
                        inner = experts.get_submodule(hooks.HANDLER)
                        capacity = self._num_sequences * self._seqlen
                        tap = ExpertsTap(inner, shared.pool, capacity, gradients=self._shared.gradients)
                        hooks.attach_handler(experts, tap)
                        taps[index] = experts, tap
            yield block
            for index, (experts, tap) in taps.items():
                hooks.attach_handler(experts, tap.inner)
                self._tell(index, experts, tap, next(block.parameters()).dtype)
        finally:
            for experts, tap in taps.values():
                hooks.attach_handler(experts, tap.inner)
            for ear in ears:
                ear.remove()
            shared.loader.unload(self.path)

    def _hear(self, path: str, hear: Hear, heard: Heard) -> None:
        if heard.grad_TN is not None and not is_finite(heard.grad_TN):
            raise CalibrationError("the gradients at a linear are not finite", tensor=path, fix="compute in float32")
        hear(heard)

    def _tell(self, index: int, experts: nn.Module, tap: ExpertsTap, dtype: torch.dtype) -> None:
        assert self._shared.visit is not None
        layer = self._shared.layers[index]
        asked = tap.asked(experts, layer, dtype)
        if asked.grad_TH is not None and not is_finite(asked.grad_TH):
            raise CalibrationError(
                f"the gradients at the experts of MoE layer {index} are not finite",
                tensor=layer.path,
                fix="compute in float32",
            )
        self._shared.visit(index, experts, asked)


class BlockNode(torch.autograd.Function):
    """A block as a node of autograd: keeps its inputs, not what it computes with them."""

    @staticmethod
    def forward(ctx: Any, step: Step, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the block returns for `tensors`, its arguments'."""
        # `anchor` asks for gradients, so that the first block is run backward too.
        ctx.step = step
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs = step.forward(tensors)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments that have any."""
        return None, None, *ctx.step.backward(ctx.saved_tensors, grads, ctx.needs_input_grad[2:])

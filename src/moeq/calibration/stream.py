"""Runs calibration tokens through a model of any size, one decoder block in memory at a time.

The family's own forward drives everything: it is called ONCE with all sequences, on a skeleton whose
decoder blocks are stand-ins. A stand-in loads its block, runs it over micro-batches, lets a visitor
replace the experts, keeps the outputs (on disk when large) and unloads the block. Masks, rotary
tables and whatever else a family computes around its blocks are thus its own, and no per-family code
is needed.

Legend: N sequences, T tokens (of a sequence, or of all where flattened), H hidden, k experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeq.arch import hooks
from moeq.calibration.spill import SpillPool
from moeq.errors import OptionError

MICRO_BATCH_TOKENS = 4096
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "n_activated_experts", "k")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Capture:
    """Everything the experts of one layer were asked.

    Attributes:
        x_TH: inputs, in the compute dtype.
        index_Tk: chosen experts.
        weights_Tk: their routing weights.
        stats_Tk: the experts whose statistics should see each token; `index_Tk` with natural
            routing, wider with top-k x r, None when every expert sees every token.
    """

    x_TH: Tensor
    index_Tk: Tensor
    weights_Tk: Tensor
    stats_Tk: Tensor | None


class Visitor(Protocol):
    """What to do with the experts of one layer once their inputs are known."""

    def __call__(self, layer: int, experts: nn.Module, capture: Capture) -> Tensor:
        """Return the experts' outputs (T, H) that the rest of the model shall see."""
        ...


class BlockLoader(Protocol):
    """Brings the weights of one decoder block (experts excluded) into memory and out again."""

    def __call__(self, block: str) -> nn.Module:
        """The block at module path `block`, with its weights."""
        ...

    def unload(self, block: str) -> None:
        """Return the block's weights to the meta device."""
        ...


class _Log:
    """Rows of one kind, written into a store of the pool as they come; memory holds them once.

    Args:
        pool: makes the store.
        rows: how many are expected; more make a larger store.
    """

    def __init__(self, pool: SpillPool, rows: int) -> None:
        self._pool = pool
        self._expected = rows
        self._store: Tensor | None = None
        self._filled = 0

    def add(self, part: Tensor) -> None:
        """Append rows."""
        stop = self._filled + part.shape[0]
        if self._store is None or stop > self._store.shape[0]:
            grown = self._pool.empty((max(self._expected, stop), *part.shape[1:]), part.dtype)
            if self._store is not None:
                grown[: self._filled] = self._store[: self._filled]
            self._store, self._expected = grown, 2 * grown.shape[0]
        self._store[self._filled : stop] = part
        self._filled = stop

    def rows(self) -> Tensor | None:
        """All rows, or None if there was never a part."""
        return None if self._store is None else self._store[: self._filled]


class _Recorder(nn.Module):
    """Handler that stores what the experts are asked and answers zeros."""

    def __init__(self, *logs: _Log | None) -> None:
        super().__init__()
        self._logs = logs

    def forward(self, _: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for log, asked in zip(self._logs, (hidden_states, top_k_index, top_k_weights), strict=True):
            if log is not None:
                log.add(asked)
        return torch.zeros_like(hidden_states)


class _Unknown(nn.Module):
    """Handler that answers NaN: whatever depends on the experts shows it."""

    def forward(self, _: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.full_like(hidden_states, torch.nan)


class _Replayer(nn.Module):
    """Handler that answers from a store, call after call."""

    def __init__(self, y_TH: Tensor) -> None:
        super().__init__()
        self._y_TH = y_TH
        self._next = 0

    def forward(self, _: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        start, self._next = self._next, self._next + hidden_states.shape[0]
        return self._y_TH[start : self._next].to(hidden_states)


class _StandIn(nn.Module):
    """Takes a decoder block's place in the driving model."""

    def __init__(self, block: nn.Module, run: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._run = run
        # Past nn.Module's bookkeeping: the block must not count as a part of the driving model.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        # Drivers read plain facts off their blocks (attention_type, layer_idx, ...).
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streamer:
    """One calibration run.

    Attributes:
        driver: the family's model; its decoder blocks are replaced by `run`, the rest must be loaded.
        blocks: module paths of all decoder blocks, in order of execution.
        loader: gives a block with its weights.
        experts: module path of experts -> index of the MoE layer.
        top_k: experts per token, by MoE layer.
        hidden: width of the experts' inputs, by MoE layer.
        visitor: called for each MoE layer, in order.
        pool: makes the activation stores.
        device: where blocks run.
        routing: "natural", "all", or an integer r >= 2: statistics see top-k x r experts.
        progress: called with (blocks done, blocks).
        prepare: called with each block's path, the block and `show`, before its experts are asked; it may change the
            block's weights. `show()` runs the block on all tokens with experts that answer NaN.
    """

    driver: nn.Module
    blocks: tuple[str, ...]
    loader: BlockLoader
    experts: dict[str, int]
    top_k: tuple[int, ...]
    hidden: tuple[int, ...]
    visitor: Visitor
    pool: SpillPool
    device: torch.device
    routing: str | int = "natural"
    progress: Callable[[int, int], None] | None = None
    prepare: Callable[[str, nn.Module, Callable[[], None]], None] | None = None

    @torch.inference_mode()
    def run(self, ids_NT: Tensor) -> None:
        """Stream the sequences through all blocks.

        Batched tensors are told by their first dimension. Where there are as many sequences as tokens in one, the last
        sequence runs twice, and nobody is shown the second time.
        """
        num_sequences, seqlen = ids_NT.shape
        again = seqlen if num_sequences == seqlen else 0
        if again:
            ids_NT = torch.cat([ids_NT, ids_NT[-1:]])
            num_sequences += 1
        for position, path in enumerate(self.blocks):
            parent, _, name = path.rpartition(".")
            block = self.driver.get_submodule(path)
            stand_in = _StandIn(block, self._runner(position, path, num_sequences, again))
            self.driver.get_submodule(parent).add_module(name, stand_in)
        # The base model: logits of all sequences would not fit, and nobody needs them. It stays on the CPU, where
        # blocks leave the states of all sequences: its embeddings and last norm would not find them elsewhere.
        base_model = cast(nn.Module, self.driver.base_model).to("cpu")
        base_model(input_ids=ids_NT.cpu(), use_cache=False)

    def _runner(
        self, position: int, path: str, num_sequences: int, again: int
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            block = self.loader(path)
            batches = list(self._micro_batches(args, kwargs, num_sequences))
            inside = [(name, module) for name, module in block.named_modules() if f"{path}.{name}" in self.experts]
            if self.prepare is not None:
                for _, experts in inside:
                    hooks.attach_handler(experts, _Unknown())
                self.prepare(path, block, partial(_show, block, batches))
            for _, experts in inside:
                hooks.attach_handler(experts, _Recorder(None, None, None))
            for name, experts in inside:
                y_TH = self._answer(block, experts, self.experts[f"{path}.{name}"], batches, again)
                hooks.attach_handler(experts, _Replayer(y_TH))
                del y_TH
            output = self._outputs(block, batches, num_sequences)
            for _, experts in inside:
                # The handler holds the layer's answers for all tokens: they must go with the block.
                experts._modules.pop(hooks.HANDLER)
            self.loader.unload(path)
            if self.progress is not None:
                self.progress(position + 1, len(self.blocks))
            return output

        return run

    def _micro_batches(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], num_sequences: int
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        step = max(1, MICRO_BATCH_TOKENS // _hidden(args, kwargs).shape[1])
        for start in range(0, num_sequences, step):

            def cut(leaf: Any, start: int = start) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                if leaf.ndim > 1 and leaf.shape[0] == num_sequences:
                    leaf = leaf[start : start + step]
                return leaf.to(self.device)

            yield pytree.tree_map(cut, args), pytree.tree_map(cut, kwargs)

    def _answer(self, block: nn.Module, experts: nn.Module, layer: int, batches: Sequence[Any], again: int) -> Tensor:
        """What the visitor makes of one layer; everything captured for it is gone on return."""
        capture = self._capture(block, experts, layer, batches)
        if not again or not len(capture.x_TH):
            return self.visitor(layer, experts, capture)
        shown = replace(
            capture,
            x_TH=capture.x_TH[:-again],
            index_Tk=capture.index_Tk[:-again],
            weights_Tk=capture.weights_Tk[:-again],
            stats_Tk=None if capture.stats_Tk is None else capture.stats_Tk[:-again],
        )
        y_TH = self.visitor(layer, experts, shown)
        return torch.cat([y_TH, y_TH[-again:]])

    def _capture(self, block: nn.Module, experts: nn.Module, layer: int, batches: Sequence[Any]) -> Capture:
        num_tokens = sum(_num_tokens(*batch) for batch in batches)
        logs = [_Log(self.pool, num_tokens) for _ in range(3)]
        self._record(block, experts, batches, _Recorder(*logs))
        x_TH, index_Tk, weights_Tk = (log.rows() for log in logs)
        if x_TH is None or index_Tk is None or weights_Tk is None:
            # Experts of another modality never see text; the quantizer must do without statistics.
            top_k = self.top_k[layer]
            x_TH = torch.empty(0, self.hidden[layer], dtype=next(block.parameters()).dtype)
            index_Tk = torch.empty(0, top_k, dtype=torch.int64)
            weights_Tk = torch.empty(0, top_k)
        if self.routing == "natural":
            stats: Tensor | None = index_Tk
        elif self.routing == "all":
            stats = None
        else:
            stats = self._wider(block, experts, layer, batches)
        return Capture(x_TH=x_TH, index_Tk=index_Tk, weights_Tk=weights_Tk, stats_Tk=stats)

    def _record(self, block: nn.Module, experts: nn.Module, batches: Sequence[Any], recorder: _Recorder) -> None:
        """Run the block with its experts replaced by `recorder`; what that stored is no longer held by the block."""
        others = [module for module in block.modules() if isinstance(module, _Replayer)]
        for other in others:
            other._next = 0
        hooks.attach_handler(experts, recorder)
        _show(block, batches)
        hooks.attach_handler(experts, _Recorder(None, None, None))

    def _wider(self, block: nn.Module, experts: nn.Module, layer: int, batches: Sequence[Any]) -> Tensor:
        """Route once more with top-k x r, for statistics only."""
        assert isinstance(self.routing, int)
        top_k = self.top_k[layer]
        wanted = min(top_k * self.routing, int(experts.num_experts))  # type: ignore[arg-type]
        routers = [
            (module, name) for module in block.modules() for name in TOP_K_NAMES if vars(module).get(name) == top_k
        ]
        chosen = _Log(self.pool, sum(_num_tokens(*batch) for batch in batches))
        try:
            for module, name in routers:
                setattr(module, name, wanted)
            self._record(block, experts, batches, _Recorder(None, chosen, None))
        finally:
            for module, name in routers:
                setattr(module, name, top_k)
        stats = chosen.rows()
        if stats is None:
            stats = torch.empty(0, wanted, dtype=torch.int64)
        if stats.shape[-1] != wanted:
            raise OptionError("this family's router cannot be widened", option="routing", fix="use natural or all")
        return stats

    def _outputs(self, block: nn.Module, batches: Sequence[Any], num_sequences: int) -> Any:
        for module in block.modules():
            if isinstance(module, _Replayer):
                module._next = 0
        stores: list[Any] | None = None
        spec = None
        start = 0
        for args, kwargs in batches:
            leaves, spec = pytree.tree_flatten(block(*args, **kwargs))
            if len(batches) == 1:
                return pytree.tree_unflatten(
                    [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
                )
            if stores is None:
                stores = [
                    self.pool.empty((num_sequences, *leaf.shape[1:]), leaf.dtype) if isinstance(leaf, Tensor) else leaf
                    for leaf in leaves
                ]
            size = 0
            for store, leaf in zip(stores, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    size = leaf.shape[0]
                    store[start : start + size] = leaf.cpu()
            start += size
        assert stores is not None
        assert spec is not None
        return pytree.tree_unflatten(stores, spec)


def compute_dtype(source: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run blocks in: the checkpoint's, but float32 where a CPU is slow at it.

    That is float16 on every CPU, and bfloat16 on those without AVX-512: torch emulates it there, ten times slower than
    float32 in the forward direction and fifty times slower in the backward one.
    """
    if device.type != "cpu" or source not in (torch.float16, torch.bfloat16):
        return source
    native_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return source if source == torch.bfloat16 and native_bfloat16 else torch.float32


def _show(block: nn.Module, batches: Sequence[Any]) -> None:
    for args, kwargs in batches:
        block(*args, **kwargs)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states (N, T, H) that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return _hidden(args, kwargs).shape[:2].numel()

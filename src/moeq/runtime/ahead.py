"""Compiles the kernels of a packed model on a GPU side by side, before the first token asks for them one by one.

What is compiled depends on shapes, on what all layers have in common (`moeq.kernels.facts.Kinds`), and on powers of
two of the number of tokens: layers of one model share their kernels, and so do all prompts of about one length. Triton
keeps what it compiled on disk, so that only the first load on a machine takes its time.

Legend: T tokens, k experts per token, H hidden.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Final

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.arch.discover import TOP_K_NAMES
from moeq.layouts.grouped import gpu
from moeq.layouts.grouped.serving import PackedLinear
from moeq.layouts.serving import ExpertsModule

TOKENS: Final = (1, 32, 512)
"""Decoding, a short prompt and a long one. Other numbers of tokens may need a kernel more, when they come."""

Told = Callable[[int, int], None]
"""Called with kernels that are compiled, and kernels that were asked for so far."""


def compile_kernels(model: nn.Module, *, tokens: tuple[int, ...] = TOKENS, progress: Told | None = None) -> None:
    """Compile what `model` will ask for, all processors at work; nothing where no kernel of a GPU serves it.

    Args:
        model: with packed modules, on the device where it will run.
        tokens: numbers of tokens that a call may have.
        progress: told of every kernel.
    """
    calls = {key: call for count in tokens for key, call in _calls(model, count)}
    if not calls:
        return
    launch = import_module("moeq.kernels.triton_launch")  # needs triton, an optional dependency
    with torch.inference_mode(), launch.compiling(os.cpu_count() or 1, progress):
        for call in calls.values():
            call()


def _calls(model: nn.Module, tokens: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Calls, with what tells those apart that differ in what they compile."""
    dtype, top_k = _dtype(model), _top_k(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            facts = module.matrix.facts
            if facts is not None:
                x_TK = torch.empty(tokens, module.in_features, dtype=dtype, device=facts.table.device)
                same = module.in_features, module.out_features, facts.widths, facts.spans, tokens
                yield f"linear {same}", partial(gpu.run_linear, x_TK, module.matrix)
            continue
        handler = module._modules.get(hooks.HANDLER)
        call = handler.device_call(module) if isinstance(handler, ExpertsModule) else None
        if call is None:
            continue
        x_TH = torch.empty(tokens, call.hidden, dtype=dtype, device=call.device)
        index_Tk = torch.zeros(tokens, top_k, dtype=torch.int64, device=call.device)
        # Families weight in float32 or in the dtype of the model.
        for weights_dtype in {torch.float32, dtype}:
            weights_Tk = torch.empty(tokens, top_k, dtype=weights_dtype, device=call.device)
            yield f"{call.same} {tokens} {weights_dtype}", partial(call.run, x_TH, index_Tk, weights_Tk)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of activations: that of the weights that are not packed."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def _top_k(model: nn.Module) -> int:
    """Experts per token, as the config says; nested ones are of models that see or hear as well."""
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    found = (getattr(each, name, None) for each in configs if each is not None for name in TOP_K_NAMES)
    return next((number for number in found if isinstance(number, int)), 1)

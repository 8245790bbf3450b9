"""Compiles the kernels of a packed model on a GPU side by side, before the first token asks for them one by one.

What is compiled depends on shapes, on what all layers have in common (`moeq.kernels.packed.Kinds`), and on powers of
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
from moeq.kernels import gpu, gpu_spectral, gpu_tiled
from moeq.runtime.modules import PackedExperts, PackedLinear, SpectralExperts, TiledExperts

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
        found = _experts(module, module._modules.get(hooks.HANDLER))
        if found is None:
            continue
        same_experts, hidden, place, run = found
        x_TH = torch.empty(tokens, hidden, dtype=dtype, device=place)
        index_Tk = torch.zeros(tokens, top_k, dtype=torch.int64, device=place)
        # Families weight in float32 or in the dtype of the model.
        for weights_dtype in {torch.float32, dtype}:
            weights_Tk = torch.empty(tokens, top_k, dtype=weights_dtype, device=place)
            yield f"{same_experts} {tokens} {weights_dtype}", partial(run, x_TH, index_Tk, weights_Tk)


def _experts(
    experts: nn.Module, handler: nn.Module | None
) -> tuple[str, int, torch.device, Callable[[Tensor, Tensor, Tensor], Tensor]] | None:
    """What a layer of experts has in common with those that need the same kernels; H; where it is; its call."""
    if isinstance(handler, PackedExperts) and handler.layer.facts is not None:
        layer, facts = handler.layer, handler.layer.facts
        same = f"grouped {layer.shapes} {facts.widths} {facts.spans}"
        return same, layer.shapes["up"][1], layer.data.device, partial(gpu.run_experts, experts, layer)
    if isinstance(handler, SpectralExperts) and handler.layer.facts is not None:
        spectral, rows = handler.layer, handler.layer.facts.factors
        # Ranks and sizes of groups decide how sums are split; their powers of two, in how many ways.
        sizes = {name: (rows[name].widths, rows[name].span, rows[name].rows.bit_length()) for name in rows}
        ranks = [(entry.basis_bits, entry.rank.bit_length()) for entry in spectral.entries.values()]
        run = partial(gpu_spectral.run_experts, experts, spectral)
        return f"spectral {handler.shape} {sizes} {ranks}", handler.shape.hidden, spectral.data.device, run
    if (
        isinstance(handler, TiledExperts)
        and handler.layer.residual.facts is not None
        and handler.layer.facts is not None
    ):
        tiled, facts = handler.layer, handler.layer.residual.facts
        forms = {name: tile.form for name, tile in handler.tiles.items()}
        same = f"tiled {handler.shapes} {facts.widths} {facts.spans} {forms}"
        run = partial(gpu_tiled.run_experts, experts, tiled)
        return same, handler.shapes["up"][1], tiled.residual.data.device, run
    return None


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of activations: that of the weights that are not packed."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def _top_k(model: nn.Module) -> int:
    """Experts per token, as the config says; nested ones are of models that see or hear as well."""
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    found = (getattr(each, name, None) for each in configs if each is not None for name in TOP_K_NAMES)
    return next((number for number in found if isinstance(number, int)), 1)

"""The routers of a packed model, found by what they feed: no family is named here.

The experts of a layer are asked with hidden states and with routing weights. A parameter that the routing weights
depend on and the hidden states do not belongs to the router: norms and attention in front of both drop out, and
so do buffers that only steer the choice (score corrections), since choosing has no gradient.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.errors import OptionError
from moeq.runtime import attach

PROBE_TOKENS = 8


def find_routers(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters that decide how much each expert counts; runs the model once on a few tokens.

    Args:
        model: a packed model of `moeq.runtime.load`.
        paths: module paths of the packed experts, as the manifest names them.

    Returns:
        parameter name -> parameter, in the order of the layers; gate biases and scales included.

    Raises:
        OptionError: no layer has a router that gradients reach.
    """
    experts = [attach.find(model, path) for path in paths]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[Any] = set()
    found: dict[str, nn.Parameter] = {}

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        _, hidden_states, _, top_k_weights = args
        _leaves(hidden_states, seen)
        # What an earlier layer's walk has seen is in front of this layer, or an earlier router.
        for parameter in _leaves(top_k_weights, seen):
            if id(parameter) in names:
                found[names[id(parameter)]] = parameter

    handles = [module.get_submodule(hooks.HANDLER).register_forward_pre_hook(look) for module in experts]
    try:
        with trainable(model, model.parameters()), torch.enable_grad():
            model(input_ids=_probe(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise OptionError(
            f"{type(model).__name__} has no router parameters that gradients reach",
            option="router",
            fix="leave the routers of this model as they are (router none)",
        )
    return found


def find_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are vectors of floats: scales of norms, and biases."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point()
    }


@contextmanager
def trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode inside, and gradients for exactly these parameters (if of a float dtype); then all as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    wanted = {id(parameter) for parameter in parameters}
    model.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted and parameter.is_floating_point())
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def decoder_blocks(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Paths of all decoder blocks: members of the outermost ModuleList around each experts module."""
    stacks: dict[str, None] = {}
    for path in paths:
        parts = attach.locate(model, path).split(".")
        ends = (".".join(parts[:end]) for end in range(1, len(parts)))
        stacks.update(dict.fromkeys([end for end in ends if isinstance(model.get_submodule(end), nn.ModuleList)][:1]))
    return tuple(f"{stack}.{name}" for stack in stacks for name, _ in model.get_submodule(stack).named_children())


def _probe(model: Any) -> Tensor:
    embedding = model.get_input_embeddings().weight
    return torch.arange(1, 1 + PROBE_TOKENS, device=embedding.device).unsqueeze(0) % embedding.shape[0]


def _leaves(value: Tensor, seen: set[Any]) -> Iterator[nn.Parameter]:
    """The leaves of the graph that `value` depends on, but for those behind nodes already in `seen`."""
    leaves = []
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # autograd's own mark of the node that gathers a leaf's gradient
            leaves.append(node.variable)
        stack += [after for after, _ in node.next_functions]
    return iter(leaves)

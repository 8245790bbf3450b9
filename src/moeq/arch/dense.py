"""Linear layers outside the routed experts that may be quantized too."""

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from moeq.arch.keymap import KeyMap
from moeq.arch.sources import WEIGHT_DTYPES
from moeq.model_parts import DenseLinear
from moeq.spec import TensorInfo

MIN_SIZE = 32
MAX_ASPECT = 16
"""Linears with fewer rows or columns, or a more slender shape, are gates and low-rank corrections (decay and
head gates of linear attention, hyper-connections): a negligible share of the bytes, and easily harmed."""

ROUTING = re.compile(r"(^|\.)(\w*router\w*|gate|\w*expert_gate|\w*indexer\w*)(\.|$)")
"""Modules that choose experts or tokens: a rounding error there changes the choice."""

SHARED = re.compile(r"(^|\.)shared_\w+(\.|$)")
MIXER = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*|mixer|mamba\w*|conv|\w*conv1d)(\.|$)")
FEED_FORWARD = re.compile(r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc\d|w\d)$")


def dense_linears(
    model: PreTrainedModel, blocks: Sequence[str], keymap: KeyMap, tensors: Mapping[str, TensorInfo]
) -> tuple[DenseLinear, ...]:
    """Linears whose weight is one 16- or 32-bit tensor on disk, and which the family does not keep in float32.

    Args:
        model: the meta model.
        blocks: paths of the decoder blocks; linears outside them (towers, projectors) are left alone,
            but for the output head.
        keymap: the routes of the checkpoint.
        tensors: its headers.
    """
    float32 = [
        re.compile(pattern.replace("*", ".*"))
        for pattern in (*model._keep_in_fp32_modules, *model._keep_in_fp32_modules_strict)
    ]
    found = []
    for path, block, kind in _candidates(model, blocks):
        source = _source(f"{path}.weight", model, keymap, tensors)
        if source is None or any(pattern.search(path) for pattern in float32):
            continue
        rows, columns = tensors[source].shape
        slender = min(rows, columns) < MIN_SIZE or max(rows, columns) > MAX_ASPECT * min(rows, columns)
        if kind == "lm_head" or not slender:
            found.append(DenseLinear(path=path, kind=kind, source=source, shape=(rows, columns), block=block))
    return tuple(found)


def _candidates(model: PreTrainedModel, blocks: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(path, block, kind) of plain linears, in the model's order."""
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            # Exactly nn.Linear: a subclass computes something of its own.
            if type(module) is nn.Linear and not ROUTING.search(name):
                yield f"{block}.{name}", block, _kind(name)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        path = next(path for path, module in model.named_modules() if module is head)
        yield path, "", "lm_head"


def _kind(name: str) -> str:
    if SHARED.search(name):
        return "shared"
    if FEED_FORWARD.search(name) and not re.search(r"attn|attention", name):
        return "dense"
    return "attention" if MIXER.search(name) else "dense"


def _source(key: str, model: PreTrainedModel, keymap: KeyMap, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The one tensor that is the parameter, if there is one."""
    route = keymap.routes.get(key)
    ties = model.all_tied_weights_keys
    if route is None or route.operations or key in ties or key in ties.values():
        return None
    name = route.sources[0][0]
    info = tensors[name]
    is_same = info.dtype in WEIGHT_DTYPES and info.shape == tuple(model.get_parameter(key).shape)
    return name if is_same else None

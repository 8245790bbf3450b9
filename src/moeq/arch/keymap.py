"""Which tensors on disk feed which parameters of the model, and by what transform.

transformers loads checkpoints through a list of renamings and converters (its conversion mapping).
Here that list is applied to names alone, so that the way back from a parameter to its tensors is
known without reading any, and one part of a model can be loaded and dropped at a time.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from moeq.errors import MissingTensorError, TensorError


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How some tensors become some parameters.

    Attributes:
        targets: keys of the model's state dict that are made together, in the converter's order.
        sources: names on disk, one tuple for each source pattern of the converter, each in natural order.
        operations: transformers' operations; none when the tensor is only renamed.
    """

    targets: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    operations: tuple[ConversionOps, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the route."""
        return tuple(name for group in self.sources for name in group)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyMap:
    """The routes of one checkpoint into one model.

    Attributes:
        routes: key of the model's state dict -> how it is made. Keys that no tensor feeds are absent.
        unused: tensors that feed nothing, such as multi-token-prediction layers.
        transforms: transformers' list, in the state that applying it to all names left it in.
    """

    routes: dict[str, Route]
    unused: tuple[str, ...]
    transforms: tuple[WeightTransform, ...]


def build_keymap(model: PreTrainedModel, names: Iterable[str]) -> KeyMap:
    """Apply the model's conversion mapping to the names of all tensors of a checkpoint.

    Args:
        model: the model, on any device.
        names: every tensor name of the checkpoint. Some renamings depend on which other names there are.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    grouped: dict[str, dict[str | None, list[str]]] = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        group = grouped.setdefault(key, {}) if key in state else None
        # As in transformers, the first tensor decides whether a key is renamed or converted.
        if group is None or (group and (None in group or pattern is None)):
            unused.append(name)
        else:
            group.setdefault(pattern, []).append(name)
    routes: dict[str, Route] = {}
    for key, group in grouped.items():
        route = _route(key, group, by_pattern)
        routes.update(dict.fromkeys(route.targets, route))
    return KeyMap(routes=routes, unused=tuple(unused), transforms=tuple(transforms))


def _route(key: str, group: dict[str | None, list[str]], by_pattern: dict[str, WeightConverter]) -> Route:
    pattern = next(iter(group))
    if pattern is None:
        return Route(targets=(key,), sources=(tuple(group[None]),))
    converter = by_pattern[pattern]
    first, *others = converter.target_patterns
    targets = (key, *(key.replace(first, other) for other in others))
    sources = tuple(tuple(group.get(source, ())) for source in converter.source_patterns)
    return Route(targets=targets, sources=sources, operations=tuple(converter.operations))


def load_prefix(
    model: PreTrainedModel,
    prefix: str,
    keymap: KeyMap,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    skip: Collection[str] = (),
) -> None:
    """Give everything under one module path its value, as `from_pretrained` would, on the CPU.

    Parameters and persistent buffers come from disk; buffers that no checkpoint holds (rotary
    frequencies, for one) are computed by the model's own initialisation.

    Args:
        model: a model of `build_meta_model`.
        prefix: path of a module, "" for the whole model.
        keymap: `build_keymap` of the model and its checkpoint.
        read: name on disk -> tensor.
        dtype: what parameters of the config's dtype become; the others (float32 by design) stay.
        skip: keys of parameters, or paths of modules, to leave on the meta device.

    Raises:
        MissingTensorError: no tensor feeds a parameter under `prefix`.
        TensorError: a tensor has the wrong shape or cannot be converted.
    """
    skipped = frozenset(skip)
    keys = [key for key in model.state_dict() if _within(key, prefix) and not _skipped(key, skipped)]
    partners = tied_partners(model)
    sources: dict[str, str] = {}
    for key in keys:
        candidates = (key, *partners.get(key, ()))
        feeding = next((candidate for candidate in candidates if candidate in keymap.routes), None)
        if feeding is not None:
            sources[key] = feeding
        elif is_required(model, key):
            raise MissingTensorError(
                "no tensor of the checkpoint feeds this parameter", tensor=key, fix="download the checkpoint again"
            )
    feeding_keys = set(sources.values())
    routes = [keymap.routes[key] for key in feeding_keys]
    _set_dtype(model, {target for route in routes for target in route.targets}, dtype)
    names = {name for route in routes for name in route.names}
    _convert(model, {name: read(name) for name in sorted(names)}, keymap, dtype)
    for key, source in sources.items():
        if key != source:
            _assign(model, key, _get(model, source))
    _initialise(model, prefix, skipped, dtype, [key for key in keys if key not in sources])


def unload_prefix(model: PreTrainedModel, prefix: str) -> None:
    """Return all parameters and buffers under a module path to the meta device."""
    for module in model.get_submodule(prefix).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device="meta"))


def _within(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(prefix + ".")


def _skipped(key: str, skipped: frozenset[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:end]) in skipped for end in range(1, len(parts) + 1))


def tied_partners(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Key -> the other keys that share its value."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {key: tuple(sorted(group - {key})) for group in groups.values() for key in group}


def is_required(model: PreTrainedModel, key: str) -> bool:
    """Whether transformers could only invent the value: a parameter that its class does not declare optional."""
    owner, _, name = key.rpartition(".")
    optional = any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_missing)
    return name in model.get_submodule(owner)._parameters and not optional


def _get(model: PreTrainedModel, key: str) -> Tensor:
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    value = module._parameters.get(name)
    if value is None:
        value = module._buffers[name]
    assert value is not None, key
    return value


def _assign(model: PreTrainedModel, key: str, value: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    setattr(model.get_submodule(owner), name, value)


def _set_dtype(model: PreTrainedModel, keys: Iterable[str], dtype: torch.dtype) -> None:
    """transformers casts what it loads to the dtype of the tensor that is there."""
    for key in keys:
        value = _get(model, key)
        if value.dtype == model.config.dtype and value.dtype != dtype:
            empty = torch.empty_like(value, device="meta", dtype=dtype)
            is_parameter = isinstance(value, nn.Parameter)
            _assign(model, key, nn.Parameter(empty, requires_grad=value.requires_grad) if is_parameter else empty)


def _convert(model: PreTrainedModel, tensors: dict[str, Tensor], keymap: KeyMap, dtype: torch.dtype) -> None:
    if not tensors:
        return
    plan = LoadStateDictConfig(
        dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=list(keymap.transforms)
    )
    with _silence():
        report, _ = convert_and_load_state_dict_in_model(
            model=model, state_dict=tensors, load_config=plan, disk_offload_index=None
        )
    for key, found, wanted in report.mismatched_keys:
        raise TensorError(
            f"shape {list(found)} is not the {list(wanted)} that the config asks for",
            tensor=key,
            fix="check that config.json belongs to these weights",
        )
    for key, message in report.conversion_errors.items():
        raise TensorError(
            f"transformers cannot convert the tensors of this parameter: {message.strip().splitlines()[-1]}",
            tensor=key,
            fix="download the checkpoint again",
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Without transformers' progress bar."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _initialise(
    model: PreTrainedModel, prefix: str, skipped: frozenset[str], dtype: torch.dtype, missing: Iterable[str]
) -> None:
    """Compute the buffers that are not on disk, with each sub-model's own initialisation, children first."""

    def blank(value: Tensor) -> Tensor:
        wanted = dtype if value.dtype == model.config.dtype else value.dtype
        empty = torch.empty_like(value, device="cpu", dtype=wanted)
        return nn.Parameter(empty, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else empty

    for key in missing:
        _assign(model, key, blank(_get(model, key)))
    inside = []
    for name, module in model.get_submodule(prefix).named_modules():
        path = ".".join(part for part in (prefix, name) if part)
        if not _skipped(path, skipped):
            inside.append((path, module))
    for _, module in inside:
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name in module._non_persistent_buffers_set:
                setattr(module, name, blank(buffer))
    with torch.no_grad(), guard_torch_init_functions():
        for path, module in reversed(inside):
            # The flag means that somebody has taken over the module's weights.
            if not vars(module).get("_is_hf_initialized", False):
                _owner(model, path)._init_weights(module)


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost sub-model that a module belongs to: its config and initialisation apply."""
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel):
            return module
    return model

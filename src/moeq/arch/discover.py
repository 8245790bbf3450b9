"""Finds everything quantizable in a checkpoint, for every family, from transformers' own model class.

All families share one experts protocol (transformers.integrations.moe): a module with stacked
`gate_up_proj` or `up_proj` and `down_proj` and four flags. No family is named here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from moeq.arch.complete import check_complete
from moeq.arch.dense import dense_linears
from moeq.arch.keymap import KeyMap, build_keymap
from moeq.arch.meta import build_meta_model
from moeq.arch.sources import Stack, matrix_sources
from moeq.checkpoint.locate import CONFIG_NAME
from moeq.errors import CheckpointError, NotMoeError
from moeq.model_parts import DenseLinear, MoeLayer
from moeq.spec import TensorInfo

FLAGS = frozenset({"has_gate", "has_bias", "is_transposed", "is_concatenated"})
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_NAMES = re.compile(r"(^|[._])experts?([._]|\d|$)")
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What a checkpoint holds.

    Attributes:
        model_type: the transformers model type.
        architecture: the transformers model class.
        layers: the layers of routed experts, in the model's order.
        dense: other linears that may be quantized, in the model's order.
    """

    model_type: str
    architecture: str
    layers: tuple[MoeLayer, ...]
    dense: tuple[DenseLinear, ...]


def discover(directory: Path, tensors: Mapping[str, TensorInfo]) -> Discovery:
    """Find the experts and other linears of a checkpoint; reads config.json and nothing else.

    Args:
        directory: the checkpoint.
        tensors: the headers of all its tensors.

    Raises:
        NotMoeError: the model has no routed experts.
        AlreadyQuantizedError: the source is quantized.
        MissingTensorError: a tensor that the model needs is absent.
        TensorError: a tensor has a wrong shape or dtype.
        CheckpointError: config.json is unusable, or the family stores its experts in an unknown way.
    """
    model = build_meta_model(directory)
    return discover_model(model, build_keymap(model, tensors), tensors, directory / CONFIG_NAME)


def discover_model(model: PreTrainedModel, keymap: KeyMap, tensors: Mapping[str, TensorInfo], file: Path) -> Discovery:
    """As `discover`, for callers that have the meta model and its key map already."""
    paths = list(experts_paths(model))
    if not paths:
        raise _no_experts(model, tensors, file)
    layers = tuple(_layer(model, path, keymap, tensors, file) for path in paths)
    check_complete(model, keymap, tensors, file)
    blocks = decoder_blocks(model, layers)
    return Discovery(
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        layers=layers,
        dense=dense_linears(model, blocks, keymap, tensors),
    )


def _no_experts(model: PreTrainedModel, tensors: Mapping[str, TensorInfo], file: Path) -> NotMoeError:
    """A model whose experts moeq cannot see is not a dense one."""
    name = type(model).__name__
    seen = next((tensor for tensor in tensors if EXPERT_NAMES.search(tensor)), None)
    configs = (model.config, model.config.get_text_config())
    counts = [getattr(config, key, None) for config in configs for key in EXPERT_COUNTS]
    if seen is None and not any(isinstance(count, int) and count > 1 for count in counts):
        return NotMoeError(
            f"{name} has no routed experts with this config",
            file=file,
            fix="give a Mixture-of-Experts checkpoint; moeq does not quantize dense models",
        )
    return NotMoeError(
        f"{name} keeps its experts outside transformers' experts protocol, or in a part that moeq does not look into",
        tensor=seen,
        fix="moeq cannot quantize this family yet (docs/families.md)",
    )


def experts_paths(model: PreTrainedModel) -> Iterator[str]:
    """Paths of the modules that follow the experts protocol, outside vision and audio towers.

    A part that has a vocabulary is no tower: the talker of an omni model speaks.
    """
    text_types = {model.config.model_type, model.config.get_text_config().model_type}
    models = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for path, module in model.named_modules():
        if not is_experts(module):
            continue
        nearest = max((each for each in models if not each or path.startswith(each + ".")), key=len)
        config = models[nearest].config
        if config.model_type in text_types or getattr(config, "vocab_size", None):
            yield path


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts protocol."""
    down = module._parameters.get("down_proj")
    return vars(module).keys() >= FLAGS and down is not None and down.ndim == 3


def decoder_blocks(model: PreTrainedModel, layers: tuple[MoeLayer, ...]) -> tuple[str, ...]:
    """Paths of all decoder blocks, in order: those with experts and their dense siblings."""
    stacks = dict.fromkeys(layer.block.rpartition(".")[0] for layer in layers)
    return tuple(f"{stack}.{name}" for stack in stacks for name, _ in model.get_submodule(stack).named_children())


def _block(model: PreTrainedModel, path: str) -> str:
    """The outermost member of a ModuleList around `path`: its decoder layer."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    raise CheckpointError(
        f"{model.config.model_type} keeps its experts outside any list of layers", tensor=path, fix="report the family"
    )


def _layer(
    model: PreTrainedModel, path: str, keymap: KeyMap, tensors: Mapping[str, TensorInfo], file: Path
) -> MoeLayer:
    experts = model.get_submodule(path)
    flags = vars(experts)
    transposed, concatenated = flags["is_transposed"], flags["is_concatenated"]
    parameters = experts._parameters
    fused = ("gate", "up") if flags["has_gate"] else ("up",)
    shapes: dict[str, tuple[int, int]] = {}
    sources = {}
    num_experts = 0
    for name, projections in (("gate_up_proj" if flags["has_gate"] else "up_proj", fused), ("down_proj", ("down",))):
        parameter = parameters.get(name)
        key = f"{path}.{name}"
        if parameter is None or parameter.ndim != 3:
            raise CheckpointError(
                f"{model.config.model_type} breaks transformers' experts protocol", tensor=key, fix="report the family"
            )
        if key in model.all_tied_weights_keys:
            raise CheckpointError(
                f"{model.config.model_type} shares its experts between two modules, which moeq does not support",
                tensor=key,
                fix="use another family",
            )
        num_experts, rows, columns = parameter.shape
        if transposed:
            rows, columns = columns, rows
        stack = Stack(
            key=key,
            model_type=model.config.model_type,
            projections=projections,
            num_experts=num_experts,
            shape=(rows // len(projections), columns),
            transposed=transposed,
            concatenated=concatenated,
        )
        shapes.update(dict.fromkeys(projections, stack.shape))
        sources.update(matrix_sources(stack, keymap.routes.get(key), tensors))
    return MoeLayer(
        path=path,
        block=_block(model, path),
        num_experts=num_experts,
        top_k=_top_k(experts, num_experts, file),
        shapes=shapes,
        sources=sources,
        concatenated=concatenated,
        transposed=transposed,
    )


def _top_k(experts: nn.Module, num_experts: int, file: Path) -> int:
    """Experts per token, under whichever of the families' names the config has it."""
    config = vars(experts)["config"]
    for name in TOP_K_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            if not 1 <= value <= num_experts:
                raise CheckpointError(
                    f"{name} is {value}, but there are {num_experts} experts", file=file, fix="correct config.json"
                )
            return value
    raise CheckpointError(
        f"the config does not say how many experts a token uses ({', '.join(TOP_K_NAMES)})",
        file=file,
        fix="correct config.json",
    )

"""Experts found by their names: families that transformers does not have, and whose code moeq does not run to look.

Many checkpoints bring their own model code (`auto_map` in config.json). What they hold is in the names
of their tensors: `...experts.7.gate_proj.weight`. Such experts are modules of their own in the model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import transformers

from moeq.arch.discover import TOP_K_NAMES, Discovery
from moeq.arch.sources import WEIGHT_DTYPES
from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.errors import CheckpointError, MissingTensorError, NotMoeError, TensorError
from moeq.model_parts import MatrixSource, MoeLayer
from moeq.spec import TensorInfo

SCHEMES: Final = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"gate": "linear", "up": "linear_v", "down": "linear_1"},
    {"up": "fc1", "down": "fc2"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "w1", "down": "w2"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
)
"""Projection -> name of its linear, for gated and plain experts; the first scheme that fits counts."""
_EXPERT: Final = re.compile(r"(.*\bexperts?)\.(\d+)\.(\w+)\.weight")
_BLOCK: Final = re.compile(r"(.*?\.\d+)\.")


def brings_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers does not have the model, but its directory has code for it."""
    known = config.get("model_type") in transformers.CONFIG_MAPPING
    code = config.get("auto_map")
    return not known and isinstance(code, dict) and any(str(name).startswith("AutoModel") for name in code)


def code_is_not_trusted(directory: Path) -> CheckpointError:
    """The refusal of a model whose code nobody allowed to run."""
    return CheckpointError(
        "transformers does not have this model; only code in its own directory can load it",
        file=directory / CONFIG_NAME,
        option="trust-remote-code",
        fix="read that code, and add --trust-remote-code (trust_remote_code=True) if you trust it",
    )


def named_experts(directory: Path, tensors: Mapping[str, TensorInfo]) -> Discovery:
    """The experts of a checkpoint by the names of its tensors.

    Args:
        directory: the checkpoint; only its config.json is read.
        tensors: the headers of all its tensors.

    Raises:
        NotMoeError: no tensor is named as an expert's.
        MissingTensorError: an expert is absent.
        TensorError: a tensor has another shape or dtype than its siblings.
        CheckpointError: the config does not say how many experts a token uses.
    """
    config = read_config(directory / CONFIG_NAME)
    found: dict[str, dict[str, set[int]]] = {}
    for name in tensors:
        match = _EXPERT.fullmatch(name)
        if match:
            found.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    layers = tuple(_layer(path, linears, tensors, config, directory / CONFIG_NAME) for path, linears in found.items())
    if not layers:
        raise NotMoeError(
            "no tensor is named as an expert's (experts.N.gate_proj.weight and the like)",
            file=directory / CONFIG_NAME,
            fix="give a Mixture-of-Experts checkpoint whose experts are stored one by one",
        )
    names = config.get("architectures") or [str(config["auto_map"].get("AutoModelForCausalLM", "")).rpartition(".")[2]]
    return Discovery(model_type=str(config.get("model_type")), architecture=str(names[0]), layers=layers, dense=())


def _layer(
    path: str, linears: Mapping[str, set[int]], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], file: Path
) -> MoeLayer:
    scheme = next((each for each in SCHEMES if set(each.values()) == set(linears)), None)
    if scheme is None:
        raise CheckpointError(
            f"the names of its experts' tensors are not known: {', '.join(sorted(linears))}",
            tensor=f"{path}.0",
            fix="report the family to moeq",
        )
    num_experts = 1 + max(max(experts) for experts in linears.values())
    sources, shapes = {}, {}
    for projection, linear in scheme.items():
        sources[projection] = MatrixSource(name=f"{path}.{{expert}}.{linear}.weight", stacked=False)
        shapes[projection] = _shape(sources[projection], num_experts, tensors)
    block = _BLOCK.match(path)
    return MoeLayer(
        path=path,
        block=path if block is None else block[1],
        num_experts=num_experts,
        top_k=_top_k(config, num_experts, file),
        shapes=shapes,
        sources=sources,
        members={projection: f"{{expert}}.{linear}" for projection, linear in scheme.items()},
    )


def _shape(source: MatrixSource, num_experts: int, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """The shape of all experts' matrices."""
    first = tensors.get(source.tensor(0))
    for expert in range(num_experts):
        name = source.tensor(expert)
        if name not in tensors or first is None:
            raise MissingTensorError("this expert is absent", tensor=name, fix="download the checkpoint again")
        info = tensors[name]
        if len(info.shape) != 2 or info.shape != first.shape or info.dtype not in WEIGHT_DTYPES:
            message = f"{info.dtype} {list(info.shape)} is unlike the {list(first.shape)} of the first expert"
            raise TensorError(message, file=info.file, tensor=name, fix="convert the checkpoint to bfloat16")
    assert first is not None
    return first.shape[0], first.shape[1]


def _top_k(config: Mapping[str, Any], num_experts: int, file: Path) -> int:
    """Experts per token, by whichever name the config has it under, also in one of its parts."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in (*TOP_K_NAMES, "moe_top_k", "num_selected_experts", "top_k", "moe_router_topk", "router_top_k"):
            value = section.get(name)
            if isinstance(value, int) and 1 <= value <= num_experts:
                return value
    raise CheckpointError(
        f"the config does not say how many experts a token uses ({', '.join(TOP_K_NAMES)})",
        file=file,
        fix="correct config.json",
    )

"""A checkpoint's model as a skeleton: every module of transformers' own class, no weights."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

from moeq.arch.sorted_rows import adopt
from moeq.checkpoint.locate import CONFIG_NAME, read_config
from moeq.checkpoint.rounded.registry import OURS
from moeq.errors import AlreadyQuantizedError, CheckpointError


def build_meta_model(directory: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that config.json describes, on the meta device, in evaluation mode.

    Args:
        directory: the checkpoint; only its config.json is read, no code of it is run.
        dtype: of the parameters; the config's own when None, float32 when it names none.

    Raises:
        AlreadyQuantizedError: it is a packed checkpoint.
        CheckpointError: config.json is absent or malformed, or transformers does not know the model.
    """
    file = directory / CONFIG_NAME
    data = read_config(file)
    config = load_config(directory, data)
    model_class = _model_class(config, data.get("architectures"), file)
    wanted = dtype or config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(config, dtype=wanted)
    except Exception as error:  # whatever a family's constructor makes of impossible sizes
        raise CheckpointError(
            f"transformers cannot build {model_class.__name__} from this config: {_first_line(error)}",
            file=file,
            fix="download config.json again, or install the transformers version the checkpoint was made for",
        ) from error
    adopt(model)
    return model.eval()


def load_config(directory: Path, data: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config of a checkpoint whose config.json holds `data`; raises as `build_meta_model`."""
    file = directory / CONFIG_NAME
    packed = data.get("quantization_config")
    if isinstance(packed, dict) and packed.get("quant_method") == OURS:
        raise AlreadyQuantizedError(
            "this is a packed checkpoint of moeq", file=file, fix="give the original that it was made from"
        )
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}",
            file=file,
            fix="use a family that transformers supports natively, or a newer transformers",
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each family validates its config in its own way
        raise CheckpointError(
            f"transformers rejects this {model_type} config: {_first_line(error)}",
            file=file,
            fix="download config.json again",
        ) from error
    return config


def _model_class(config: PreTrainedConfig, architectures: Any, file: Path) -> type[PreTrainedModel]:
    names = architectures if isinstance(architectures, list) else []
    if names and isinstance(names[0], str):
        named: Any = getattr(transformers, names[0], None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            fitting: type[PreTrainedModel] = named
            if fitting.config_class is not None and isinstance(config, fitting.config_class):
                return fitting
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING):
        found = mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise CheckpointError(
        f"transformers {transformers.__version__} has no model class for {config.model_type}"
        + (f" (the config names {names[0]})" if names else ""),
        file=file,
        fix="use a family that transformers supports natively, or a newer transformers",
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""moeq checkpoints in transformers: `from_pretrained` keeps the experts packed.

`register()` is called by `import moeq`; a checkpoint's own `moeq_hook.py` imports moeq, so that
`from_pretrained(directory, trust_remote_code=True)` needs no import by the user.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeq import codec
from moeq.arch import hooks
from moeq.errors import VersionError
from moeq.format.manifest import Manifest, PackedLayer, PackedLinear
from moeq.layouts.validate import SUFFIXES
from moeq.runtime import attach, lean, whole_layers

QUANT_METHOD = "moeq"


class MoeqConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json.

    Args:
        format_version: of docs/format.md.
        layers: the packed layers of experts, as plain JSON.
        dense: the packed linears, as plain JSON.
        facts: everything else the file says (bits, group_size, plan, ...), kept as it is.
    """

    def __init__(
        self,
        format_version: int = Manifest.VERSION,
        layers: list[dict[str, Any]] | None = None,
        dense: list[dict[str, Any]] | None = None,
        **facts: Any,
    ) -> None:
        if format_version != Manifest.VERSION:
            raise VersionError(
                f"the checkpoint has format version {format_version}, this moeq reads {Manifest.VERSION}",
                file="config.json",
                fix="upgrade moeq",
            )
        facts.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.layers = layers or []
        self.dense = dense or []
        for name, value in facts.items():
            setattr(self, name, value)


class MoeqQuantizer(HfQuantizer):
    """Swaps packed modules in before loading and binds their bytes after it."""

    requires_calibration = True
    quantization_config: MoeqConfig

    def __init__(self, quantization_config: MoeqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[Path] = []
        self._sizes: dict[str, int] = {}
        layers = (codec.decode(PackedLayer, layer) for layer in quantization_config.layers)
        self._layers = tuple(layer for layer in layers if layer.attached)
        self._dense = tuple(codec.decode(PackedLinear, linear) for linear in quantization_config.dense)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self._files = [Path(file) for file in checkpoint_files or []]
        attach.prepare(model, self._layers, self._dense)
        self._sizes = attach.announce(model, self._layers, self._dense, self._files)
        # The packed bytes are mapped by moeq, not read by transformers.
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        ignored |= {re.escape(suffix) + "$" for suffix in SUFFIXES}
        model._keys_to_ignore_on_load_unexpected = ignored  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        attach.bind(model, self._layers, self._dense, self._files)
        if lean.lighten(model):
            whole_layers.join_layers(model)
        # Loading through moeq_hook.py marks the stock config class as remote code; saving any model
        # of that class would then look for the hook.
        type(model.config)._auto_class = None  # type: ignore[union-attr]
        for module in model.modules():
            if hooks.HANDLER in module._modules:
                module.config._experts_implementation = hooks.EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element; the packed bytes that a device gets where a module only announces them."""
        size = self._sizes.get(param_name)
        return super().param_element_size(model, param_name, param) if size is None else size

    def is_serializable(self) -> bool:
        """Packed checkpoints are written by `moeq quantize` only."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients reach inputs, routers, norms and adapters; packed weights stay as they are."""
        return True


def register() -> None:
    """Make transformers know the quant_method "moeq"; safe to call again."""
    hooks.register_experts()
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MoeqConfig)
        register_quantizer(QUANT_METHOD)(MoeqQuantizer)

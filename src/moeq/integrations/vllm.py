"""moeq checkpoints in vLLM, as they are: experts stay packed, widths mixed inside a layer, in every layout.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes; nothing else
imports this module. vLLM reads what is not packed. The packed bytes are mapped by moeq when all else is loaded, and
computed by the kernels that compute them everywhere else.

Experts are dealt out over the ranks of a group, whole, whether it is one of tensors or of experts: vLLM adds up what
the ranks answer in both cases.

Legend: T tokens, k experts per token, H hidden, E experts.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from moeq import codec
from moeq.checkpoint.locate import resolve
from moeq.errors import OptionError, PackedError, VersionError
from moeq.format.manifest import Manifest, PackedLayer, PackedLinear
from moeq.kernels.facts import Kinds
from moeq.layouts.grouped.serving import PackedLinear as Linear
from moeq.layouts.grouped.serving import open_records
from moeq.layouts.known_answers import Gated
from moeq.layouts.serving import FIX, ExpertsModule, layout
from moeq.layouts.validate import SUFFIXES
from moeq.runtime.attach import map_packed

QUANT_METHOD: Final = "moeq"
ACTIVATION: Final = "silu"
_EXPERTS: Final[dict[str, tuple[ExpertsModule, Tensor]]] = {}
_LINEARS: Final[dict[str, tuple[Linear, ...]]] = {}
"""What the operators compute with: a graph that torch compiles sees names instead of modules."""


class Config(QuantizationConfig):
    """The `quantization_config` of config.json.

    Args:
        layers: the packed layers of experts.
        dense: the packed linears.
        exact: whether activations always stay floats, see `PackedLayer.exact`.
    """

    def __init__(self, layers: tuple[PackedLayer, ...], dense: tuple[PackedLinear, ...], exact: bool | None) -> None:
        super().__init__()
        self.layers = {_block(layer.path): layer for layer in layers}
        self.dense = {linear.path: linear for linear in dense}
        self.exact = exact
        self._kinds: dict[Any, Kinds] = {}

    def get_name(self) -> str:
        """The name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What kernels take."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The first GPUs whose tensor cores take bfloat16; CPUs are not asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """config.json says everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Config":
        """From the plain JSON; "exact_activations" may be put there by --hf-overrides.

        Raises:
            VersionError: another version of the format.
            OptionError: experts that are modules of their own.
        """
        version = config.get("format_version")
        if version != Manifest.VERSION:
            message = f"the checkpoint has format version {version}, this moeq reads {Manifest.VERSION}"
            raise VersionError(message, file="config.json", fix="upgrade moeq")
        layers = tuple(codec.decode(PackedLayer, layer) for layer in config.get("layers") or [])
        if any(layer.members for layer in layers):
            message = "experts of a checkpoint's own code are not served by vLLM"
            raise OptionError(message, option="model", fix="serve it with moeq serve --trust-remote-code")
        dense = tuple(codec.decode(PackedLinear, linear) for linear in config.get("dense") or [])
        return cls(tuple(layer for layer in layers if layer.attached), dense, config.get("exact_activations"))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Packed tensors are not vLLM's to load."""
        return WeightsMapper(orig_to_new_suffix=dict.fromkeys(SUFFIXES))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer computes; None leaves it to vLLM.

        Raises:
            PackedError: the checkpoint has only a part of what this layer joins.
        """
        if isinstance(layer, RoutedExperts):
            entry = self.layers.get(_block(prefix))
            return None if entry is None else Experts(layer.moe_config, entry, self, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parts = [self._packed(path) for path in self._members(prefix)]
        found = [part for part in parts if part is not None]
        if len(found) not in (0, len(parts)):
            raise PackedError("only some of what vLLM joins is packed", tensor=prefix, fix=FIX)
        if found:
            return Packed(tuple(found), self, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _members(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that a layer of vLLM joins."""
        parent, _, name = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{each}" if parent else each for each in names]

    def _packed(self, path: str) -> PackedLinear | None:
        """The entry of a linear; vLLM may put names before the block that transformers does not have."""
        if path in self.dense:
            return self.dense[path]
        tail = re.search(r"layers\.\d+\..*", path)
        ends = (each for known, each in self.dense.items() if tail is not None and known.endswith(f".{tail[0]}"))
        return next(ends, None)

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors, mapped."""
        return _mapped(str(get_current_vllm_config().model_config.model))

    def kinds(self, tensors: dict[str, Tensor]) -> dict[Any, Kinds]:
        """What kernels are compiled for, over all layers."""
        if not self._kinds:
            for entry in self.layers.values():
                for key, kinds in layout(entry.layout).open(entry, tensors).kinds().items():
                    self._kinds[key] = self._kinds[key] | kinds if key in self._kinds else kinds
        return self._kinds


def _block(path: str) -> int:
    """The number of the block that a path lies in: families' names of experts differ between the two libraries."""
    found = re.findall(r"\.(\d+)\.", f".{path}.")
    return int(found[-1]) if found else -1


@cache
def _mapped(model: str) -> dict[str, Tensor]:
    return map_packed(sorted(Path(resolve(model, local_files_only=True)).glob("*.safetensors")))


class Experts(FusedMoEMethodBase):
    """The routed experts of a layer.

    Raises:
        OptionError: the family's experts are gated by something else than SiLU.
    """

    def __init__(self, moe: Any, entry: PackedLayer, config: Config, prefix: str) -> None:
        super().__init__(moe)
        self._entry, self._config = entry, config
        self._name = f"{prefix} {id(config)}"
        activation = getattr(moe.activation, "value", moe.activation)
        if activation != ACTIVATION or "gate" not in entry.shapes:
            message = f"{prefix}: experts with {activation} are not served by vLLM"
            raise OptionError(message, option="model", fix="serve it with moeq serve")

    def create_weights(self, layer: nn.Module, *sizes: Any, **more: Any) -> None:
        """There is nothing that vLLM would load."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bind the bytes of this rank's experts to the device.

        Raises:
            PackedError: bytes are missing, or contradict each other.
        """
        tensors = self._config.tensors()
        opened = layout(self._entry.layout).open(self._entry, tensors)
        own = self._own(layer)
        mine = opened.only(own)
        device = get_current_vllm_config().device_config.device
        device = torch.device(device) if isinstance(device, str) else device
        module = layout(self._entry.layout).module(self._entry)
        mine.fill(module, device, self._config.kinds(tensors))
        module.exact = self._config.exact
        local_E = torch.full((self._entry.num_experts,), self._entry.num_experts, dtype=torch.int64)
        local_E[own] = torch.arange(len(own)) if mine is not opened else torch.tensor(own)
        _EXPERTS[self._name] = module, local_E.to(device)

    def _own(self, layer: nn.Module) -> list[int]:
        """This rank's experts."""
        expert_map = getattr(layer, "expert_map", None)
        if isinstance(expert_map, Tensor):
            return torch.nonzero(expert_map >= 0).flatten().tolist()
        parallel = self.moe.moe_parallel_config
        return list(range(parallel.tp_rank, self._entry.num_experts, parallel.tp_size))

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """vLLM's own kernels are not asked."""
        return

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H): this rank's part of the sum."""
        return experts_op(x, topk_weights, topk_ids, self._name)


class Packed(LinearMethodBase):
    """Linears outside the experts, one or several side by side."""

    def __init__(self, parts: tuple[PackedLinear, ...], config: Config, prefix: str) -> None:
        super().__init__()
        self._parts, self._config = parts, config
        self._name = f"{prefix} {id(config)}"

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """There is nothing that vLLM would load.

        Raises:
            OptionError: the layer is split over ranks.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            message = f"{self._parts[0].path} is packed, and cannot be split over ranks"
            raise OptionError(message, option="dense-bits", fix="quantize with --dense-bits 16, or serve on one rank")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bind the bytes; raises as `Experts.process_weights_after_loading`."""
        tensors, modules = self._config.tensors(), []
        device = get_current_vllm_config().device_config.device
        for part in self._parts:
            data, entries = open_records(part.path, (part.shape,), tensors)
            rows, columns = part.shape
            module = Linear(nn.Linear(columns, rows, bias=False, device="meta"))
            module.bind(data.to(device), entries[0][0][1])
            module.exact = self._config.exact
            modules.append(module)
        _LINEARS[self._name] = tuple(modules)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N)."""
        y = linears_op(x, self._name, sum(part.shape[0] for part in self._parts))
        return y if bias is None else y + bias


@torch.library.custom_op("moeq::vllm_experts", mutates_args=())
def experts_op(x_TH: Tensor, weights_Tk: Tensor, index_Tk: Tensor, name: str) -> Tensor:
    """What a rank's experts answer; those of other ranks count as experts that do not exist."""
    module, local_E = _EXPERTS[name]
    return module(Gated(), x_TH, local_E[index_Tk.long()], weights_Tk)


@experts_op.register_fake
def _(x_TH: Tensor, weights_Tk: Tensor, index_Tk: Tensor, name: str) -> Tensor:
    return torch.empty_like(x_TH)


@torch.library.custom_op("moeq::vllm_linears", mutates_args=())
def linears_op(x: Tensor, name: str, rows: int) -> Tensor:
    """The answers of linears side by side."""
    answers = [module(x) for module in _LINEARS[name]]
    return answers[0] if len(answers) == 1 else torch.cat(answers, dim=-1)


@linears_op.register_fake
def _(x: Tensor, name: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def register() -> None:
    """Make vLLM know the quant_method "moeq"; safe to call again."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    try:
        known = get_quantization_config(QUANT_METHOD)
    except ValueError:
        known = None
    if known is not Config:
        register_quantization_config(QUANT_METHOD)(Config)

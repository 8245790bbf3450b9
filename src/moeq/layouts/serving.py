"""What a layout is to a model that runs on packed bytes: a module, and how to fill it. A seam of `moeq.layouts`.

Where bytes come to a device, kernels get what they want to know of them, and `moeq.layouts.trust` is asked whether they
may compute there: kernels that know nothing refuse, and the torch reference serves.

Legend: T tokens, k experts per token, H hidden, N output rows, K input columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from moeq.checkpoint.read import Reader
from moeq.errors import PackedError
from moeq.format.manifest import PackedLayer as Entry
from moeq.kernels.facts import Kinds
from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX, part
from moeq.spec import TensorInfo

FIX = "download or quantize the checkpoint again"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCall:
    """A layer's call on a GPU, as far as it matters for what is compiled.

    Attributes:
        same: calls of which this is equal need the same kernels.
        hidden: H.
        device: where the bytes are.
        run: (T, H), (T, k), (T, k) -> (T, H).
    """

    same: str
    hidden: int
    device: torch.device
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


class Loose(nn.Module, ABC):
    """Packed weights while their scales are trained: a child of the module over them, with float32 parameters.

    The bytes stay as they are; the module multiplies as if the parameters were in them, rounded.
    """

    @abstractmethod
    def blob(self) -> Tensor:
        """The bytes with the parameters in them: uint8, as many as before, on the CPU."""
        ...


class ExpertsModule(nn.Module, ABC):
    """The handler attached to a family's experts module (`moeq.arch.hooks`).

    It is made empty, while the model is a skeleton, and bound to its bytes after loading.

    Attributes:
        exact: whether kernels keep activations in floats: always, never, or (None) unless few tokens are computed.
        loose: what is trained of its bytes, None unless they are.
    """

    exact: bool | None
    data: Tensor | None
    loose: Loose | None

    @property
    @abstractmethod
    def layer(self) -> Any:
        """The packed weights, as views."""
        ...

    @abstractmethod
    def forward(self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        ...

    @abstractmethod
    def weights(self, expert: int, projection: str) -> Tensor:
        """What the bytes of one expert's projection decode to, float32 on the CPU: what a writer noted."""
        ...

    def loosen(self) -> Loose | None:
        """Let scales be trained from now on, by the torch reference; None where a layout has none that can be."""
        return None

    @abstractmethod
    def chosen_bytes(self, experts: Sequence[int]) -> int:
        """Bytes that these experts take, with all that they share."""
        ...

    @abstractmethod
    def device_call(self, experts: nn.Module) -> DeviceCall | None:
        """The call on a GPU, or None where no kernel of a GPU serves it."""
        ...

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if is_placed(self.data):
            _ = self.layer  # now, not in the first call: that may be a graph's, whose memory does not last
        return self


class OpenedLayer(ABC):
    """What the bytes of a layer say, on the CPU, proven as far as that is cheap."""

    @abstractmethod
    def dense(self, expert: int, projection: str) -> Tensor:
        """The matrix (N, K) that an expert multiplies with, float32."""
        ...

    def only(self, experts: Sequence[int]) -> "OpenedLayer":
        """The layer with some experts alone, in this order; the whole layer where experts share their bytes."""
        del experts
        return self

    @abstractmethod
    def kinds(self) -> Mapping[Hashable, Kinds]:
        """What kernels are compiled for; layers that have a key in common share them."""
        ...

    @abstractmethod
    def fill(self, module: nn.Module, device: torch.device, common: Mapping[Hashable, Kinds]) -> None:
        """Bind the module of this layout to the bytes on a device; `common` has the keys of `kinds`."""
        ...


class Tables:
    """Headers and tables of a checkpoint, for checks."""

    def __init__(self, headers: Mapping[str, TensorInfo], reader: Reader) -> None:
        self._headers, self._reader = headers, reader

    def expect(self, name: str, dtype: str, num_dims: int) -> TensorInfo:
        """What the header says of a tensor.

        Raises:
            PackedError: it is absent, or of another type or number of dimensions.
        """
        info = self._headers.get(name)
        if info is None:
            raise PackedError("a packed tensor is missing", tensor=name, fix=FIX)
        if info.dtype != dtype or len(info.shape) != num_dims:
            raise PackedError(
                f"the tensor is {info.dtype} {list(info.shape)}, not {dtype} with {num_dims} dimensions",
                tensor=name,
                fix=FIX,
            )
        return info

    def tensor(self, name: str) -> Tensor:
        """A table's numbers."""
        return self._reader.tensor(name)


class Layout(ABC):
    """How layers of a layout are served; every layout has one, as `LAYOUT` in its file `serving`.

    Attributes:
        suffixes: endings of the names of its tensors.
    """

    suffixes: tuple[str, ...] = (DATA_SUFFIX, TABLE_SUFFIX)

    @abstractmethod
    def check(self, layer: Entry, tables: Tables) -> None:
        """Prove headers and tables of a layer, but not its data.

        Raises:
            PackedError: they contradict each other or the manifest.
        """
        ...

    @abstractmethod
    def module(self, layer: Entry) -> ExpertsModule:
        """An empty module."""
        ...

    @abstractmethod
    def open(self, layer: Entry, tensors: Mapping[str, Tensor]) -> OpenedLayer:
        """A layer of mapped tensors.

        Raises:
            PackedError: bytes are missing, or contradict each other.
        """
        ...


def layout(name: str) -> Layout:
    """How layers of a layout are served."""
    found = part(name, "serving").LAYOUT
    assert isinstance(found, Layout)
    return found


def pair(
    tensors: Mapping[str, Tensor], path: str, suffixes: tuple[str, str] = (DATA_SUFFIX, TABLE_SUFFIX)
) -> tuple[Tensor, Tensor]:
    """A blob and its table.

    Raises:
        PackedError: one of them is missing.
    """
    for suffix in suffixes:
        if path + suffix not in tensors:
            raise PackedError("packed tensor missing", tensor=path + suffix, fix=FIX)
    return tensors[path + suffixes[0]], tensors[path + suffixes[1]]


def is_placed(data: Tensor | None) -> bool:
    """Whether there are bytes, on a device that has kernels."""
    return data is not None and data.device.type in ("cpu", "cuda")


def first(kernels: Sequence[Callable[..., Tensor | None]], *arguments: Any) -> Tensor:
    """The answer of the first kernel that does not refuse; the torch reference, which never does, comes last."""
    for kernel in kernels:
        output = kernel(*arguments)
        if output is not None:
            return output
    raise AssertionError("the reference kernel never refuses")

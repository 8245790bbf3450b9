"""A GPU that is not there, for tests: tensors that say they are on "cuda:0" and compute with real numbers on the CPU.

    with pretend_gpu.present() as gpu:
        moeq.quantize(model, out, device="cuda", ...)
    assert gpu.calls["mm", "cuda"]

Tensors of both devices in one call are an error, as they are with CUDA; what CUDA lets pass, passes: numbers (tensors
without dimensions), copies, indices on the CPU. Nothing of the inner tensor can be had but by a copy to the CPU. So
whole runs go through, values and all, where torch's FakeTensorMode would stop at the first `.item()`.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils.checkpoint import checkpoint

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index", "aten::_index_put_impl_")


class PretendTensor(torch.Tensor):
    """A tensor "on the GPU"; `inner` is where its numbers are.

    To torch's core it is a meta tensor, which needs no support for CUDA; to Python it says "cuda:0".
    """

    inner: Tensor
    device = property(lambda _: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    is_meta = property(lambda _: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("meta"), requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.inner!r})"

    def tolist(self) -> Any:
        """As CUDA's: torch refuses subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, None)


class _Places(TorchFunctionMode):
    """Gives "cuda" its number, which torch would ask a driver for, and lets tensors go where torch thinks they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(_numbered, (args, kwargs or {}))
        if func is torch.Tensor.to and isinstance(args[0], PretendTensor):
            where = kwargs.get("device", args[1] if args[1:] else None)
            if isinstance(where, torch.device | str) and str(where) == "meta":
                return args[0].inner.to("meta")
        if func in (torch.Tensor.to, torch.Tensor.type_as) and isinstance(args[1] if args[1:] else None, PretendTensor):
            return args[0].to(DEVICE, args[1].dtype)  # torch would go where it takes the other to be
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return PretendTensor(func(*args, **{**kwargs, "device": CPU}))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], PretendTensor):
            args = args[0], _indices(args[1])
        if func is torch.Tensor.new_tensor and isinstance(args[0], PretendTensor):
            return PretendTensor(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        if func is torch.Tensor.__setitem__ and isinstance(args[0], PretendTensor):
            value = args[2]
            if not isinstance(value, Tensor):
                value = PretendTensor(torch.tensor(value, dtype=args[0].dtype))
            args = args[0], _indices(args[1]), value  # torch would make meta tensors of lists and numbers
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], PretendTensor):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _indices(index: Any) -> Any:
    """Lists and arrays as tensors on the CPU: torch would put them where it takes the indexed tensor to be."""
    if isinstance(index, tuple):
        return tuple(_indices(each) for each in index)
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """In plain operators: torch's own makes masks for the device that it takes the tensors to be on."""
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=DEVICE).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(v.dtype) @ v


def _numbered(leaf: Any) -> Any:
    return DEVICE if isinstance(leaf, torch.device | str) and str(leaf) == "cuda" else leaf


@dataclass
class Gpu:
    """What happened on it.

    Attributes:
        calls: (operator, device type) -> how often.
        busiest: operator -> largest number of elements of an operand on the GPU.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


class _Mode(TorchDispatchMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, self.gpu)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any], gpu: Gpu | None) -> Any:
    """Compute on the CPU what was asked of either device."""
    name = func._schema.name
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    asked = kwargs.get("device")
    if name == "aten::scalar_tensor" and asked is not None and torch.device(asked).type == "meta":
        return PretendTensor(func(*args, **{**kwargs, "device": CPU}))  # a number that is to meet a tensor of ours
    if here and asked is not None and torch.device(asked).type == "meta":
        asked = DEVICE  # what torch takes for the device of the others
    target = torch.device(asked) if asked is not None else DEVICE if here else CPU
    places = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.device)]
    if func._can_decompose() and (here or DEVICE in places):
        with _Mode(gpu or Gpu()):
            return func.decompose(*args, **kwargs)  # as torch does outside of inference mode
    if gpu is not None:
        gpu.calls[name.partition("::")[2], target.type if not here else "cuda"] += 1
    if not here and target.type != "cuda":
        return func(*args, **kwargs)
    if here and any(tensor.device.type == "meta" for tensor in tensors):
        if any(tensor.dim() for tensor in here):
            raise RuntimeError(f"tensors on cuda:0 and meta (in {name})")
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.inner.to("meta") if isinstance(leaf, PretendTensor) else leaf, (args, kwargs)
        )
        return func(*args, **kwargs)  # numbers that were to meet a tensor without data
    others = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.device.type == "cpu"]
    if name == "aten::_has_compatible_shallow_copy_type":
        return len(here) == 2 and func(*(tensor.inner for tensor in here))
    if name in INDEXING:
        others = [tensor for tensor in others if tensor is args[0] or tensor is (args[2] if len(args) > 2 else None)]
    if here and name not in CROSSING and any(tensor.dim() for tensor in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(in {name})"
        )
    if asked is not None:
        kwargs = {**kwargs, "device": CPU if target.type == "cuda" else target}
    inner_args, inner_kwargs = pytree.tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, PretendTensor) else leaf, (args, kwargs)
    )
    if name == "aten::histc":  # of integers on GPUs only
        inner_args = inner_args[0].float(), *inner_args[1:]
    with _disable_current_modes():
        out = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_":  # the result is where its first argument is
        return args[0]
    if target.type == "cuda":
        # A view of a tensor that was made outside of inference mode is no tensor of that mode.
        of_mode = not (func.is_view and not here[0].is_inference())
        with torch.inference_mode(torch.is_inference_mode_enabled() and of_mode):
            out = pytree.tree_map(lambda leaf: PretendTensor(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if here else out
    return out


@contextmanager
def present(*, major: int = 7) -> Iterator[Gpu]:
    """While it lasts, there is one GPU.

    Args:
        major: of its compute capability; from 8 on Triton's kernels are asked to serve it.
    """
    gpu = Gpu()
    facts = SimpleNamespace(major=major, minor=0, name="Pretend", total_memory=1 << 34, multi_processor_count=132)
    fakes = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda *_: facts, "get_device_capability": lambda *_: (major, 0),
        "get_device_name": lambda *_: "Pretend", "synchronize": lambda *_: None, "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (1 << 33, 1 << 34), "is_bf16_supported": lambda *_, **__: True,
        "manual_seed_all": lambda *_: None, "_is_in_bad_fork": lambda: False,
    }  # fmt: skip
    submit = ThreadPoolExecutor.submit

    def submit_with_modes(self: ThreadPoolExecutor, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            with _Mode(gpu), _Places():  # modes belong to threads
                return work(*args, **kwargs)

        return submit(self, inside)

    backward = BackwardCFunction.apply

    def backward_with_modes(self: Any, *grads: Any) -> Any:
        with _Mode(gpu), _Places():  # torch's engine drops them
            return backward(self, *grads)

    def checkpoint_with_modes(function: Any, *args: Any, **kwargs: Any) -> Any:
        def inside(*inner: Any, **named: Any) -> Any:
            with _Mode(gpu), _Places():  # likewise, when it runs again
                return function(*inner, **named)

        return checkpoint(inside, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("moeq.repair.tune.checkpoint", checkpoint_with_modes))
        stack.enter_context(mock.patch.object(BackwardCFunction, "apply", backward_with_modes))
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", submit_with_modes))
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(_Mode(gpu))
        stack.enter_context(_Places())
        yield gpu

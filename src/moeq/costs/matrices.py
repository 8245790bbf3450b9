"""What costs that look at weights only share: every matrix of a layer once, and what rounding does to it.

Legend: N output rows, K input columns.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import torch
from torch import Tensor

from moeq.costs.base import LayerView
from moeq.errors import OptionError, TensorError
from moeq.format.records import dequantize
from moeq.quantizers.base import Quantizer
from moeq.quantizers.registry import QUANTIZERS, make_quantizer
from moeq.spec import WHOLE_ROW, QuantSpec

T = TypeVar("T")

_ROUNDED: Final = 1 << 22
"""Weights rounded at a time; rows do not influence each other."""
GAUSSIANS: Final = 1 << 18
"""Weights that a quantizer's error on noise is measured on: good to half a percent."""


def each_matrix(view: LayerView, work: Callable[[int, str, Tensor], T]) -> list[T]:
    """`work` on every matrix of a layer, (expert, projection, weights on the device), in storage order.

    On a CPU every core takes a matrix of its own with single-threaded operations: many small decompositions leave
    nothing to split.

    Raises:
        TensorError: weights that are not finite.
    """
    order = [(expert, name) for expert in range(view.layer.num_experts) for name in view.layer.projections]

    def job(which: tuple[int, str]) -> T:
        with torch.no_grad():
            expert, projection = which
            w_NK = view.read(expert, projection).to(view.device)
            _check_finite(view, expert, projection, w_NK)
            return work(expert, projection, w_NK)

    threads = torch.get_num_threads()
    if view.device.type != "cpu" or threads == 1:
        return [job(which) for which in order]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(job, order))
    finally:
        # A worker's setting is also what threads started later begin with: put ours back.
        torch.set_num_threads(threads)


def _check_finite(view: LayerView, expert: int, projection: str, w_NK: Tensor) -> None:
    low, high = w_NK.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise TensorError(
            f"the {projection} weights of expert {expert} hold NaN or infinity",
            tensor=view.layer.sources[projection].tensor(expert),
            fix="repair the checkpoint, such weights can be neither scored nor rounded",
        )


def dataless_quantizer(name: str) -> Quantizer:
    """The quantizer `name`, which must need no data.

    Raises:
        OptionError: no such quantizer, or it needs calibration.
    """
    quantizer = make_quantizer(name)
    if quantizer.needs_hessian:
        choices = ", ".join(other for other in QUANTIZERS if not make_quantizer(other).needs_hessian)
        raise OptionError(
            f"quantizer {name} needs calibration, this cost has none",
            option="quantizer",
            fix=f"choose one of {choices}",
        )
    return quantizer


def rounding_error(w_NK: Tensor, quantizer: Quantizer, spec: QuantSpec) -> float:
    """||W - W_hat||^2, W_hat being what `quantizer` stores under `spec`."""
    total = 0.0
    for part_NK in w_NK.split(max(1, _ROUNDED // w_NK.shape[1])):
        rounded = quantizer.quantize(part_NK, spec, None)
        hat_NK = dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)
        total += float(hat_NK.sub_(part_NK.float().cpu()).square_().sum(dtype=torch.float64))
    return total


def energy(w_NK: Tensor) -> float:
    """||W||^2."""
    return float(torch.linalg.vector_norm(w_NK, dtype=torch.float64).square())


def gaussian_error(quantizer: Quantizer, spec: QuantSpec, columns: int) -> float:
    """Mean squared error per weight of Gaussian weights of unit variance, in rows of `columns`; no data, one seed."""
    width = columns if spec.group_size == WHOLE_ROW else spec.group_size
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(max(1, GAUSSIANS // width), width, generator=generator)
    return rounding_error(w_NK, quantizer, spec) / w_NK.numel()

"""Records of matrices while their scales are trained (`--tune model`).

Each group of inputs has a gain, 1 at first, that its scale will be multiplied by, and where zeros are stored also a
shift, 0 at first, that will be added to its zero:

    w = (s gain) (code - (z + shift)),    dL/dgain = sum dL/dw (w0 - s shift),    dL/dshift = - s gain sum dL/dw

Products are those of the scales and zeros that will be stored, rounded; gradients pass by the rounding.

Legend: S tokens of one expert, N output rows, K input columns, G groups of g inputs.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from moeq.format.records import decode_matrix, real_zeros, unpack_scales
from moeq.layouts.grouped.packed import PackedMatrix
from moeq.layouts.grouped.stored import Entries, Shapes
from moeq.layouts.grouped.stored import record as record_of
from moeq.layouts.serving import Loose
from moeq.spec import QuantSpec, num_groups

WITH_ZEROS: Final = ("asym", "asym16")


class LooseRecords(Loose):
    """All records of a blob. Blocks of ggml have no gains: their scales are rounded together.

    Attributes:
        gain: of all groups of all records, in their order, float32.
        shift: of those that have zeros, in codes.
    """

    def __init__(self, data: Tensor, entries: Entries, shapes: Shapes) -> None:
        super().__init__()
        self._data, self._entries, self._shapes = data, entries, shapes
        self._starts: dict[int, tuple[int, int]] = {}
        gains = shifts = 0
        for expert in entries:
            for (offset, spec), shape in zip(expert, shapes, strict=True):
                self._starts[offset] = gains, shifts
                count = 0 if spec.in_blocks else shape[0] * num_groups(shape[1], spec.group_size)
                gains += count
                shifts += count * (spec.levels in WITH_ZEROS)
        self.gain = nn.Parameter(torch.ones(gains, dtype=torch.float32, device=data.device))
        self.shift = nn.Parameter(torch.zeros(shifts, dtype=torch.float32, device=data.device))

    def linear(self, x_SK: Tensor, matrix: PackedMatrix) -> Tensor:
        """x W^T, (S, N), for one of the records; differentiable with respect to x, gains and shifts."""
        offset = int(matrix.record.storage_offset()) - int(self._data.storage_offset())
        gain_NG, shift_NG = self._of(offset, matrix.spec, matrix.shape)
        return _LooseProduct.apply(x_SK, gain_NG, shift_NG, matrix)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def blob(self) -> Tensor:
        """The records with gains and shifts in their scales and zeros, uint8, on the CPU."""
        data = self._data.cpu().clone()
        for expert in self._entries:
            for (offset, spec), shape in zip(expert, self._shapes, strict=True):
                if spec.in_blocks:
                    continue
                record = record_of(data, offset, spec, shape)
                gain_NG, shift_NG = (None if part is None else part.cpu() for part in self._of(offset, spec, shape))
                assert gain_NG is not None
                scale_NG, zero_NG = unpack_scales(record, spec, shape)
                new_scale_NG, new_zero_NG = _stored(scale_NG, zero_NG, spec, gain_NG, shift_NG)
                scale_NG.copy_(new_scale_NG)
                if zero_NG is not None and new_zero_NG is not None:
                    zero_NG.copy_(new_zero_NG)
        return data

    def _of(self, offset: int, spec: QuantSpec, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        gains, shifts = self._starts[offset]
        size = shape[0], num_groups(shape[1], spec.group_size)
        count = 0 if spec.in_blocks else size[0] * size[1]
        gain_NG = self.gain[gains : gains + count].view(size if count else (0, 0))
        if spec.levels not in WITH_ZEROS:
            return gain_NG, None
        return gain_NG, self.shift[shifts : shifts + count].view(size)


def _stored(
    scale_NG: Tensor, zero_NG: Tensor | None, spec: QuantSpec, gain_NG: Tensor, shift_NG: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros as they will be stored; zeros of other level sets (codebooks) are none of ours."""
    new_scale_NG = (scale_NG.float() * gain_NG).half()
    if shift_NG is None:
        return new_scale_NG, None
    wanted_NG = real_zeros(zero_NG, spec) + shift_NG
    if spec.levels == "asym16":
        return new_scale_NG, wanted_NG.half()
    step = (2**spec.bits - 1) / 255
    return new_scale_NG, (wanted_NG / step).round().clamp(0, 255).to(torch.uint8)


def _ratios(matrix: PackedMatrix, gain_NG: Tensor, shift_NG: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(gain, shift, scale), each (N, G) float32: the first two as rounding leaves them."""
    scale_NG, zero_NG = unpack_scales(matrix.record, matrix.spec, matrix.shape)
    new_scale_NG, new_zero_NG = _stored(scale_NG, zero_NG, matrix.spec, gain_NG, shift_NG)
    old_NG = scale_NG.float()
    ratio_NG = torch.where(old_NG == 0, 1.0, new_scale_NG.float() / old_NG)
    moved_NG = torch.zeros_like(ratio_NG)
    if new_zero_NG is not None:
        moved_NG += real_zeros(new_zero_NG, matrix.spec) - real_zeros(zero_NG, matrix.spec)
    return ratio_NG, moved_NG, old_NG


def _grouped(w_NK: Tensor, spec: QuantSpec, groups: int) -> Tensor:
    """(N, K) -> (N, G, g); what the last group lacks is zero."""
    size = w_NK.shape[1] if groups == 1 else spec.group_size
    return nn.functional.pad(w_NK, (0, groups * size - w_NK.shape[1])).view(len(w_NK), groups, size)


class _LooseProduct(torch.autograd.Function):
    """x W^T with W decoded on the fly, forward and backward; W itself never enters the graph."""

    @staticmethod
    def forward(ctx: Any, x_SK: Tensor, gain_NG: Tensor, shift_NG: Tensor | None, matrix: PackedMatrix) -> Tensor:
        ctx.save_for_backward(x_SK, gain_NG, shift_NG)
        ctx.matrix = matrix
        if matrix.spec.in_blocks:
            return x_SK @ decode_matrix(matrix.record, matrix.spec, matrix.shape, x_SK.dtype).T
        unit_NGg, ratio_NG, _ = _LooseProduct.parts(matrix, gain_NG, shift_NG)
        return x_SK @ _LooseProduct.whole(unit_NGg, ratio_NG, matrix, x_SK.dtype).T

    @staticmethod
    def parts(matrix: PackedMatrix, gain_NG: Tensor, shift_NG: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The weights without their gains (N, G, g), the gains, and the scales."""
        ratio_NG, moved_NG, scale_NG = _ratios(matrix, gain_NG, shift_NG)
        w_NK = decode_matrix(matrix.record, matrix.spec, matrix.shape)
        unit_NGg = _grouped(w_NK, matrix.spec, ratio_NG.shape[1])
        if shift_NG is not None:
            unit_NGg = unit_NGg - (scale_NG * moved_NG).unsqueeze(-1)
        return unit_NGg, ratio_NG, scale_NG

    @staticmethod
    def whole(unit_NGg: Tensor, ratio_NG: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
        """The weights (N, K)."""
        return (unit_NGg * ratio_NG.unsqueeze(-1)).flatten(1)[:, : matrix.shape[1]].to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_SN,) = grads
        x_SK, gain_NG, shift_NG = ctx.saved_tensors
        matrix = ctx.matrix
        if matrix.spec.in_blocks:
            w_NK = decode_matrix(matrix.record, matrix.spec, matrix.shape, grad_SN.dtype)
            return grad_SN @ w_NK, None, None, None
        unit_NGg, ratio_NG, scale_NG = _LooseProduct.parts(matrix, gain_NG, shift_NG)
        grad_x_SK = grad_SN @ _LooseProduct.whole(unit_NGg, ratio_NG, matrix, grad_SN.dtype)
        grad_NGg = _grouped((grad_SN.T @ x_SK).float(), matrix.spec, ratio_NG.shape[1])
        grad_gain_NG = (grad_NGg * unit_NGg).sum(-1)
        if shift_NG is None:
            return grad_x_SK, grad_gain_NG, None, None
        return grad_x_SK, grad_gain_NG, -scale_NG * ratio_NG * grad_NGg.sum(-1), None

"""Blocks of ggml, as llama.cpp stores them in GGUF files: codes and scales to bytes and back, with torch alone.

Facts: ggml's block structs (`block_q2_K` and so on). A weight is a_g * level(code) - b_g, for a group g of 16 or 32
weights. Plain types store a_g as float16. K types store it as d * s_g, a float16 for 256 weights and a few bits for
each group; those with minima store b_g the same way.

Legend: N output rows, K input columns, B blocks of a row, M blocks in all, g groups of a block, w weights of a block.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from moeq.spec import BlockType, QuantSpec, block_type

NONLINEAR: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of IQ4_NL."""
WITH_MINIMA: Final = ("Q2_K", "Q4_K", "Q5_K")
STEPS: Final = {"Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127)}
"""K types -> the least and the greatest factor of a group; those of minima have the same range."""
CENTER: Final = {"Q3_K": 4, "Q5_0": 16, "Q6_K": 32, "Q8_0": 128}
"""Types without minima -> the code that stands for zero."""


class Blocks(NamedTuple):
    """The parts of a matrix.

    Attributes:
        codes_NK: uint8.
        unit_NB: float16 d of each block; (N, 2B) with those of minima behind, block by block, where there are any.
        factor_NG: uint8 factors of groups, s_g - least; (N, 2G) with those of minima likewise; None for plain types.
    """

    codes_NK: Tensor
    unit_NB: Tensor
    factor_NG: Tensor | None


def kind_of(spec: QuantSpec, columns: int) -> BlockType:
    """The type of a matrix with so many inputs."""
    return block_type(spec.bits, columns)


def levels(kind: BlockType) -> Tensor | None:
    """The levels of a type whose codes are no integers, float32; None for all others."""
    return torch.tensor(NONLINEAR, dtype=torch.float32) if kind.name == "IQ4_NL" else None


def groups(parts: Blocks, kind: BlockType) -> tuple[Tensor, Tensor | None]:
    """a_g and b_g of every group, (N, G) float32; no b_g where zero is a level."""
    rows = len(parts.codes_NK)
    unit = parts.unit_NB.float()
    if parts.factor_NG is None:
        return unit, None
    least = STEPS[kind.name][0]
    per = kind.weights // kind.group
    factor = parts.factor_NG.float() + least
    if kind.name not in WITH_MINIMA:
        return (unit.unsqueeze(-1) * factor.view(rows, -1, per)).flatten(1), None
    both_NB2g = unit.view(rows, -1, 2, 1) * factor.view(rows, -1, 2, per)
    return both_NB2g[:, :, 0].flatten(1), both_NB2g[:, :, 1].flatten(1)


def values(codes: Tensor, kind: BlockType) -> Tensor:
    """What codes stand for before scales, float32."""
    table = levels(kind)
    if table is not None:
        return table.to(codes.device)[codes.long()]
    return codes.float() - CENTER.get(kind.name, 0)


def dequantize(parts: Blocks, kind: BlockType, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights, (N, K) in `dtype`; the bits that ggml's own decoder gives."""
    a_NG, b_NG = groups(parts, kind)
    w_NGg = values(parts.codes_NK, kind).unflatten(1, (-1, kind.group)) * a_NG.unsqueeze(-1)
    if b_NG is not None:
        w_NGg -= b_NG.unsqueeze(-1)
    return w_NGg.flatten(1).to(dtype)


def pack(parts: Blocks, kind: BlockType) -> Tensor:
    """The rows of a GGUF tensor, uint8 (N, bytes)."""
    rows = len(parts.codes_NK)
    codes_Mw = parts.codes_NK.reshape(-1, kind.weights)
    unit_Mb = parts.unit_NB.contiguous().view(torch.uint8).view(len(codes_Mw), -1)
    factor_Mg = None if parts.factor_NG is None else parts.factor_NG.reshape(len(codes_Mw), -1)
    return _PACK[kind.name](codes_Mw, unit_Mb, factor_Mg).reshape(rows, -1)


def unpack(stored_NB: Tensor, kind: BlockType) -> Blocks:
    """Inverse of `pack`."""
    rows = len(stored_NB)
    codes_Mw, unit_Mb, factor_Mg = _UNPACK[kind.name](stored_NB.reshape(-1, kind.size))
    return Blocks(
        codes_NK=codes_Mw.reshape(rows, -1),
        unit_NB=unit_Mb.contiguous().view(torch.float16).view(rows, -1),
        factor_NG=None if factor_Mg is None else factor_Mg.reshape(rows, -1),
    )


def decode(record: Tensor, spec: QuantSpec, shape: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """The weights of some rows of a matrix record, float32."""
    kind = kind_of(spec, shape[1])
    width = shape[1] // kind.weights * kind.size
    stored = record[: shape[0] * width].view(shape[0], width)[rows[0] : rows[1]]
    return dequantize(unpack(stored, kind), kind)


def _pairs(codes: Tensor) -> Tensor:
    """Codes below 16 of the first and the second half in one byte each: (M, 2n) -> (M, n)."""
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def _halves(stored: Tensor) -> Tensor:
    return torch.cat([stored & 15, stored >> 4], dim=-1)


def _spread(stored: Tensor, count: int, width: int) -> Tensor:
    """(..., n) -> (..., count, n): fields of `width` bits, lowest first."""
    return torch.stack([stored >> (at * width) & ((1 << width) - 1) for at in range(count)], dim=-2)


def _join(fields: Tensor, width: int) -> Tensor:
    """Inverse of `_spread`."""
    out = fields[..., 0, :].clone()
    for at in range(1, fields.shape[-2]):
        out |= fields[..., at, :] << (at * width)
    return out


def _pack_q8_0(codes: Tensor, unit: Tensor, _: Tensor | None) -> Tensor:
    return torch.cat([unit, codes - 128], dim=1)  # as two's complement


def _unpack_q8_0(stored: Tensor) -> tuple[Tensor, Tensor, None]:
    return stored[:, 2:] + 128, stored[:, :2], None


def _pack_iq4_nl(codes: Tensor, unit: Tensor, _: Tensor | None) -> Tensor:
    return torch.cat([unit, _pairs(codes)], dim=1)


def _unpack_iq4_nl(stored: Tensor) -> tuple[Tensor, Tensor, None]:
    return _halves(stored[:, 2:]), stored[:, :2], None


def _pack_q5_0(codes: Tensor, unit: Tensor, _: Tensor | None) -> Tensor:
    high = _join((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)
    return torch.cat([unit, high, _pairs(codes & 15)], dim=1)


def _unpack_q5_0(stored: Tensor) -> tuple[Tensor, Tensor, None]:
    high = _spread(stored[:, 2:6], 8, 1).transpose(1, 2).flatten(1)
    return _halves(stored[:, 6:]) | high << 4, stored[:, :2], None


def _pack_q2_k(codes: Tensor, unit: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    return torch.cat([factor[:, :16] | factor[:, 16:] << 4, _twos(codes), unit], dim=1)


def _unpack_q2_k(stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factor = torch.cat([stored[:, :16] & 15, stored[:, :16] >> 4], dim=1)
    return _from_twos(stored[:, 16:80]), stored[:, 80:], factor


def _twos(codes: Tensor) -> Tensor:
    """Codes below 4: of each 128, byte l has those at l, l + 32, l + 64 and l + 96."""
    return _join(codes.view(-1, 2, 4, 32), 2).flatten(1)


def _from_twos(stored: Tensor) -> Tensor:
    return _spread(stored.reshape(-1, 2, 32), 4, 2).flatten(1)


def _pack_q3_k(codes: Tensor, unit: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    high = _join((codes >> 2).view(-1, 8, 32), 1)
    low = factor[:, :8] & 15 | (factor[:, 8:] & 15) << 4
    upper = _join((factor >> 4).view(-1, 4, 4), 2)
    return torch.cat([high, _twos(codes & 3), low, upper, unit], dim=1)


def _unpack_q3_k(stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high = _spread(stored[:, :32], 8, 1).flatten(1)
    low = torch.cat([stored[:, 96:104] & 15, stored[:, 96:104] >> 4], dim=1)
    upper = _spread(stored[:, 104:108], 4, 2).flatten(1)
    return _from_twos(stored[:, 32:96]) | high << 2, stored[:, 108:], low | upper << 4


def _pack_sixes(factor: Tensor) -> Tensor:
    """8 factors and 8 of minima below 64 in 12 bytes."""
    s, m = factor.chunk(2, dim=1)
    return torch.cat(
        [
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            s[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
        ],
        dim=1,
    )


def _unpack_sixes(stored: Tensor) -> Tensor:
    first, second, third = stored.split(4, dim=1)
    return torch.cat([first & 63, third & 15 | (first >> 6) << 4, second & 63, third >> 4 | (second >> 6) << 4], dim=1)


def _pack_q4_k(codes: Tensor, unit: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    return torch.cat([unit, _pack_sixes(factor), _pairs(codes.view(-1, 4, 64)).flatten(1)], dim=1)


def _unpack_q4_k(stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _halves(stored[:, 16:].reshape(-1, 4, 32)).flatten(1), stored[:, :4], _unpack_sixes(stored[:, 4:16])


def _pack_q5_k(codes: Tensor, unit: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    high = _join((codes >> 4).view(-1, 8, 32), 1)
    low = _pairs((codes & 15).view(-1, 4, 64)).flatten(1)
    return torch.cat([unit, _pack_sixes(factor), high, low], dim=1)


def _unpack_q5_k(stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high = _spread(stored[:, 16:48], 8, 1).flatten(1)
    low = _halves(stored[:, 48:].reshape(-1, 4, 32)).flatten(1)
    return low | high << 4, stored[:, :4], _unpack_sixes(stored[:, 4:16])


def _pack_q6_k(codes: Tensor, unit: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    low = _pairs((codes & 15).view(-1, 2, 128)).flatten(1)
    high = _join((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([low, high, factor - 128, unit], dim=1)


def _unpack_q6_k(stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = _halves(stored[:, :128].reshape(-1, 2, 64)).flatten(1)
    high = _spread(stored[:, 128:192].reshape(-1, 2, 32), 4, 2).flatten(1)
    return low | high << 4, stored[:, 208:], stored[:, 192:208] + 128


_PACK: Final = {
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "IQ4_NL": _pack_iq4_nl,
    "Q5_K": _pack_q5_k,
    "Q5_0": _pack_q5_0,
    "Q6_K": _pack_q6_k,
    "Q8_0": _pack_q8_0,
}
_UNPACK: Final = {
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "IQ4_NL": _unpack_iq4_nl,
    "Q5_K": _unpack_q5_k,
    "Q5_0": _unpack_q5_0,
    "Q6_K": _unpack_q6_k,
    "Q8_0": _unpack_q8_0,
}

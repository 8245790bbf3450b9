"""How packed matrices lie in a file: one blob and one table for each layer of experts or dense linear.

`<path>.moeq_data` (U8, 1-D) holds the matrix records back to back: expert 0 gate, up, down, expert 1 gate, ...
`<path>.moeq_table` (I64, [E, P, 4]) says of each record its offset, bits, group size and level set. A dense
linear has E = P = 1. Offsets are redundant on purpose: a table that disagrees with itself is caught.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from moeq.errors import OptionError, PackedError
from moeq.spec import LEVELS, TABLE_COLUMNS, QuantSpec, stored_bytes

Shapes = Sequence[tuple[int, int]]
"""(N, K) of each projection, in storage order."""
Entries = tuple[tuple[tuple[int, QuantSpec], ...], ...]
"""expert -> projection -> (offset of the record in the blob, how it is stored)."""

_FIX: Final = "quantize the model again, or download the checkpoint again"


def build_table(specs: Sequence[Sequence[QuantSpec]], shapes: Shapes) -> Tensor:
    """The table of one layer, int64, [E, P, 4].

    Args:
        specs: expert -> projection -> how it is stored.
        shapes: (N, K) of each projection.

    Raises:
        PackedError: the experts do not all have as many specs as there are shapes.
    """
    entries = []
    offset = 0
    for expert in specs:
        row = []
        for index, spec in enumerate(expert):
            row.append((offset, spec))
            offset += stored_bytes(spec, shapes[index]) if index < len(shapes) else 0
        entries.append(tuple(row))
    validate_table(tuple(entries), shapes, offset)
    return table_of(tuple(entries))


def table_of(entries: Entries) -> Tensor:
    """The table, int64, [E, P, 4], that says what `entries` says."""
    rows = [[[at, spec.bits, spec.group_size, LEVELS.index(spec.levels)] for at, spec in expert] for expert in entries]
    return torch.tensor(rows, dtype=torch.int64)


def parse_table(table: Tensor, shapes: Shapes, num_bytes: int, *, tensor: str | None = None) -> Entries:
    """Read and prove the table of one layer.

    Args:
        table: int64, [E, P, 4].
        shapes: (N, K) of each projection.
        num_bytes: bytes of the blob.
        tensor: name of the table, for messages.

    Returns:
        expert -> projection -> (offset, spec).

    Raises:
        PackedError: wrong dtype or shape, an illegal spec, or offsets that are not what the specs imply.
    """
    if table.dtype != torch.int64 or table.dim() != 3 or table.shape[1:] != (len(shapes), len(TABLE_COLUMNS)):
        raise PackedError(
            f"the table is {table.dtype} {list(table.shape)}, not int64 [experts, {len(shapes)}, {len(TABLE_COLUMNS)}]",
            tensor=tensor,
            fix=_FIX,
        )
    entries = tuple(
        tuple((row[0], _parse_spec(row, expert, tensor)) for row in rows) for expert, rows in enumerate(table.tolist())
    )
    validate_table(entries, shapes, num_bytes, tensor=tensor)
    return entries


def validate_table(entries: Entries, shapes: Shapes, num_bytes: int, *, tensor: str | None = None) -> None:
    """The one check that writer and reader share: records lie back to back, in order, and fill the blob.

    Raises:
        PackedError: they do not.
    """
    if not entries:
        raise PackedError("the table has no experts", tensor=tensor, fix=_FIX)
    end = 0
    for expert, row in enumerate(entries):
        if len(row) != len(shapes):
            raise PackedError(f"expert {expert} has {len(row)} matrices, not {len(shapes)}", tensor=tensor, fix=_FIX)
        for matrix, ((offset, spec), shape) in enumerate(zip(row, shapes, strict=True)):
            if offset != end:
                raise PackedError(
                    f"matrix {matrix} of expert {expert} is said to start at byte {offset}, it must start at {end}",
                    tensor=tensor,
                    fix=_FIX,
                )
            try:
                end += stored_bytes(spec, shape)
            except OptionError as error:  # inputs that cannot be cut into vectors
                raise PackedError(f"matrix {matrix} of expert {expert}: {error}", tensor=tensor, fix=_FIX) from error
    if end != num_bytes:
        raise PackedError(f"the records take {end} bytes, the data has {num_bytes}", tensor=tensor, fix=_FIX)


def record(data: Tensor, offset: int, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """One matrix record as a view of its blob, uint8.

    Raises:
        PackedError: the record does not lie inside the blob.
    """
    size = stored_bytes(spec, shape)
    if offset < 0 or offset + size > data.numel():
        raise PackedError(f"bytes {offset} to {offset + size} lie outside the {data.numel()} of the blob", fix=_FIX)
    return data.narrow(0, offset, size)


def _parse_spec(row: Sequence[int], expert: int, tensor: str | None) -> QuantSpec:
    _, bits, group_size, level = row
    try:
        if not 0 <= level < len(LEVELS):
            raise OptionError(f"level set {level} is not known")
        return QuantSpec(bits=bits, group_size=group_size, levels=LEVELS[level])
    except OptionError as error:
        raise PackedError(f"expert {expert} has an illegal spec: {error}", tensor=tensor, fix=_FIX) from error

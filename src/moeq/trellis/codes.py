"""What codes of the level set "trellis" stand for (docs/format.md, "Trellis").

A weight is scale * entry / 32, the entry at 2^b * history + code of a fixed table of 64; the history is the lowest bits
of the codes above it in its column, newest last, and starts at zero every `RESTART` rows.

Legend: N output rows, K input columns, G groups per row.
"""

import torch
from torch import Tensor

from moeq.spec import RESTART, TRELLISES
from moeq.trellis.tables import TABLES, UNIT


def histories(codes_NK: Tensor, bits: int) -> Tensor:
    """The history of every code, uint8, (N, K); the first row is one where histories start."""
    low_NK = codes_NK & 1
    found_NK = torch.zeros_like(codes_NK)
    for back in range(1, TRELLISES[bits] + 1):
        earlier_NK = torch.zeros_like(low_NK)
        earlier_NK[back:] = low_NK[:-back] if back < len(low_NK) else low_NK[:0]
        # Rows that are no further than that from a restart have nothing there.
        inside_N = torch.arange(len(low_NK), device=codes_NK.device) % RESTART >= back
        found_NK |= (earlier_NK << (back - 1)) * inside_N.unsqueeze(1)
    return found_NK


def entries(codes_NK: Tensor, bits: int) -> Tensor:
    """What codes stand for in units of their scales, float32, (N, K); the first row is one where histories start."""
    table = torch.tensor(TABLES[bits], dtype=torch.float32, device=codes_NK.device) / UNIT
    return table[((histories(codes_NK, bits) << bits) | codes_NK).long()]

"""What codes of the level set "trellis" stand for (docs/format.md, "Trellis").

A weight is scale * entry. The upper bits of a code and some parities of the lowest bits of it and of the codes above it
in its column are the number of the entry; what is above the first row counts as zero.

Legend: N output rows, K input columns, G groups per row.
"""

import torch
from torch import Tensor

from moeq.spec import TRELLISES
from moeq.trellis.tables import TABLES, TAPS


def windows(codes_NK: Tensor, bits: int) -> Tensor:
    """The lowest bits of every code and of those above it, bit k for k rows above, uint8, (N, K)."""
    low_NK = codes_NK & 1
    found_NK = low_NK.clone()
    for back in range(1, TRELLISES[bits] + 1):
        found_NK[back:] |= low_NK[: max(0, len(low_NK) - back)] << back
    return found_NK


def parities(bits: int) -> Tensor:
    """The parities of every window, as one number, int64, (2^(history + 1),)."""
    window = torch.arange(2 << TRELLISES[bits])
    found = torch.zeros_like(window)
    for at, taps in enumerate(TAPS[bits]):
        for back in range(TRELLISES[bits] + 1):
            if taps >> back & 1:
                found ^= ((window >> back) & 1) << at
    return found


def entries(codes_NK: Tensor, bits: int) -> Tensor:
    """What codes stand for in units of their scales, float32, (N, K); the first row is that of the matrix."""
    device = codes_NK.device
    table = torch.tensor(TABLES[bits], dtype=torch.float32, device=device)
    parity_NK = parities(bits).to(device)[windows(codes_NK, bits).long()]
    return table[((codes_NK.long() >> 1) << len(TAPS[bits])) | parity_NK]

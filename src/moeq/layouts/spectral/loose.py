"""Components while their gains are trained (`--tune model`): one for each row of a slab, 1 at first.

The row's scales will be multiplied by it. Products are those of the scales that will be stored, rounded; gradients pass
by the rounding.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moeq.format.records import unpack_scales
from moeq.layouts.serving import Loose
from moeq.layouts.spectral.reference import SpectralLayer
from moeq.layouts.spectral.shape import slab_bytes
from moeq.layouts.spectral.stored import Slab, decode_factor
from moeq.spec import WHOLE_ROW


class LooseComponents(Loose):
    """The components of a layer.

    Attributes:
        gain: of all components, slab by slab in the order of the projections, float32.
    """

    def __init__(self, layer: SpectralLayer) -> None:
        super().__init__()
        self._layer = layer
        self._starts: dict[int, int] = {}
        count = 0
        for slab in self._slabs():
            self._starts[slab.offset] = count
            count += slab.rows
        self.gain = nn.Parameter(torch.ones(count, dtype=torch.float32, device=layer.data.device))

    def components(self, expert: int, projection: str) -> tuple[Callable[[torch.dtype], Tensor], Tensor]:
        """One expert's components with what rounding makes of their gains, and ones that carry the gradients."""
        parts = [self._of(slab)[start:stop] for slab, start, stop in self._rows(expert, projection)]
        gain_n = torch.cat(parts) if parts else self.gain[:0]
        return partial(self._factor, expert, projection), gain_n / gain_n.detach()

    @torch.no_grad()
    def blob(self) -> Tensor:
        """The blob with all gains in its scales, uint8, on the CPU."""
        data = self._layer.data.cpu().clone()
        for slab in self._slabs():
            scale_NG = self._scales(data, slab)
            scale_NG.copy_((scale_NG.float() * self._of(slab).cpu().unsqueeze(1)).half())
        return data

    def _factor(self, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        """As `SpectralLayer.factor`."""
        data, inner = self._layer.data, self._layer.shape.inner
        entry = self._layer.entries[projection]
        rows = [(int(each[expert]), int(each[expert + 1])) for each in self._layer.starts[projection]]
        factor_nI = decode_factor(data, entry, rows, inner, torch.float32)
        ratios = [
            self._ratio(slab, start, stop).repeat_interleave(
                inner if slab.spec.group_size == WHOLE_ROW else slab.spec.group_size, 1
            )[:, :inner]
            for slab, start, stop in self._rows(expert, projection)
        ]
        return (factor_nI * torch.cat(ratios) if ratios else factor_nI).to(dtype)

    @torch.no_grad()
    def _ratio(self, slab: Slab, start: int, stop: int) -> Tensor:
        """What rows' scales grow by once they are rounded, (n, G)."""
        old_nG = self._scales(self._layer.data, slab)[start:stop].float()
        new_nG = (old_nG * self._of(slab)[start:stop].unsqueeze(1)).half().float()
        return torch.where(old_nG == 0, 1.0, new_nG / old_nG)

    def _scales(self, data: Tensor, slab: Slab) -> Tensor:
        """The scales of a slab, (N, G), as a view."""
        inner = self._layer.shape.inner
        record = data[slab.offset : slab.offset + slab_bytes(slab.spec, slab.rows, inner)]
        return unpack_scales(record, slab.spec, (slab.rows, inner))[0]

    def _of(self, slab: Slab) -> Tensor:
        return self.gain[self._starts[slab.offset] :][: slab.rows]

    def _slabs(self) -> list[Slab]:
        return [slab for entry in self._layer.entries.values() for slab in entry.slabs]

    def _rows(self, expert: int, projection: str) -> list[tuple[Slab, int, int]]:
        """The slabs that hold components of an expert, with the rows there."""
        found = zip(self._layer.entries[projection].slabs, self._layer.starts[projection], strict=True)
        rows = [(slab, int(each[expert]), int(each[expert + 1])) for slab, each in found]
        return [(slab, start, stop) for slab, start, stop in rows if stop > start]

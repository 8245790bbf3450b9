"""What kernels on a device want to know of a spectral layer.

Legend: E experts, H hidden, I expert width, R directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moeq.kernels.facts import KernelFacts, Kinds, RowFacts, kernel_facts, one_group, row_facts
from moeq.layouts.spectral.shape import SpectralShape, Widths, basis_spec
from moeq.layouts.spectral.stored import SpectralEntry


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpectralFacts:
    """What kernels on a device want to know of a spectral layer.

    Attributes:
        factors: projection -> the components of all experts.
        bases: projection -> its basis as a matrix (R, H), for products with inputs; absent for float16.
        back: the basis of down as rows, for products with components; None for float16.
    """

    factors: dict[str, RowFacts]
    bases: dict[str, KernelFacts]
    back: RowFacts | None


def spectral_facts(
    entries: Mapping[str, SpectralEntry],
    widths: Mapping[str, Widths],
    starts: Mapping[str, np.ndarray],
    shape: SpectralShape,
    device: torch.device,
    kinds: Mapping[str, Kinds] | None = None,
) -> SpectralFacts:
    """The facts of a spectral layer; arguments as the attributes of `moeq.layouts.spectral.reference.SpectralLayer`."""
    factors, bases, back = {}, {}, None
    for name, entry in entries.items():
        slabs = [(slab.offset, slab.spec, slab.rows) for slab in entry.slabs]
        # Rows of a slab lie expert after expert, by rising direction: as numpy finds them.
        places = [np.nonzero(widths[name] == slab.spec.bits)[1] for slab in entry.slabs]
        factors[name] = row_facts(
            slabs, shape.inner, list(starts[name]), places, device, None if kinds is None else kinds[name]
        )
        spec = basis_spec(entry.basis_bits)
        if spec is not None and entry.rank:
            bases[name] = kernel_facts([[(entry.basis, spec)]], [(entry.rank, shape.hidden)], device)
            if name == "down":
                back = one_group(entry.basis, spec, entry.rank, shape.hidden, device)
    return SpectralFacts(factors=factors, bases=bases, back=back)

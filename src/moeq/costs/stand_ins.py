"""Costs of level sets whose search is dear: measured with plain levels of the same width, and made as much smaller.

Costs are quadratic in what rounding changes, and what a trellis changes looks like what plain levels change, but for
its size. The ratio of the two on Gaussian numbers is known, so that four searches of every matrix are saved.
"""

from dataclasses import replace
from functools import cache
from typing import Final

import torch

from moeq.costs.perturb import make_rounder
from moeq.spec import QuantSpec
from moeq.trellis.tables import ERRORS

ROWS: Final = 256
COLUMNS: Final = 512


def stand_in(spec: QuantSpec) -> QuantSpec:
    """What is measured in the place of a spec: plain levels for a trellis, else the spec itself."""
    return replace(spec, levels="half") if spec.history else spec


@cache
def noise_ratio(spec: QuantSpec, perturb: str) -> float:
    """Squared error of a spec over that of its stand-in, on Gaussian numbers; 1 where it is measured itself.

    Args:
        spec: of a candidate.
        perturb: what rounds when costs are measured, as `moeq.costs.perturb.make_rounder` knows it.
    """
    if not spec.history:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    rounder = make_rounder(perturb)
    hat_NK = rounder.round(w_NK, stand_in(spec), torch.eye(COLUMNS) if rounder.needs_hessian else None)()
    return ERRORS[spec.bits] / float((w_NK - hat_NK).square().mean())

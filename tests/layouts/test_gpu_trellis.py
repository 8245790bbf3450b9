"""The Triton kernels compute trellises as the torch reference does."""

import pytest
import torch
from packing_help import relative_error
from test_gpu_codebooks import check_experts, matrix_of
from test_grouped_gpu import TOLERANCE

from moeq.kernels import facts
from moeq.layouts.grouped import gpu, reference
from moeq.spec import GROUP_SIZES, LEVELS, TRELLISES, QuantSpec
from moeq.trellis.tables import TAPS
from often import by_day

pytestmark = pytest.mark.gpu

WIDE = {bits: QuantSpec(bits=bits, group_size=128, levels="trellis") for bits in TRELLISES}
OTHERS = QuantSpec(bits=3, group_size=32), QuantSpec(bits=2, group_size=-1, levels="vector")


@pytest.mark.parametrize("shape", [(1, 8), (40, 136), (150, 264), (65, 512)])
@pytest.mark.parametrize("bits", TRELLISES)
def test_linear(bits: int, shape: tuple[int, int], triton_device: torch.device) -> None:
    """Whole and ragged blocks of rows and columns, and every group size in turn."""
    torch.manual_seed(shape[0])
    group_size = GROUP_SIZES[(bits + shape[1]) % len(GROUP_SIZES)]
    matrix = matrix_of(QuantSpec(bits=bits, group_size=group_size, levels="trellis"), shape, triton_device)
    x_RK = torch.randn(3, shape[1], device=triton_device)
    assert relative_error(gpu.run_linear(x_RK, matrix), reference.linear(x_RK, matrix)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", by_day(TOLERANCE, {torch.bfloat16}))
@pytest.mark.parametrize("kinds", [tuple(WIDE.values()), (WIDE[2], OTHERS[0], OTHERS[1], WIDE[1], WIDE[3])])
@pytest.mark.parametrize("many", [False, True])
def test_experts(
    kinds: tuple[QuantSpec, ...],
    dtype: torch.dtype,
    many: bool,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All widths, and trellises beside scalar levels and codebooks; multiplied as they are, and decoded first."""
    check_experts(kinds, dtype, many, triton_device, monkeypatch)


def test_constants_of_the_kernels_are_those_of_the_format() -> None:
    pytest.importorskip("triton")
    from moeq.kernels import triton_records, triton_tiles, triton_trellis

    assert triton_trellis.ENTRIES.value == len(facts.KERNEL_COLUMNS)
    assert triton_records.FACTS.value == facts.FACT_COLUMNS
    for bits, taps in TAPS.items():
        assert tuple(triton_trellis.taps_of(bits, at) for at in range(len(taps))) == taps
        assert triton_trellis.parities_of(bits) == len(taps)
    assert LEVELS.index("trellis") > triton_tiles.VECTOR.value == LEVELS.index("vector")

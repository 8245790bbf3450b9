"""Calls that Triton does not take."""

import sys
from dataclasses import replace

import torch
from packing_help import mixtral, packed_layer, packed_matrix

from moeq.kernels import dispatch, gpu, reference
from moeq.spec import QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(bits=4, group_size=32)


def test_cpu_tensors_are_refused_before_a_kernel_is_loaded() -> None:
    matrix, layer = packed_matrix((5, 40), SPEC, CPU), packed_layer(2, 40, 24, lambda *_: SPEC, CPU)
    x_TH = torch.randn(1, 40)
    loaded = "moeq.kernels.triton_launch" in sys.modules
    assert gpu.linear(x_TH, matrix) is None
    assert gpu.experts(mixtral(40, 24, 2), layer, x_TH, torch.tensor([[0, 1]]), torch.rand(1, 2)) is None
    exact = replace(matrix, exact=True)  # kernels for the CPU round activations elsewhere
    torch.testing.assert_close(dispatch.linear(x_TH, exact), reference.linear(x_TH, exact), rtol=1e-5, atol=1e-5)
    assert ("moeq.kernels.triton_launch" in sys.modules) == loaded


def test_facts_name_the_sections_of_a_record() -> None:
    layer = packed_layer(2, 40, 24, lambda expert, _: QuantSpec(bits=3 + expert, group_size=32), CPU)
    facts = layer.facts
    assert facts is not None
    assert facts.widths == (1 << 3 | 1 << 4,) * 3
    assert facts.spans == (32, 32, 32)
    # Expert 1's up: 24 rows of 24 bytes at 4 bits, one plane; then 24 x 2 scales and zeros, in steps of 64.
    start = layer.entries[1][1][0]
    assert facts.table[1, 1].tolist() == [start, start, start + 512, start + 640, 4, 32, 0, 2]
    # Expert 0's gate has a second plane behind 24 rows of 10 bytes.
    assert facts.table[0, 0].tolist() == [0, 256, 384, 512, 3, 32, 0, 2]

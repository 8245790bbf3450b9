"""Calls that Triton does not take."""

import sys
from dataclasses import replace

import numpy as np
import torch
from packing_help import mixtral, packed_layer, packed_matrix, spectral_layer

from moeq.layouts.grouped import gpu, reference
from moeq.layouts.grouped.serving import LINEAR
from moeq.layouts.serving import first
from moeq.layouts.spectral.serving import SpectralExperts
from moeq.layouts.spectral.shape import Form
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
    torch.testing.assert_close(first(LINEAR, x_TH, exact), reference.linear(x_TH, exact), rtol=1e-5, atol=1e-5)
    assert ("moeq.kernels.triton_launch" in sys.modules) == loaded


def test_facts_name_the_sections_of_a_record() -> None:
    layer = packed_layer(2, 40, 24, lambda expert, _: QuantSpec(bits=3 + expert, group_size=32), CPU)
    facts = layer.facts
    assert facts is not None
    assert facts.widths == (1 << 3 | 1 << 4,) * 3
    assert facts.spans == (32, 32, 32)
    # Expert 1's up: 24 rows of 24 bytes at 4 bits, one plane; then 24 x 2 scales and zeros, in steps of 64.
    start = layer.entries[1][1][0]
    assert facts.table[1, 1].tolist() == [start, start, start + 512, start + 640, 4, 32, 0, 2, 0, 0, 0, 0]
    # Expert 0's gate has a second plane behind 24 rows of 10 bytes.
    assert facts.table[0, 0].tolist() == [0, 256, 384, 512, 3, 32, 0, 2, 0, 0, 0, 0]


def test_facts_of_components_name_rows_and_their_directions() -> None:
    slabs = {bits: QuantSpec(bits=bits, group_size=32, levels="half", layout="spectral") for bits in (2, 4)}
    kept = np.array([[0, 4, 2, 2], [2, 0, 4, 4]], dtype=np.uint8)  # two experts, four directions
    widths = dict.fromkeys(("gate", "up", "down"), kept)
    layer = spectral_layer(widths, Form(basis_bits=8, joint=True, slabs=slabs), 4, 40, CPU)
    assert layer.facts is not None
    rows = layer.facts.factors["up"]
    assert rows.firsts[3].tolist() == [0, 1, 3]  # 4 bits
    assert rows.firsts[5].tolist() == [0, 2, 3]  # 2 bits
    assert rows.places.tolist()[:6] == [1, 2, 3, 2, 3, 0]
    assert (rows.rows, rows.blocks, rows.groups, rows.widths) == (3, 2, 2, 1 << 4 | 1 << 2)
    handler = SpectralExperts(layer.shape)
    handler.bind(layer.data, layer.at(layer.data))
    assert handler.layer.facts is None  # on a CPU nobody asks for them
    moved = handler.to("meta").layer
    assert moved.facts is not None
    assert handler.layer is moved

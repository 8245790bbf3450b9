"""Decomposition, costs without tokens, and allocation of one Qwen3-30B-A3B-shaped layer: seconds and peak memory.

    python benchmarks/bitsmoe_layer.py

128 experts of 2048 x 768 with a decaying spectrum, random. Times are given in ratio to the Gram products alone,
measured in the same process on the same weights.
"""

import resource
import sys
import time

import numpy as np
import torch

from moeq.layouts.spectral.shape import component_bytes
from moeq.quantizers.gain import rounded_weights
from moeq.quantizers.registry import make_quantizer
from moeq.solvers.threshold import Units, threshold
from moeq.spec import QuantSpec
from moeq.transforms import shared_basis

EXPERTS, HIDDEN, INNER = 128, 2048, 768
WIDTHS = (1, 2, 3, 4, 6, 8)
CPU = torch.device("cpu")


def weights(decay_H: torch.Tensor, rotation_HH: torch.Tensor, expert: int, projection: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3 * expert + projection)
    # float16 in memory, as a checkpoint is read: making them must not dominate.
    return (torch.randn(INNER, HIDDEN, generator=generator) * decay_H) @ rotation_HH


def main() -> int:
    decay_H = torch.logspace(0, -1.5, HIDDEN) * 0.05
    rotation_HH = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))).Q
    classes, seconds = [], {"gram": 0.0, "basis": 0.0, "components": 0.0, "errors": 0.0, "allocation": 0.0}
    specs = [QuantSpec(bits=bits, levels="half" if bits < 3 else "sym", layout="spectral") for bits in WIDTHS]
    quantizer = make_quantizer("rtn", gain=True)
    for projection in range(3):
        matrices = [weights(decay_H, rotation_HH, expert, projection).bfloat16() for expert in range(EXPERTS)]
        start = time.perf_counter()
        gram_HH = shared_basis.gram(matrices, "gate", HIDDEN, CPU)
        seconds["gram"] += time.perf_counter() - start
        start = time.perf_counter()
        basis_HH = shared_basis.eigenbasis(gram_HH).float()
        inverse_HH = shared_basis.inverse_of(basis_HH)
        seconds["basis"] += time.perf_counter() - start
        energies, samples = [], []
        start = time.perf_counter()
        for w_NK in matrices:
            p_HI = shared_basis.components(w_NK, inverse_HH, "gate")
            energies.append(p_HI.double().square().sum(1).float())
            samples.append(p_HI[torch.randperm(HIDDEN)[:16]].clone())
        seconds["components"] += time.perf_counter() - start
        start = time.perf_counter()
        sample_NI = torch.cat(samples)
        curve = [1.0]
        for spec in specs:
            rounded = quantizer.quantize(sample_NI, spec, None)
            lost = (rounded_weights(rounded, spec) - sample_NI).square().sum(1)
            curve.append(float((lost / sample_NI.square().sum(1)).mean()))
        seconds["errors"] += time.perf_counter() - start
        classes.append(
            Units(
                weights_U=torch.stack(energies).flatten().numpy(),
                curve_C=np.array(curve),
                bytes_C=np.array([0, *(component_bytes(spec, INNER) for spec in specs)]),
                groups_U=np.tile(np.arange(HIDDEN), EXPERTS),
                tolls_G=np.full(HIDDEN, HIDDEN + 80),
            )
        )
        del matrices
    start = time.perf_counter()
    found = threshold(classes, int(2.0 * 3 * EXPERTS * HIDDEN * INNER / 8))
    seconds["allocation"] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    whole = sum(seconds.values())
    print(f"units {3 * EXPERTS * HIDDEN}, threads {torch.get_num_threads()}, peak RSS {peak:.2f} GiB")
    for name, value in seconds.items():
        print(f"{name:<11} {value:7.2f} s  {value / seconds['gram']:.3f} of the Gram products")
    print(f"all {whole / seconds['gram']:.2f} times the Gram products; gap {found.objective / found.bound - 1:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

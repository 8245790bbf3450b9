"""Tiled factorization and placement (TileQ notes, section 11, T2, T3, T5, T6, T7)."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeq.transforms import placement, tiles

EXPERTS, INPUTS, OUTPUTS = 16, 48, 40


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stacked(a_EIO: Tensor, grid: tiles.Grid) -> Tensor:
    big = a_EIO.new_zeros(grid.rows, a_EIO.shape[1], grid.columns, a_EIO.shape[2])
    for k in range(len(a_EIO)):
        big[grid.row_E[k], :, grid.column_E[k]] = a_EIO[k]
    return big.flatten(0, 1).flatten(1)


def energy(factors: tiles.Factors, a_EIO: Tensor, grid: tiles.Grid) -> float:
    return tiles.captured(a_EIO.transpose(1, 2), factors, torch.ones(len(a_EIO), a_EIO.shape[1]), grid)


def planted(seed: int = 20, noise: float = 0.3) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Experts whose input and output subspaces are those of a row and a column, in a shuffled order."""
    left = torch.linalg.qr(normal(4, INPUTS, 4, seed=seed)).Q
    right = torch.linalg.qr(normal(4, OUTPUTS, 4, seed=seed + 1)).Q
    cells = np.random.default_rng(seed).permutation(16)
    rows, columns = cells // 4, cells % 4
    cores = normal(EXPERTS, 4, 4, seed=seed + 2)
    a_EIO = torch.stack([left[m] @ core @ right[n].T for m, n, core in zip(rows, columns, cores, strict=True)])
    return a_EIO + noise * normal(EXPERTS, INPUTS, OUTPUTS, seed=seed + 3) / INPUTS**0.5, rows, columns


def rand_index(left: tuple[int, ...], right: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie)."""
    a, b = np.array(left), np.array(right)
    table = np.array([[np.sum((a == i) & (b == j)) for j in range(b.max() + 1)] for i in range(a.max() + 1)])

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, of_a, of_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = of_a * of_b / (len(a) * (len(a) - 1) / 2)
    return (both - chance) / ((of_a + of_b) / 2 - chance)


@pytest.mark.parametrize("seed", [0, 10])
def test_subspaces_recover_planted_tiles_and_flattened_vectors_do_not(seed: int) -> None:
    a_EIO, rows, columns = planted(seed)
    found = placement.sketch(a_EIO, 4)
    grid = placement.matched(found, (4, 4), rank=16)
    assert rand_index(grid.row_E, rows) > 0.95
    assert rand_index(grid.column_E, columns) > 0.95
    flat = placement.literal(found, (4, 4))
    assert rand_index(flat.row_E, rows) < 0.5
    truth = placement.grid_of(rows * 4 + columns, (4, 4))
    captured = [
        energy(tiles.svd_factors(tiles.Blocks(a_EIO, each), 12), a_EIO, each)
        for each in (placement.at_random(EXPERTS, (4, 4), seed + 7), grid, truth)
    ]
    assert captured[0] < captured[1] - 0.1
    assert captured[1] <= captured[2] + 1e-5


def test_swaps_only_raise_the_captured_energy() -> None:
    a_EIO, _, _ = planted()
    start = placement.at_random(EXPERTS, (4, 4))
    better = placement.swapped(a_EIO, start, 12, tries=60)
    before, after = (energy(tiles.svd_factors(tiles.Blocks(a_EIO, g), 12), a_EIO, g) for g in (start, better))
    assert after > before + 0.02


@pytest.mark.parametrize("shape", [(4, 4), (4, 5), (3, 6), (1, 16), (16, 1)])
@pytest.mark.parametrize("how", ["matched", "literal", "random", "order"])
def test_every_expert_has_a_cell_of_its_own(shape: tuple[int, int], how: str) -> None:
    a_EIO, _, _ = planted()
    found = placement.sketch(a_EIO, 4)
    grid = {
        "matched": lambda: placement.matched(found, shape, 8),
        "literal": lambda: placement.literal(found, shape),
        "random": lambda: placement.at_random(EXPERTS, shape),
        "order": lambda: placement.in_order(EXPERTS, shape),
    }[how]()
    cells = set(zip(grid.row_E, grid.column_E, strict=True))
    assert len(cells) == EXPERTS
    assert all(0 <= m < shape[0] and 0 <= n < shape[1] for m, n in cells)
    empty = [
        cell for cell in itertools.product(range(shape[0]), range(shape[1])) if not _block(a_EIO, grid, cell).any()
    ]
    assert len(empty) == shape[0] * shape[1] - EXPERTS


def _block(a_EIO: Tensor, grid: tiles.Grid, cell: tuple[int, int]) -> Tensor:
    m, n = cell
    return stacked(a_EIO, grid)[m * INPUTS : (m + 1) * INPUTS, n * OUTPUTS : (n + 1) * OUTPUTS]


def test_subspace_iteration_and_deflation_reach_the_energy_of_an_exact_svd() -> None:
    a_EIO, _, _ = planted()
    grid = placement.at_random(EXPERTS, (4, 4))
    sigma = np.linalg.svd(stacked(a_EIO, grid).numpy(), compute_uv=False)
    exact = float((sigma[:12] ** 2).sum() / (sigma**2).sum())
    assert energy(tiles.svd_factors(tiles.Blocks(a_EIO, grid), 12), a_EIO, grid) == pytest.approx(exact, rel=0.01)
    deflated = tiles.deflated_factors(tiles.Blocks(a_EIO, grid), 12, lambda x: x)
    assert energy(deflated, a_EIO, grid) == pytest.approx(exact, rel=0.01)


def test_deflation_absorbs_the_rounding_of_its_vectors() -> None:
    def fp8(x: Tensor) -> Tensor:
        scale = x.abs().max() / 4
        return (x / scale).to(torch.float8_e5m2).float() * scale

    a_EIO, _, _ = planted()
    grid = placement.at_random(EXPERTS, (4, 4))
    blocks = tiles.Blocks(a_EIO, grid)
    exact = tiles.svd_factors(blocks, 12)
    rounded = tiles.Factors(
        inputs_MRI=torch.stack([fp8(each) for each in exact.inputs_MRI.transpose(0, 1)], dim=1),
        outputs_NRO=torch.stack([fp8(each) for each in exact.outputs_NRO.transpose(0, 1)], dim=1),
    )
    deflated = tiles.deflated_factors(blocks, 12, fp8)
    assert energy(rounded, a_EIO, grid) < energy(deflated, a_EIO, grid) <= energy(exact, a_EIO, grid) + 1e-4


def coarse(factor: Tensor) -> tuple[None, Tensor]:
    scale = factor.abs().amax(1, keepdim=True) / 7
    return None, (factor / scale).round() * scale


def test_each_round_of_least_squares_lowers_the_weighted_error() -> None:
    a_EIO, _, _ = planted()
    w_EOI = a_EIO.transpose(1, 2)
    weight_EI = normal(EXPERTS, INPUTS, seed=5).exp()
    grid = placement.at_random(EXPERTS, (4, 5))  # four cells are empty
    start = tiles.svd_factors(tiles.Blocks(a_EIO, grid), 12)
    found = [
        tiles.captured(w_EOI, tiles.refit(w_EOI, start, weight_EI, grid, coarse, rounds=rounds), weight_EI, grid)
        for rounds in range(3)
    ]
    assert found[0] < found[1] < found[2]
    # The fit of one side is the least squares solution: any other A is worse.
    inputs = tiles.fit_inputs(w_EOI, start.outputs_NRO, weight_EI, grid)
    best = tiles.Factors(inputs_MRI=inputs, outputs_NRO=start.outputs_NRO)
    other = tiles.Factors(inputs_MRI=inputs + 1e-2 * normal(*inputs.shape), outputs_NRO=start.outputs_NRO)
    assert tiles.captured(w_EOI, other, weight_EI, grid) < tiles.captured(w_EOI, best, weight_EI, grid)


def test_experts_that_share_nothing_have_factors_of_their_own() -> None:
    a_EIO = torch.stack([(10.0**-k) * normal(INPUTS, OUTPUTS, seed=k) for k in range(4)])
    grid = placement.in_order(4, (4, 4))
    assert grid.parts() == [[0], [1], [2], [3]]
    factors = tiles.svd_factors(tiles.Blocks(a_EIO, grid), 5)
    for k in range(4):
        sigma = torch.linalg.svdvals(a_EIO[k])
        error = (a_EIO[k].T - factors.expert(k, k)).square().sum() / sigma.square().sum()
        assert float(error) == pytest.approx(float(sigma[5:].square().sum() / sigma.square().sum()), rel=0.05)


def test_a_row_tiles_scale_folds_into_the_input_factor() -> None:
    a_EIO, rows, columns = planted()
    grid = placement.grid_of(rows * 4 + columns, (4, 4))
    scale_MI = normal(4, INPUTS, seed=9).exp()
    scaled = a_EIO * scale_MI[list(grid.row_E)].unsqueeze(-1)
    factors = tiles.svd_factors(tiles.Blocks(scaled, grid), 12)
    folded = tiles.Factors(inputs_MRI=factors.inputs_MRI / scale_MI.unsqueeze(1), outputs_NRO=factors.outputs_NRO)
    x_SI = normal(7, INPUTS, seed=11)
    for k in range(EXPERTS):
        m, n = grid.row_E[k], grid.column_E[k]
        private = (x_SI / scale_MI[m]) @ factors.inputs_MRI[m].T @ factors.outputs_NRO[n]
        torch.testing.assert_close(x_SI @ folded.expert(m, n).T, private, rtol=1e-4, atol=1e-4)


def test_scales_are_normalized_and_never_span_more_than_five_decades() -> None:
    mean = torch.tensor([1.0, 1e-3, 10.0, 0.0])
    scale = tiles.input_scale(mean, 1.0)
    assert float(scale.max() * scale.min()) == pytest.approx(1)
    torch.testing.assert_close(scale[0] / scale[1], torch.tensor(1e3).double())
    wild = tiles.input_scale(torch.tensor([1e-9, 1.0]), 2.4)
    assert float(wild.max() / wild.min()) < 1e5 or float(wild.max() / wild.min()) == pytest.approx(1e9**0.5, rel=0.01)
    assert tiles.input_scale(torch.zeros(3), 2.4).tolist() == [1, 1, 1]


def test_naive_fusion_holds_for_a_linear_expert_and_fails_for_swiglu() -> None:
    """Equations 52 and 53: one product on each side of a routing-weighted sum in between."""
    rank, tokens = 5, 11
    grid = placement.at_random(6, (2, 4))
    inputs_MRI, outputs_NRO = normal(2, rank, INPUTS), normal(4, rank, OUTPUTS, seed=1)
    up_NRO = normal(4, rank, OUTPUTS, seed=4)
    x_BI = normal(tokens, INPUTS, seed=2)
    index_BT = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(b))[:3] for b in range(tokens)])
    weight_BT = normal(tokens, 3, seed=3).softmax(-1)

    def fused(side_NRO: Tensor) -> Tensor:
        product = (x_BI @ inputs_MRI.flatten(0, 1).T).view(tokens, 2, rank)
        total = torch.zeros(tokens, 4, rank)
        for b, t in itertools.product(range(tokens), range(3)):
            k = int(index_BT[b, t])
            total[b, grid.column_E[k]] += weight_BT[b, t] * product[b, grid.row_E[k]]
        return total.flatten(1) @ side_NRO.flatten(0, 1)

    def answers(side_NRO: Tensor) -> Tensor:
        dense = [side_NRO[grid.column_E[k]].T @ inputs_MRI[grid.row_E[k]] for k in range(6)]
        return torch.stack(
            [torch.stack([dense[k] @ x for k in ks.tolist()]) for x, ks in zip(x_BI, index_BT, strict=True)]
        )

    linear = (weight_BT.unsqueeze(-1) * answers(outputs_NRO)).sum(1)
    torch.testing.assert_close(fused(outputs_NRO), linear, rtol=1e-4, atol=1e-4)
    gated = functional.silu(answers(outputs_NRO)) * answers(up_NRO)
    right = (weight_BT.unsqueeze(-1) * gated).sum(1)
    naive = functional.silu(fused(outputs_NRO)) * fused(up_NRO)
    assert (naive - right).norm() > 0.3 * right.norm()

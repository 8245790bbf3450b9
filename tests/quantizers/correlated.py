"""Weights, second moments of inputs that depend on each other, and what rounding loses of the outputs."""

import torch
from torch import Tensor


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def hessian(columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_SK = torch.randn(2000, columns, generator=generator) * torch.rand(columns, generator=generator)
    x_SK[:, 1:] += 0.7 * x_SK[:, :-1]
    return x_SK.T @ x_SK


def error(w_NK: Tensor, hat_NK: Tensor, hessian_KK: Tensor) -> float:
    e_NK = w_NK - hat_NK
    return float(((e_NK @ hessian_KK) * e_NK).sum() / ((w_NK @ hessian_KK) * w_NK).sum())

"""Second moments of what linears are called with."""

import torch
from torch import Tensor, nn

from moeq.calibration.linears import second_moments


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "o", "twice", "never", "late", "mixed"):
            self.add_module(name, nn.Linear(300, 300, bias=False))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.o(self.q(x) + self.k(x))
        self.mixed(y if self.calls > 1 else y.clone())
        self.late(torch.full_like(x, torch.nan))
        return self.twice(self.twice(y))


@torch.no_grad()
def test_sums_are_those_of_all_calls() -> None:
    torch.manual_seed(0)
    block, batches = Block(), [torch.randn(2, 7, 300), torch.randn(1, 7, 300)]
    linears = dict(block.named_children())
    found = second_moments(linears, lambda: [block(x) for x in batches] and None)
    assert set(found) == {"q", "k", "o", "twice", "mixed"}
    assert found["q"] is found["k"]
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    torch.testing.assert_close(found["q"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    inner = block.q(rows) + block.k(rows)
    torch.testing.assert_close(found["o"], inner.T @ inner, rtol=1e-4, atol=1e-4)
    y = block.o(inner)
    both = torch.cat([y, block.twice(y)])
    torch.testing.assert_close(found["twice"], both.T @ both, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in linears.values())


@torch.no_grad()
def test_who_shares_inputs_now_and_then_is_left_out() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x, y = torch.randn(3, 8), torch.randn(3, 8)

    def show() -> None:
        for own in (x, y):
            first(x)
            second(own)

    assert set(second_moments({"first": first, "second": second}, show)) == {"first"}

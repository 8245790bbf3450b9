"""Counting tokens between batches, and lending the layer's mean to experts that saw few."""

import numpy as np
import pytest
import torch
from expert_toy import SPECS, UNROUTED, make_toy

from moeq.costs.perturb import make_rounder, perturb
from moeq.costs.tally import Tally
from moeq.errors import CalibrationError


def test_counts_routed_tokens_and_leaves_sentinels_out() -> None:
    toy = make_toy()
    toy.asked.index_Tk[:10, 0] = toy.layer.num_experts  # of another rank's experts, in expert parallelism
    tally = Tally(toy.view(), ("sums",))
    for part in (slice(0, 25), slice(25, None)):
        tally.count(toy.part(part))
    for expert in range(toy.layer.num_experts):
        chosen_Tk = toy.asked.index_Tk == expert
        assert tally.tokens_E[expert] == int(chosen_Tk.sum())
        assert tally.weight_E[expert] == pytest.approx(float(toy.asked.weights_Tk[chosen_Tk].sum()))
    assert tally.asked == len(toy.asked.x_TH)
    parts = list(perturb(toy.view(), toy.asked, make_rounder("paper")))
    assert sum(len(part.tokens_S) for part in parts) == 2 * len(toy.asked.x_TH) - 10


def test_shrunk_keeps_average_experts_and_lifts_the_starved() -> None:
    toy = make_toy()
    tally = Tally(toy.view("matrix"), ("sums",))
    tally.tokens_E[:] = [100, 50, 2, 0]
    per_token = np.array([[1.0, 2.0, 3.0]] * 3)  # three matrices, three candidates
    per_token[2] *= 10
    tally.tables["sums"][:] = np.kron(tally.tokens_E[:, None], per_token)
    for floor in (0, 8, 64):
        found = tally.shrunk("sums", floor)
        wanted = np.kron(np.maximum(tally.tokens_E, floor)[:, None], per_token)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    tally.tables["sums"][6:9] *= 100  # two odd tokens say less than eight typical ones
    assert (tally.shrunk("sums", 8)[6:9] < 8 * 100 * per_token / 2).all()
    assert not tally.shrunk("sums", 0)[3 * UNROUTED :].any()


def test_costs_that_are_not_finite_are_refused() -> None:
    toy = make_toy()
    tally = Tally(toy.view(), ("sums",))
    costs_UC = np.zeros((toy.layer.num_experts, len(SPECS)))
    assert tally.layer_costs(costs_UC, {}).costs_UC is costs_UC
    costs_UC[1, 1] = torch.inf
    with pytest.raises(CalibrationError, match="MoE layer 0"):
        tally.layer_costs(costs_UC, {})

import itertools
import math

import numpy as np
import pytest

from moeq.solvers.search import Piece, Stage, Task, search


def make(seed: int, gap: float = 0.0) -> tuple[Task, float]:
    """Five single units around a price of 1, and the least cost that fits."""
    generator = np.random.default_rng(seed)
    growth = np.concatenate([np.zeros((5, 1), np.int64), generator.integers(-9, 10, (5, 2))], axis=1)
    cost = -growth + generator.random((5, 3))
    cost -= cost[:, :1]
    slack = int(generator.integers(-3, 4))
    stages = []
    for unit in range(5):
        value = cost[unit] + growth[unit]
        piece = Piece(
            growth_N=growth[unit],
            cost_N=cost[unit],
            regret_N=value - value.min(),
            least=float(value.min()),
            moves_NQ=np.zeros((3, 1), np.int64),
        )
        stages.append(Stage(pieces=((unit, piece),), credit_Q=np.zeros(1)))
    stages.sort(key=lambda stage: float(stage.pieces[0][1].regret_N[1:].min()))
    rows = np.arange(5)
    fitting = [
        float(cost[rows, choice].sum())
        for choice in itertools.product(range(3), repeat=5)
        if growth[rows, choice].sum() <= slack
    ]
    return Task(stages=stages, num_units=5, slack=slack, multiplier=1.0, gap=gap), min(fitting, default=math.inf)


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_best_choice(seed: int) -> None:
    task, best = make(seed)
    assert task.floor <= best
    found = search(task, math.inf, 1000)
    assert found.cost == pytest.approx(best)
    assert found.bound == pytest.approx(best)
    assert found.option_K is not None
    by_unit = {unit: piece for stage in task.stages for unit, piece in stage.pieces}
    assert sum(by_unit[unit].cost_N[option] for unit, option in enumerate(found.option_K)) == pytest.approx(best)
    assert sum(by_unit[unit].growth_N[option] for unit, option in enumerate(found.option_K)) <= task.slack


@pytest.mark.parametrize("seed", range(20))
def test_what_is_too_little_better_is_not_searched_but_not_denied(seed: int) -> None:
    task, best = make(seed, gap=0.5)
    found = search(task, best + 0.4, 1000)
    assert found.bound <= best + 1e-9
    assert found.bound >= min(best, found.cost - 0.5) - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_a_narrow_search_proves_less_but_nothing_wrong(seed: int) -> None:
    task, best = make(seed)
    found = search(task, math.inf, 1)
    assert task.floor - 1e-9 <= found.bound <= best + 1e-9
    assert found.cost >= best - 1e-9

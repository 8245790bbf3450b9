import numpy as np
import pytest
import solving

from moeq.errors import ArtifactError, MoeqError, OptionError
from moeq.solvers.check import ROWS, check
from moeq.solvers.problem import Problem, Share
from moeq.solvers.registry import SOLVERS, make_solver

COSTS = np.array([[3.0, 1.0], [2.0, 1.0], [5.0, 4.0]])
SIZES = np.array([[1, 2]])


def make(costs: object = COSTS, sizes: object = SIZES, limit: object = 5, shares: tuple[Share, ...] = ()) -> Problem:
    return Problem(costs_UC=costs, sizes_UC=sizes, limit=limit, shares=shares)  # type: ignore[arg-type]


def changed(value: float) -> np.ndarray:
    costs = COSTS.copy()
    costs[1, 0] = value
    return costs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (make(costs=changed(np.nan)), "unit 1 under candidate 0 is nan"),
        (make(costs=changed(np.inf)), "unit 1 under candidate 0 is inf"),
        (make(costs=changed(-1e-9)), "unit 1 under candidate 0 is -1e-09"),
        (make(costs=changed(1e300)), "1e\\+300"),
        (make(costs=COSTS.astype(int)), "float32 or float64"),
        (make(costs=COSTS[0]), "no table"),
        (make(costs=COSTS[:0]), "no table"),
        (make(costs=COSTS[:, :0]), "no table"),
        (make(sizes=np.array([[1, 2, 3]])), "sizes have shape"),
        (make(sizes=np.array([[1, 2], [1, 2]])), "sizes have shape"),
        (make(sizes=np.array([[1.0, 2.0]])), "signed integers"),
        (make(sizes=np.array([[-1, 2]])), "negative"),
        (make(sizes=np.array([[1, 2**52]])), "2\\^53"),
    ],
)
def test_malformed_tables(asked: Problem, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as raised:
        check(asked)
    assert raised.value.fix


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (make(limit=5.0), "integer"),
        (make(shares=(solving.share([0, 3], (0,), 1),)), "unit 3"),
        (make(shares=(solving.share([-1, 0], (0,), 1),)), "unit -1"),
        (make(shares=(solving.share([0, 0], (0,), 1),)), "twice"),
        (make(shares=(solving.share([[0, 1]], (0,), 1),)), "list of unit numbers"),
        (make(shares=(Share(members=np.array([0.0]), candidates=(0,), count=1),)), "list of unit numbers"),
        (make(shares=(solving.share([0], (2,), 1),)), "candidates \\(2,\\)"),
        (make(shares=(solving.share([0], (-1,), 1),)), "candidates \\(-1,\\)"),
        (make(shares=(solving.share([0], (0,), -1),)), "asks for -1"),
    ],
)
def test_malformed_options(asked: Problem, message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        check(asked)
    assert raised.value.fix


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_checks(name: str) -> None:
    with pytest.raises(ArtifactError):
        make_solver(name).solve(make(costs=changed(np.nan)))
    with pytest.raises(MoeqError, match="unit 3"):
        make_solver(name).solve(make(shares=(solving.share([3], (0,), 1),)))


def test_the_unit_is_named_also_far_down() -> None:
    costs = np.ones((ROWS + 5, 2), np.float32)
    costs[ROWS + 3, 1] = np.nan
    with pytest.raises(ArtifactError, match=f"unit {ROWS + 3} under candidate 1 is nan"):
        check(make(costs=costs))


def test_sound_problems_pass() -> None:
    check(make())
    check(make(costs=COSTS.astype(np.float32), sizes=np.array([[1, 2]] * 3), limit=np.int64(5)))
    check(make(shares=(solving.share([0, 2], (0, 1), 0), solving.share([], (), 0))))

import numpy as np
import pytest
import solving

from moeq.errors import OptionError
from moeq.solvers import auto
from moeq.solvers.dp import Dp
from moeq.solvers.problem import Problem, Solution
from moeq.solvers.registry import SOLVERS, make_solver


def test_names() -> None:
    assert set(SOLVERS) == {"auto", "milp", "dp", "lagrangian"}
    with pytest.raises(OptionError, match="'gurobi'") as raised:
        make_solver("gurobi")
    assert "lagrangian" in raised.value.fix


@pytest.mark.parametrize(("units", "wanted"), [(200, "Milp"), (201, "Lagrangian")])
def test_auto_goes_by_size(units: int, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def spy(name: str) -> type:
        class Spy:
            def solve(self, asked: Problem) -> Solution:
                used.append(name)
                return Solution(choice_U=np.zeros(units, np.int64), objective=1.0, bound=1.0, size=0)

        return Spy

    for name in ("Milp", "Lagrangian"):
        monkeypatch.setattr(auto, name, spy(name))
    make_solver("auto").solve(solving.experts(1, units, 5, 2.0))
    assert used == [wanted]


def test_dp_refuses_tables_that_are_too_large() -> None:
    asked = solving.experts(2, 50, 4, 2.0, shares="c2c3")
    assert Dp(memory=1 << 22).solve(asked).size == asked.limit
    with pytest.raises(OptionError, match="GiB") as raised:
        Dp(memory=1 << 12).solve(asked)
    assert raised.value.option == "solver"
    assert "lagrangian" in raised.value.fix


def test_dp_takes_the_smaller_of_equal_choices() -> None:
    found = make_solver("dp").solve(solving.problem([[1, 1, 1], [2, 1, 1]], [[1, 2, 3]], 6))
    assert found.choice_U.tolist() == [0, 1]


def test_milp_refuses_problems_that_are_too_large() -> None:
    asked = Problem(costs_UC=np.ones((500_000, 5), np.float32), sizes_UC=np.array([[1, 2, 3, 4, 5]]), limit=10**7)
    with pytest.raises(OptionError, match="2500000 options") as raised:
        make_solver("milp").solve(asked)
    assert "lagrangian" in raised.value.fix

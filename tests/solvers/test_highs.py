from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from moeq.errors import OptionError
from moeq.solvers import highs
from moeq.solvers.highs import Program, relax, solve, whole_steps


def program(room: float = 5.0) -> Program:
    """Three units of sizes 0, 3 or 0, 2 or 0, 2; the large option saves 9, 4 and 4."""
    return Program(
        unit_N=np.array([0, 0, 1, 1, 2, 2]),
        candidate_N=np.array([0, 1] * 3),
        alike_K=np.ones(3),
        cost_N=np.array([9.0, 0.0, 4.0, 0.0, 4.0, 0.0]),
        size_N=np.array([0.0, 3.0, 0.0, 2.0, 0.0, 2.0]),
        room=room,
        incidence_SN=sparse.csr_matrix((0, 6)),
        need_S=np.zeros(0),
    )


def test_choice_and_bound() -> None:
    found = solve(program())
    assert found is not None
    assert found.taken_N[:2].tolist() == [0, 1]
    assert found.taken_N[2:].reshape(2, 2).sum(axis=0).tolist() == [1, 1]
    assert found.bound == pytest.approx(4)
    assert solve(program(room=-1.0)) is None


def test_prices_of_the_relaxation() -> None:
    prices = relax(program(room=4.0))
    assert prices is not None
    # Unit 0 first (3 a step), then half of unit 1 or 2 (2 a step).
    assert prices.value == pytest.approx(6)
    assert prices.room == pytest.approx(2)
    assert relax(program(room=-1.0)) is None


def answers(monkeypatch: pytest.MonkeyPatch, *given: Any) -> list[float]:
    """HiGHS gives these answers; returns the room of each question."""
    rooms: list[float] = []

    def milp(*_: object, constraints: Any, **__: object) -> SimpleNamespace:
        rooms.append(float(constraints[1].ub.item()))
        x = given[len(rooms) - 1]
        return SimpleNamespace(status=0, x=np.array(x), mip_dual_bound=float(len(rooms)), message="")

    monkeypatch.setattr(highs.optimize, "milp", milp)
    return rooms


def test_an_answer_that_does_not_fit_once_rounded_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = answers(monkeypatch, [0, 1, 0, 1, 0.00001, 0.99999], [0, 1, 0, 1, 1, 0])
    found = solve(program())
    assert rooms == [5, 3]
    assert found is not None
    assert found.taken_N.tolist() == [0, 1, 0, 1, 1, 0]
    assert found.bound == 1  # of the first answer: the second question was a narrower one


def test_answers_that_are_not_integral_or_never_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [0.5, 0.5, 1, 0, 1, 0])
    with pytest.raises(OptionError, match="not integral") as raised:
        solve(program())
    assert raised.value.option == "solver"
    answers(monkeypatch, *[[0, 1, 0, 1, 0, 1]] * highs.RETRIES)
    with pytest.raises(OptionError, match="do not fit"):
        solve(program())


def test_whole_steps() -> None:
    steps, step = whole_steps(np.array([[10, 22, 46], [7, 7, 19]]))
    assert step == 12
    assert steps.tolist() == [[0, 1, 3], [0, 0, 1]]
    assert whole_steps(np.array([[4, 4]]))[1] == 1

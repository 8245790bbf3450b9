"""Several calls at a time, results in order, nothing left behind."""

import threading
from collections.abc import Iterator

import pytest
import torch

from moeq.calibration.workers import MAX_WORKERS, in_order

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[1, 2, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order(threads: int) -> None:
    assert list(in_order(lambda index: index * index, 20, CPU)) == [index * index for index in range(20)]
    assert list(in_order(lambda index: index, 0, CPU)) == []
    assert torch.get_num_threads() == threads


def test_calls_run_at_the_same_time_and_share_the_cores(threads: int) -> None:
    workers = min(threads, MAX_WORKERS)
    together = threading.Barrier(workers)

    def work(_: int) -> int:
        together.wait(timeout=60)
        return torch.get_num_threads()

    assert list(in_order(work, 2 * workers, CPU)) == [max(1, threads // workers)] * (2 * workers)


def test_elsewhere_than_on_a_cpu_the_caller_does_the_work() -> None:
    names = set(in_order(lambda _: threading.current_thread().name, 3, torch.device("meta")))
    assert names == {threading.current_thread().name}


@pytest.mark.parametrize("inference", [False, True])
def test_workers_are_in_the_callers_mode(inference: bool) -> None:
    with torch.inference_mode(inference):
        seen = list(in_order(lambda _: torch.is_inference_mode_enabled(), 4, CPU))
    assert seen == [inference] * 4


def test_an_error_ends_it(threads: int) -> None:
    begun = []

    def work(index: int) -> int:
        begun.append(index)
        if index == 2:
            raise ValueError("expert 2")
        return index

    results = in_order(work, 1000, CPU)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="expert 2"):
        next(results)
    assert len(begun) < 3 + 3 * MAX_WORKERS
    assert torch.get_num_threads() == threads


def test_few_results_wait_to_be_taken() -> None:
    begun: list[int] = []
    results = in_order(begun.append, 1000, CPU)
    for _ in range(5):
        next(results)
    assert len(begun) <= 5 + MAX_WORKERS
    results.close()
    assert len(begun) <= 5 + MAX_WORKERS

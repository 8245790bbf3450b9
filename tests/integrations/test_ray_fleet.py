"""Ray's workers make the bytes that one process makes, also when one of them is killed in the middle."""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import moeq
from moeq import cli
from moeq.checkpoint.write import hash_file
from moeq.errors import InfeasibleError, InternalError, MoeqError, OptionError, WorkerError
from moeq.fleet import Fleet
from moeq.recipe import Recipe
from moeq.stages import evaluate, measure, quantize
from moeq_cli import main
from often import nightly

ray = pytest.importorskip("ray")
ray_fleet = pytest.importorskip("moeq.integrations.ray_fleet")

SMALL: dict[str, Any] = {"bits": 2.5, "group_size": 32, "device": "cpu", "quality": False}
NAME = b"ray::_do"
"""What a worker of ours is called while it works."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this file
    with ray_fleet.RayFleet(workers=2) as found:
        yield found


@pytest.fixture(scope="module")
def text(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of the bundled text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((text_dir / "calibration.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


def working() -> list[int]:
    """Processes that do a piece of work now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes().startswith(NAME):
                found.append(int(entry.name))
        except OSError:  # gone by now
            continue
    return found


@contextmanager
def one_killed() -> Iterator[list[int]]:
    """Inside, the first worker that is seen working dies."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not killed:
            for process in working():
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                break
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
    assert killed


def files(directory: Path) -> dict[str, str]:
    """What a checkpoint's bytes are; the card tells of the command and the time."""
    told = ("README.md", "moeq_report.json")
    return {path.name: hash_file(path).sha256 for path in sorted(directory.iterdir()) if path.name not in told}


def doubled(number: int) -> int:
    return 2 * number


def refused(number: int) -> int:
    if number == 3:
        raise InfeasibleError("too little", smallest=7, fix="give more")
    return number


def broken(number: int) -> int:
    return number // 0


def dead(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order(fleet: Fleet) -> None:
    assert list(fleet.spread(doubled, range(40))) == [2 * number for number in range(40)]
    assert list(fleet.spread(doubled, [])) == []


def test_errors_travel_whole(fleet: Fleet) -> None:
    results = fleet.spread(refused, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InfeasibleError, match=r"too little \(option bits, size\). Fix: give more.") as caught:
        next(results)
    assert (caught.value.smallest, caught.value.option, caught.value.fix) == (7, "bits, size", "give more")
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        list(fleet.spread(broken, [1]))


@pytest.mark.nightly
def test_work_that_kills_its_worker_is_given_up(fleet: Fleet) -> None:
    with pytest.raises(WorkerError, match="died 4 times"):
        list(fleet.spread(dead, [1]))


RUNS: dict[str, dict[str, Any]] = {
    "costs by text, experts of trellises, compensated": {"method": "auto", "effort": "fast"},
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "costs by layer, files without text": {"method": "alphaq", "quantizer": "hqq", "calibration": "none"},
    "files without text": {"method": "uniform", "quantizer": "rtn", "calibration": "none"},
    "experts": {"method": "uniform", "quantizer": "gptq"},
}
ALONE: dict[str, dict[str, Any]] = {"tiles": {"method": "tileq"}, "components": {"method": "bitsmoe"}}
"""Nothing of these is spread."""


@pytest.mark.parametrize("options", [*RUNS.values(), *(nightly(run) for run in MORE_RUNS.values())])
def test_same_bytes(options: dict[str, Any], fleet: Fleet, demo_dir: Path, text: Path, tmp_path: Path) -> None:
    with one_killed():
        compare_bytes(options, fleet, demo_dir, text, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("options", ALONE.values(), ids=list(ALONE))
def test_same_bytes_alone(options: dict[str, Any], fleet: Fleet, demo_dir: Path, text: Path, tmp_path: Path) -> None:
    compare_bytes(options, fleet, demo_dir, text, tmp_path)


def compare_bytes(options: dict[str, Any], fleet: Fleet, demo_dir: Path, text: Path, place: Path) -> None:
    recipe = Recipe(**{**SMALL, "calibration": f"{text},bundled-web", "nsamples": 4, "seqlen": 64, **options})
    quantize.run(demo_dir, place / "many", recipe, fleet=fleet)
    quantize.run(demo_dir, place / "one", recipe)
    assert files(place / "one") == files(place / "many")
    assert not [path for path in place.iterdir() if path.name not in ("one", "many")]


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["gemq", "alphaq"])
def test_same_costs(method: str, fleet: Fleet, demo_dir: Path, text: Path) -> None:
    recipe = Recipe(method=method, calibration=f"{text},bundled-web", nsamples=4, seqlen=64, device="cpu")
    seen: list[tuple[str, int, int]] = []
    with one_killed():
        found = measure.run(demo_dir, recipe, lambda *step: seen.append(step), fleet=fleet)
    assert found.hash == measure.run(demo_dir, recipe).hash
    assert seen == (
        [("texts", 1, 2), ("texts", 2, 2)] if method == "gemq" else [("layers", n + 1, 4) for n in range(4)]
    )


@pytest.mark.nightly
@pytest.mark.parametrize("compared", [False, True])
def test_same_quality(compared: bool, fleet: Fleet, packed_demo: Path, demo_dir: Path, text: Path) -> None:
    options: dict[str, Any] = {"seqlen": 32, "max_tokens": 800, "batch_size": 2, "device": "cpu"}
    options["reference"] = demo_dir if compared else None
    with one_killed():
        found = evaluate.run(packed_demo, text, fleet=fleet, **options)
    assert found.metrics == evaluate.run(packed_demo, text, **options).metrics
    assert ("kl" in found.metrics) == compared
    with pytest.raises(OptionError, match="batch-size"):
        evaluate.run(packed_demo, text, fleet=fleet, **{**options, "batch_size": 0})


def test_command_line(fleet: Fleet, demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["measure", str(demo_dir), str(tmp_path / "costs.json"), "--method", "alphaq", "--device", "cpu"]
    assert main([*words, "--workers", "2"]) == 1
    assert "there are no workers without --ray" in capsys.readouterr().err
    assert main([*words, "--ray", "--workers", "0"]) == 1
    assert "option workers" in capsys.readouterr().err


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray_fleet.ray, "init", refuse)
    with pytest.raises(WorkerError, match=r"no workers at 10.0.0.1:6379: nobody answers \(option ray\)"):
        ray_fleet.RayFleet("10.0.0.1:6379")


def test_without_ray(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = cli.importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name == ray_fleet.__name__:
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, package)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert main(["measure", str(demo_dir), str(tmp_path / "costs.json"), "--method", "alphaq", "--ray"]) == 1
    assert "pip install 'moeq[ray]'" in capsys.readouterr().err


def test_every_error_can_be_sent() -> None:
    error = OptionError("no", option="bits", file="here", tensor="this", fix="give more")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (OptionError, str(error), vars(error))
    assert issubclass(type(again), MoeqError)


def test_plan_says_what_workers_would_take(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"bits": 2.5, "method": "uniform", "calibration": "bundled"}
    alone, two, many = (moeq.plan(demo_dir, workers=count, **options).workers for count in (1, 2, 1000))
    assert alone.useful == 16  # experts of a layer
    assert alone.seconds > two.seconds > many.seconds > two.seconds / 8
    assert alone.moved_bytes < two.moved_bytes
    assert moeq.plan(demo_dir, workers=2, bits=4, calibration="none").workers.useful == 4  # layers
    assert moeq.plan(demo_dir, **options).workers is None
    assert main(["plan", str(demo_dir), "--bits", "3", "--workers", "100"]) == 0
    assert "over 100 workers" in (shown := capsys.readouterr().out)
    assert "more than 16 would wait" in shown
    with pytest.raises(OptionError, match="option workers"):
        moeq.plan(demo_dir, workers=0, **options)

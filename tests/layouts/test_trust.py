"""Compiled kernels that answer wrongly are found before they serve, said once, and remembered."""

import json
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fresh
import moeq
from moeq import native
from moeq.errors import KernelWarning
from moeq.format import records as packing
from moeq.layouts import known_answers, selftest, trust
from moeq.layouts.grouped import known, reference
from moeq.layouts.grouped.serving import PackedExperts
from moeq.layouts.selftest import Check
from moeq.layouts.spectral import known as spectral_known
from moeq.layouts.spectral.serving import SpectralExperts
from moeq.layouts.tiled import known as tiled_known
from moeq.layouts.tiled import reference as tiled
from moeq.layouts.tiled.serving import TiledExperts
from moeq.layouts.tiled.stored import TileEntry
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of a process that knows nothing yet."""
    before = trust.cache_directory()
    trust.forget()
    trust.keep_verdicts_in(tmp_path / "cache")
    yield tmp_path / "cache"
    trust.keep_verdicts_in(before)
    trust.forget()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subjects that are tested, one after the other."""
    found: list[str] = []
    real = selftest.run

    def run(path: str, device: torch.device, wanted: tuple[str, ...] | None = None) -> tuple[Check, ...]:
        found.extend(wanted or selftest.subjects(path, device))
        return real(path, device, wanted)

    monkeypatch.setattr(selftest, "run", run)
    return found


def zeros(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: torch.zeros_like(real(*args, **options))


def nans(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: torch.full_like(real(*args, **options), torch.nan)


def raises(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kernel(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no image for /home/somebody/.secret/kernel.cubin in /home/somebody")

    return kernel


def scaled(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: real(*args, **options) * 1.001


def one_column(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kernel(*args: Any, **options: Any) -> Tensor:
        answer = real(*args, **options)
        answer[:, -1] = 0
        return answer

    return kernel


FAULTS = {"zeros": zeros, "nans": nans, "raises": raises, "scaled": scaled, "a column": one_column}
KERNELS = {
    "linear": "linear",
    "experts": "grouped",
    "spectral_experts": "spectral",
    "tiled_experts": "tiled",
    "decode_matrix": "decode",
}
"""Function of `moeq.native` -> the subject that it fails."""


def verdicts(directory: Path) -> dict[str, Any]:
    files = (json.loads(path.read_text()) for path in (directory / trust.FOLDER).glob("*.json"))
    return {data["check"]["subject"]: data["check"]["failure"] for data in files}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits.float()


@needs_native
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_wrong_kernel_passes(kernel: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, kernel, FAULTS[fault](getattr(native, kernel)))
    failed = {check.subject: check for check in selftest.run("native", CPU) if not check.ok}
    check = failed[KERNELS[kernel]]
    assert check.failure
    if fault == "zeros":
        assert check.error == pytest.approx(1)
    if fault in ("nans", "raises"):
        assert check.error is None
    if fault == "raises":
        assert check.failure == "RuntimeError: no image for kernel.cubin in (path)"


@needs_native
def test_right_kernels_pass_in_milliseconds() -> None:
    runs = [selftest.run("native", CPU) for _ in range(3)]  # the first calls of torch's own functions take longer
    checks = runs[-1]
    assert [check.subject for check in checks] == list(selftest.SUBJECTS)
    assert all(check.ok for check in checks), checks
    # 0.7 s on one core; the best of three, since other processes may have it.
    assert min(sum(check.seconds for check in run) for run in runs) < 2
    exact = {check.subject: check for check in checks}["decode"]
    assert exact.error == 0


@needs_native
def test_the_test_does_not_depend_on_what_the_caller_has_set() -> None:
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            checks = selftest.run("native", CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(check.ok for check in checks), checks
    assert torch.equal(torch.get_rng_state(), state)


def test_known_layers_have_everything() -> None:
    layers = known.layers().values()
    specs = {spec for layer in layers for expert in layer.entries for _, spec in expert}
    specs |= {matrix.spec for matrix in known.matrices().values()}
    assert {spec.bits for spec in specs} == set(BITS)
    assert {spec.levels for spec in specs} == set(SCALAR_LEVELS)
    assert {spec.group_size for spec in specs} == set(GROUP_SIZES)
    for layer in layers:
        assert {spec.bits for expert in layer.entries for _, spec in expert} == set(BITS)
        call = known_answers.calls(layer.num_experts)
        assert call.index_Tk.unique().tolist() == list(range(layer.num_experts + 1))  # the last one is a sentinel
    for layer in spectral_known.layers().values():
        assert {slab.spec.bits for entry in layer.entries.values() for slab in entry.slabs} == set(BITS)


def test_the_reference_takes_no_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        monkeypatch.setattr(native, kernel, raises(getattr(native, kernel)))
    layer, module = known.layers()["mixed groups"], known_answers.Gated()
    call = known_answers.calls(layer.num_experts)
    answer = reference.experts(module, layer, call.x_TH.double(), call.index_Tk, call.weights_Tk)
    assert answer.isfinite().all()


@pytest.mark.parametrize("name", ["factors", "factors and rotation"])
def test_forgetting_the_factors_would_be_seen(name: str) -> None:
    layer, module = tiled_known.layers()[name], known_answers.Gated()
    call = known_answers.calls(layer.residual.num_experts)
    wanted = tiled.experts(module, layer, call.x_TH.double(), call.index_Tk, call.weights_Tk)
    plain = reference.experts(module, layer.residual, call.x_TH.double(), call.index_Tk, call.weights_Tk)
    assert ((plain - wanted).norm(dim=1) / wanted.norm(dim=1)).max() > 2 * known_answers.ROUNDED


def spectral_module() -> SpectralExperts:
    layer = spectral_known.layers()["basis of 8 bits"]
    module = SpectralExperts(layer.shape)
    module.bind(layer.data, layer)
    return module


def tiled_module() -> TiledExperts:
    layer = tiled_known.layers()["factors"]
    module, start, tiles = TiledExperts(layer.residual.shapes), 0, {}
    for name, sides in layer.sides.items():
        tiles[name] = TileEntry(offset=start, form=sides.form)
        start += sides.data.numel()
    assert layer.side_data is not None
    module.bind(layer.residual.data, layer.residual.entries, layer.side_data, tiles, "layer")
    return module


@needs_native
@pytest.mark.parametrize("fault", ["zeros", "nans", "raises"])
@pytest.mark.parametrize("layout", ["spectral", "tiled"])
def test_layers_of_other_layouts_stay_right(
    layout: str, fault: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = spectral_module if layout == "spectral" else tiled_module
    experts, call = known_answers.Gated(), known_answers.calls(5 if layout == "spectral" else 7)
    routed = call.index_Tk[:5], call.weights_Tk[:5]
    right = make()(experts, call.x_TH[:5].double(), *routed)
    trust.forget()
    trust.keep_verdicts_in(None)
    kernel = f"{layout}_experts"
    monkeypatch.setattr(native, kernel, FAULTS[fault](getattr(native, kernel)))
    with pytest.warns(KernelWarning, match=layout) as caught:
        module = make()
    answer = module(experts, call.x_TH[:5], *routed)
    assert len(caught) == 1
    torch.testing.assert_close(answer.double(), right, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("fault", ["zeros", "nans", "raises"])
@pytest.mark.parametrize("kernel", ["experts", "linear", "decode_matrix"])
def test_a_model_stays_right(
    kernel: str, fault: str, packed_demo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_module", None)  # torch alone
        patch.setattr(native, "_unsaid", [])
        wanted = logits(moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True))
    trust.forget()
    with monkeypatch.context() as patch:
        patch.setattr(native, kernel, FAULTS[fault](getattr(native, kernel)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KernelWarning)
            model = moeq.load(packed_demo, device="cpu", dtype=torch.float32, exact_activations=True)
            answer = logits(model)
            logits(moeq.load(packed_demo, device="cpu"))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "moeq doctor" in message
    assert KERNELS[kernel] in message
    torch.testing.assert_close(answer, wanted, rtol=1e-3, atol=1e-3)
    assert verdicts(cache)[KERNELS[kernel]] is not None


@needs_native
def test_a_right_kernel_is_silent_and_serves(packed_demo: Path, cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = moeq.load(packed_demo, device="cpu")
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert experts
    assert all(module.layer.table is not None for module in experts)
    assert verdicts(cache) == {"decode": None, "linear": None, "grouped": None, "dense": None}


PROCESS = """
import sys, torch, warnings
from pathlib import Path
from moeq import native
from moeq.layouts import selftest, trust
trust.keep_verdicts_in(Path(sys.argv[1]))
if sys.argv[2] == "broken":
    real = native.experts
    native.experts = lambda *args, **options: torch.zeros_like(real(*args, **options))
real_run, ran = selftest.run, []
def run(path, device, wanted=None):
    ran.extend(wanted)
    return real_run(path, device, wanted)
selftest.run = run
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(trust.trusted("native", "grouped", torch.device("cpu")), ran, len(caught))
"""


def process(directory: Path, state: str) -> str:
    done = fresh.run(PROCESS, str(directory), state)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_native
def test_verdicts_outlive_the_process(tmp_path: Path) -> None:
    assert process(tmp_path / "a", "right") == "True ['decode', 'linear', 'grouped'] 0"
    assert process(tmp_path / "a", "right") == "True [] 0"
    first = process(tmp_path / "b", "broken")
    assert first.startswith(
        "False ['decode', 'linear', 'grouped', 'spectral', 'tiled', 'codebooks', 'trellis', 'dense'] 1"
    )
    assert process(tmp_path / "b", "right") == "False [] 1"  # honoured, and said


@needs_native
def test_doctor_takes_a_verdict_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "decode_matrix", zeros(native.decode_matrix))
        with pytest.warns(KernelWarning):
            assert not trust.trusted("native", "spectral", CPU)
    assert not trust.trusted("native", "spectral", CPU)
    assert not native.decodes()
    assert all(check.ok for check in trust.recheck("native", CPU))
    assert trust.trusted("native", "spectral", CPU)
    assert native.decodes()
    assert set(verdicts(cache).values()) == {None}


@needs_native
def test_wrong_decoding_leaves_it_to_torch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "decode_matrix", zeros(native.decode_matrix))
    with pytest.warns(KernelWarning, match="decode"):
        assert not trust.trusted("native", "linear", CPU)
    (matrix, *_) = known.matrices().values()
    found = packing.decode_matrix(matrix.record, matrix.spec, matrix.shape)
    assert torch.equal(found, packing.decode_in_chunks(matrix.record, matrix.spec, matrix.shape))


@needs_native
@pytest.mark.parametrize("name", ["torch", "triton", "transformers", "moeq", "kernels", "device", "instructions"])
def test_another_key_is_tested_again(name: str, cache: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.trusted("native", "linear", CPU)
    assert runs == ["decode", "linear"]
    trust.forget()
    assert trust.trusted("native", "linear", CPU)
    assert runs == ["decode", "linear"]
    trust.forget()
    real = trust.key
    assert name in real("native", "linear", CPU)
    monkeypatch.setattr(trust, "key", lambda *args: {**real(*args), name: "another"})
    assert trust.trusted("native", "linear", CPU)
    assert runs == ["decode", "linear"] * 2


@needs_native
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 1}', '{"version": 2, "key": {}, "check": {}}', "\xff\x00", "[" * 100000],
)
def test_a_corrupt_cache_is_tested_again(text: str, cache: Path, runs: list[str]) -> None:
    assert trust.trusted("native", "linear", CPU)
    for path in (cache / trust.FOLDER).iterdir():
        path.write_bytes(text.encode("latin-1"))
    trust.forget()
    assert trust.trusted("native", "linear", CPU)
    assert runs == ["decode", "linear"] * 2
    assert verdicts(cache) == {"decode": None, "linear": None}


@needs_native
@pytest.mark.parametrize("field", ["error", "tolerance", "seconds", "failure", "subject"])
def test_a_file_with_wrong_types_is_no_verdict(field: str, cache: Path, runs: list[str]) -> None:
    assert trust.trusted("native", "linear", CPU)
    for path in (cache / trust.FOLDER).iterdir():
        data = json.loads(path.read_text())
        data["check"][field] = []
        path.write_text(json.dumps(data))
    trust.forget()
    assert trust.trusted("native", "linear", CPU)
    assert runs == ["decode", "linear"] * 2


@needs_native
def test_where_nothing_can_be_written(tmp_path: Path, cache: Path, runs: list[str]) -> None:
    (tmp_path / "file").write_text("not a directory")
    trust.keep_verdicts_in(tmp_path / "file")
    assert trust.trusted("native", "linear", CPU)
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    sealed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    trust.forget()
    trust.keep_verdicts_in(sealed / "moeq")
    assert trust.trusted("native", "linear", CPU)
    trust.forget()
    trust.keep_verdicts_in(None)
    assert trust.trusted("native", "linear", CPU)
    assert trust.trusted("native", "linear", CPU)
    assert runs == ["decode", "linear"] * 3
    sealed.chmod(stat.S_IRWXU)


@needs_native
def test_a_full_disk_leaves_no_half_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert trust.trusted("native", "linear", CPU)
    assert list((cache / trust.FOLDER).iterdir()) == []


@needs_native
def test_threads_test_once(cache: Path, runs: list[str]) -> None:
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(trust.trusted("native", "grouped", CPU))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    assert runs == ["decode", "linear", "grouped"]


@needs_native
def test_many_processes_write_whole_files(tmp_path: Path) -> None:
    running = [fresh.start(PROCESS, str(tmp_path), "right") for _ in range(3)]
    assert all(each.wait().stdout.startswith("True") for each in running)
    assert verdicts(tmp_path) == {"decode": None, "linear": None, "grouped": None}
    assert not [path for path in (tmp_path / trust.FOLDER).iterdir() if path.suffix != ".json"]


@needs_native
def test_no_memory_says_nothing_about_kernels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(native, "linear", full)
        with pytest.warns(KernelWarning, match="no memory"):
            assert not trust.trusted("native", "linear", CPU)
    assert "linear" not in verdicts(cache)
    trust.forget()
    assert trust.trusted("native", "linear", CPU)


def test_without_kernels_there_is_nothing_to_distrust(
    cache: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_module", None)
    assert trust.compiled(CPU, *selftest.SUBJECTS)
    assert trust.compiled(torch.device("meta"), "grouped")
    assert runs == []
    assert not cache.exists()


def test_the_cache_is_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    state = replace(trust._state, default=True, directory=None)
    monkeypatch.setattr(trust, "_state", state)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    assert trust.cache_directory() == Path("/home/somebody/.cache/moeq")

    def nobody() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", nobody)
    assert trust.cache_directory() is None


@needs_native
def test_calls_do_not_ask(packed_demo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moeq.load(packed_demo, device="cpu", exact_activations=True)

    def asked(*_: Any) -> bool:
        raise AssertionError("a call asked")

    monkeypatch.setattr(trust, "compiled", asked)
    monkeypatch.setattr(trust, "trusted", asked)
    assert logits(model).isfinite().all()

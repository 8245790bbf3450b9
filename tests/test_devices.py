"""Everything that takes a device runs on a GPU that is not there, and does what it does on a CPU.

No tensor may be made on the wrong device: the stand-in raises where CUDA would (`pretend_gpu`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeq
import pretend_gpu
from moeq.errors import DeviceError
from moeq.stages import generate
from pretend_gpu import Gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU; blocks see so few tokens at a time that there are several micro-batches."""
    monkeypatch.setattr("moeq.calibration.stream.MICRO_BATCH_TOKENS", 24)
    with pretend_gpu.present() as found:
        yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"the quick brown fox jumps over the lazy dog {number}" for number in range(40)))
    return path


def few(text: Path) -> dict[str, Any]:
    return {"calibration": text, "nsamples": 3, "seqlen": 16, "quality": False}


DATALESS = {
    "rtn": {"quantizer": "rtn", "bits": 3.7, "dense_bits": "8"},
    "hqq": {"bits": 3.2, "calibration": "none"},
    "alphaq": {"method": "alphaq", "bits": 3, "calibration": "none"},
}
CALIBRATED = {
    "gptq": {"method": "uniform", "bits": 2.6},
    "gptq-mc": {"method": "uniform", "bits": 2.6, "quantizer": "gptq-mc"},
    "vector": {"bits": 4, "quantizer": "vector"},
    "pmq": {"method": "pmq", "bits": 2.6},
    "gemq": {"method": "gemq", "bits": 2.6, "router": "task", "router_epochs": 1},
    "gemq by KL": {"method": "gemq", "bits": 2.6, "router": "kl", "router_epochs": 1},
    "bitsmoe": {"method": "bitsmoe", "bits": 6, "quantizer": "rtn"},
    "bitsmoe by gptq": {"method": "bitsmoe", "bits": 6, "quantizer": "gptq"},
    "tileq": {"method": "tileq", "bits": 5, "rank": 2, "tile_options": "rotation=expert"},
}
NIGHTLY = ("gemq by KL", "gptq-mc", "vector", "pmq", "bitsmoe", "bitsmoe by gptq", "gemq", "tileq")
"""They go the way of others but for a part which has tests of its own on CPUs."""
HEAVY = {
    "gptq": ("mm", "linalg_cholesky_ex", "addmm_"),
    "gptq-mc": ("mm", "linalg_cholesky_ex", "addmm_"),
    "vector": ("mm", "linalg_cholesky_ex", "addmm_"),
    "pmq": ("mm", "linalg_cholesky_ex"),
    "gemq": ("mm", "linalg_cholesky_ex"),
    "gemq by KL": ("mm", "linalg_cholesky_ex"),
    "bitsmoe": ("mm", "_linalg_eigh"),
    "bitsmoe by gptq": ("mm", "_linalg_eigh", "linalg_cholesky_ex"),
    "tileq": ("mm", "_linalg_eigh", "linalg_cholesky_ex"),
    "alphaq": ("bmm", "_linalg_eigh"),
}
"""What each method's work consists of: it must be done on the GPU."""
FACTORIZATIONS = ("linalg_cholesky_ex", "_linalg_eigh", "_linalg_svd", "linalg_qr")
"""None of these is left to the CPU."""


def check_work(gpu: Gpu, name: str) -> None:
    for operator in HEAVY[name]:
        assert gpu.calls[operator, "cuda"] > 0, operator
    for operator in FACTORIZATIONS:
        assert gpu.calls[operator, "cpu"] == 0, operator


def logits(directory: Path, device: str) -> torch.Tensor:
    model = moeq.load(directory, device=device, dtype="float32", exact_activations=True)
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13).view(2, 6).to(model.device)).logits.cpu()


@pytest.mark.parametrize("name", DATALESS)
def test_rounding_without_data(name: str, tiny_dir: Path, tmp_path: Path, gpu: Gpu) -> None:
    moeq.quantize(tiny_dir, tmp_path / "packed", device="cuda", **DATALESS[name])
    if name in HEAVY:
        check_work(gpu, name)
    assert torch.allclose(logits(tmp_path / "packed", "cuda"), logits(tmp_path / "packed", "cpu"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in CALIBRATED]
)
def test_calibrated_packing(
    name: str, tiny_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeq.calibration.stream.MICRO_BATCH_TOKENS", 24)
    options = CALIBRATED[name] | few(text)
    moeq.quantize(tiny_dir, tmp_path / "here", device="cpu", **options)  # outside the stand-in, which is slow
    with pretend_gpu.present() as gpu:
        moeq.quantize(tiny_dir, tmp_path / "there", device="cuda", **options)
        check_work(gpu, name)
        on_gpu = logits(tmp_path / "there", "cuda")
    # Sums run in another order, and the compiled kernels round on the CPU: as good, but not the same.
    there, here = (logits(tmp_path / each, "cpu") for each in ("there", "here"))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)(
            input_ids=torch.arange(1, 13).view(2, 6)
        ).logits
    assert (there - wanted).norm() < 1.2 * (here - wanted).norm()
    assert torch.allclose(on_gpu, there, atol=1e-4)


@pytest.mark.nightly
def test_measuring_and_speaking(packed_tiny: Path, tiny_dir: Path, text: Path, tmp_path: Path, gpu: Gpu) -> None:
    there, here = (
        moeq.evaluate(packed_tiny, text, reference=tiny_dir, seqlen=16, max_tokens=64, device=device)
        for device in ("cuda", "cpu")
    )
    assert there.metrics["kl"] == pytest.approx(here.metrics["kl"], rel=0.05, abs=1e-5)
    assert generate.run(packed_tiny, "the", max_new_tokens=4, device="cuda").new_tokens == 4
    costs = moeq.measure(tiny_dir, method="gemq", device="cuda", **few(text))
    wanted = moeq.measure(tiny_dir, method="gemq", device="cpu", **few(text))
    assert costs.costs[0] == pytest.approx(wanted.costs[0], rel=0.1)
    moeq.repair(packed_tiny, tmp_path / "tuned", calibration=text, nsamples=3, seqlen=16, device="cuda")


def test_the_stand_in_is_as_strict_as_a_gpu(gpu: Gpu) -> None:
    there, here = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    for mix in (lambda: there + here, lambda: there @ here.T, lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()
    assert (there * torch.tensor(2.0)).cpu().equal(2 * here)
    assert there[torch.tensor([0])].device == there.device
    there.requires_grad_().sum().backward()
    assert there.grad is not None
    assert there.grad.is_cuda


def test_without_a_gpu_there_is_none() -> None:
    with pytest.raises(DeviceError):
        moeq.load("somewhere", device="cuda")

"""The self-test of the Triton kernels passes where they are right, and would have caught what a GPU once did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.errors import KernelWarning
from moeq.layouts import selftest, trust
from moeq.layouts.selftest import Check

pytestmark = pytest.mark.gpu


def outcome(device: torch.device, *wanted: str) -> dict[str, Check]:
    return {check.subject: check for check in selftest.run("triton", device, wanted or None)}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.nightly
def test_right_kernels_pass(triton_device: torch.device) -> None:
    checks = outcome(triton_device)
    assert {"linear", "grouped", "spectral", "tiled"} <= set(checks)
    assert "decode" not in checks
    assert all(check.ok for check in checks.values()), checks


def no_gate(real: Callable[..., Any]) -> Callable[..., Any]:
    """What Triton made of the kernel at commit 657b223 on an H200: the gate was lost, and silu(0) * up is 0."""

    def multiply(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, sums = real(*args, **options)
        return (torch.zeros_like(out), torch.zeros_like(sums)) if options["gated"] else (out, sums)

    return multiply


def test_a_lost_gate_is_found(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeq.kernels import triton_launch

    monkeypatch.setattr(triton_launch, "multiply", no_gate(triton_launch.multiply))
    checks = outcome(triton_device, "linear", "grouped", "tiled")
    assert [name for name, check in checks.items() if not check.ok] == ["grouped", "tiled"]
    for name in ("grouped", "tiled"):
        assert checks[name].error == pytest.approx(1, abs=1e-6)
        assert "off by 1 of their length" in (checks[name].failure or "")


@pytest.mark.nightly
def test_a_wrong_kernel_is_off_and_said_once(
    triton_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeq.kernels import triton_launch

    before = trust.cache_directory()
    trust.forget()
    trust.keep_verdicts_in(tmp_path)
    monkeypatch.setattr(triton_launch, "multiply", no_gate(triton_launch.multiply))
    try:
        with pytest.warns(KernelWarning, match="Triton kernels failed .*grouped") as caught:
            assert not trust.trusted("triton", "grouped", triton_device)
        assert not trust.trusted("triton", "tiled", triton_device)
        assert trust.trusted("triton", "linear", triton_device)
        assert len(caught) == 1
        trust.forget()
        with pytest.warns(KernelWarning):
            assert not trust.trusted("triton", "grouped", triton_device)
    finally:
        trust.keep_verdicts_in(before)
        trust.forget()


def test_a_compiler_that_fails_is_an_answer(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeq.kernels import triton_launch

    def refuses(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(triton_launch, "prepare", refuses)
    checks = outcome(triton_device, "linear", "grouped")
    assert {check.failure for check in checks.values()} == {"RuntimeError: PassManager::run failed"}

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moeq.errors import ArtifactError, CalibrationError, NotMoeError, StorageError, VersionError
from moeq.evals.divergence import divergence
from moeq.evals.reference import save_reference
from moeq.evals.routing import router_overlap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_as_good_as_the_model(
    model: nn.Module, demo_model: nn.Module, noisy: nn.Module, rows: list[Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    original = model if dtype == torch.float32 else demo_model
    path = tmp_path / "reference.safetensors"
    save_reference(original, rows, path, batch_size=2)
    assert divergence(noisy, path, rows, batch_size=2) == divergence(noisy, original, rows, batch_size=2)
    assert router_overlap(noisy, path, rows, batch_size=2) == router_overlap(noisy, original, rows, batch_size=2)
    assert divergence(noisy, path, rows, batch_size=3).kl == pytest.approx(divergence(noisy, original, rows).kl, 1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.safetensors"]


def test_the_file_is_plain_safetensors(demo_model: nn.Module, rows: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_reference(demo_model, rows, path, batch_size=4)
    with safe_open(path, "pt") as file:
        assert file.metadata()["windows"] == "6"
        for index, row in enumerate(rows):
            logits, routing = file.get_tensor(f"logits.{index}"), file.get_tensor(f"routing.{index}")
            assert (logits.shape, logits.dtype) == ((len(row) - 1, 4096), torch.bfloat16)
            assert (routing.shape, routing.dtype) == ((4, len(row), 2), torch.int16)
        assert len(file.keys()) == 12


def test_file_size_is_what_the_docstring_says(demo_model: nn.Module, rows: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_reference(demo_model, rows, path)
    logits, routing = 355 * 4096 * 2, 361 * 4 * 2 * 2
    assert 0 <= path.stat().st_size - logits - routing < 2048


class Dense(nn.Module):
    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids, 5).half())


def test_models_without_experts_have_no_routing(tmp_path: Path) -> None:
    rows, path = [torch.tensor([0, 1, 4])], tmp_path / "dense"
    save_reference(Dense(), rows, path)
    assert divergence(Dense(), path, rows).kl == 0.0
    with pytest.raises(NotMoeError):
        router_overlap(Dense(), path, rows)


def test_files_of_other_windows_are_refused(model: nn.Module, rows: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "reference"
    save_reference(model, rows[:2], path)
    for others in (rows[:1], rows[:3], [rows[1], rows[0]], [torch.cat(rows[:2])]):
        with pytest.raises(ArtifactError, match="other tokens") as caught:
            divergence(model, path, others)
        assert caught.value.file == str(path)


def test_files_that_are_no_reference(model: nn.Module, rows: list[Tensor], tmp_path: Path, demo_dir: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\xff" * 100)
    cut = tmp_path / "cut"
    save_reference(model, rows[:1], cut)
    cut.write_bytes(cut.read_bytes()[:-1])
    unnamed = tmp_path / "unnamed"
    save_file({"a": torch.zeros(1)}, unnamed)
    for path in (garbage, cut, unnamed, demo_dir / "model.safetensors", tmp_path / "absent", tmp_path):
        with pytest.raises(ArtifactError) as caught:
            divergence(model, path, rows[:1])
        assert caught.value.file == str(path)
        assert caught.value.fix


def test_later_formats_are_refused(model: nn.Module, rows: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "later"
    save_file({"a": torch.zeros(1)}, path, metadata={"kind": "moeq-reference", "format_version": "2"})
    with pytest.raises(VersionError, match="format version '2'"):
        divergence(model, path, rows[:1])


def test_nothing_half_written_is_left(model: nn.Module, rows: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "reference"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_reference(model, rows, path, progress=stop)
    with pytest.raises(CalibrationError):
        save_reference(model, [], path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError) as caught:
        save_reference(model, rows, tmp_path / "absent" / "reference")
    assert caught.value.file == str(tmp_path / "absent" / "reference")


def test_progress_counts_windows(model: nn.Module, rows: list[Tensor], tmp_path: Path) -> None:
    seen: list[str] = []
    path = tmp_path / "reference"
    save_reference(model, rows, path, batch_size=4, progress=lambda *counts: seen.append(json.dumps(counts)))
    divergence(model, path, rows, batch_size=4, progress=lambda *counts: seen.append(json.dumps(counts)))
    assert seen == ["[4, 6]", "[5, 6]", "[6, 6]"] * 2

"""Side by side: the figures are those of `moeq eval`, for our checkpoints and for others'."""

import shutil
from pathlib import Path

import pytest

import moeq
from moeq.errors import CalibrationError, OptionError
from moeq.stages import compare


def test_it_is_what_eval_says(packed_demo: Path, demo_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text((text_dir / "calibration.txt").read_text()[:8000])
    texts = [text_dir / "eval.txt", tmp_path / "eval.txt"]
    options = {"seqlen": 128, "max_tokens": 512, "device": "cpu", "reference": demo_dir}
    found = compare.run([packed_demo, demo_dir], texts, pairs=None, **options)  # type: ignore[arg-type]
    packed, original = found.checkpoints
    assert [packed.name, packed.kind, original.kind] == [packed_demo.name, "moeq", "plain"]
    assert list(found.texts) == ["eval", "eval (2)"]
    for name, text in zip(found.texts, texts, strict=True):
        wanted = moeq.evaluate(packed_demo, text, **options)  # type: ignore[arg-type]
        assert packed.quality[name] == wanted.metrics
        assert found.tokens[name] == wanted.tokens
        assert original.quality[name]["kl"] == 0
    assert packed.expert_bits_per_weight == pytest.approx(3.7, abs=0.02)
    assert original.expert_bits_per_weight == 16
    assert packed.stored_bytes < original.stored_bytes
    assert all(each.decode_tokens_per_second and each.decode_tokens_per_second > 1 for each in found.checkpoints)


def test_without_a_reference(packed_demo: Path, text_dir: Path, tmp_path: Path) -> None:
    twin = tmp_path / packed_demo.name
    shutil.copytree(packed_demo, twin)
    found = compare.run([packed_demo, twin], [text_dir / "eval.txt"], seqlen=64, max_tokens=256, speed=False)
    assert [each.name for each in found.checkpoints] == [packed_demo.name, f"{packed_demo.name} (2)"]
    assert found.checkpoints[0].quality == found.checkpoints[1].quality
    assert set(found.checkpoints[0].quality["eval"]) == {"perplexity"}
    assert found.checkpoints[0].decode_tokens_per_second is None


def test_nothing_to_compare(packed_demo: Path, text_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to compare"):
        compare.run([], [text_dir / "eval.txt"])
    with pytest.raises(OptionError, match="no text"):
        compare.run([packed_demo], [])
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(CalibrationError):
        compare.run([packed_demo], [tmp_path / "short.txt"])

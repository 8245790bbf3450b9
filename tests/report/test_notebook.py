"""Results show themselves in notebooks: as HTML that nothing in them can break."""

import xml.dom.minidom
from pathlib import Path

import pytest

import moeq
from moeq.artifacts import EvalResult
from moeq.stages import compare


def parsed(result: object) -> str:
    text: str = result._repr_html_()  # type: ignore[attr-defined]
    xml.dom.minidom.parseString(f"<div>{text}</div>")  # well-formed
    return text


def test_results(packed_demo: Path, demo_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    assert "Qwen3MoeForCausalLM: 8.80 MB" in parsed(moeq.plan(demo_dir, bits=3, method="uniform"))
    made = moeq.quantize(
        demo_dir,
        tmp_path / "a&b",
        bits=3,
        method="uniform",
        calibration=str(text_dir / "calibration.txt"),
        nsamples=8,
        seqlen=64,
        device="cpu",
    )
    text = parsed(made)
    assert "a&amp;b" in text
    assert "held-out text" in text
    assert ">kl<" in text
    moeq.measure(demo_dir, cost="weight-error", unit="expert", quantizer="rtn", calibration="none").save(tmp_path / "c")
    curve = moeq.pareto(
        demo_dir, points=3, costs=str(tmp_path / "c"), method="gemq", quantizer="rtn", calibration="none"
    )
    assert parsed(curve).count("<tr>") == 4
    assert "<svg" in parsed(curve)
    found = compare.run([packed_demo], [text_dir / "eval.txt"], seqlen=64, max_tokens=128, speed=False, device="cpu")
    assert packed_demo.name in parsed(found)


def test_text_cannot_break_it() -> None:
    result = EvalResult(subject="<script>", reference="a & b", metrics={"kl": 0.5}, tokens=3)
    assert "&lt;script&gt; against a &amp; b" in parsed(result)
    with pytest.raises(AttributeError):
        parsed(object())

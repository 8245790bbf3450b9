"""`moeq imatrix`: mean squares of every matrix's inputs, as llama.cpp reads them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import moeq
import zoo
from hostile import no_partial
from moeq.errors import CalibrationError, CheckpointError, OptionError, OutputError
from moeq.recipe import Recipe
from moeq.runtime.load import load_any
from moeq.stages import imatrix
from moeq.writing.calibration_text import calibration_tokens
from moeq_cli import main

SIZES: dict[str, Any] = {"nsamples": 6, "seqlen": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def written(demo_dir: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("imatrix") / "demo.gguf"
    return out, imatrix.run(demo_dir, out, calibration=str(text_dir / "calibration.txt"), **SIZES)


def read(path: Path) -> dict[str, np.ndarray]:
    """Tensor -> its numbers."""
    return {str(tensor.name): np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@torch.no_grad()
def seen_by(directory: Path, ids_NT: Tensor) -> dict[str, Tensor]:
    """Tensor -> inputs of a linear, or of gate of one expert of the first layer, in the model run as a whole."""
    model = load_any(directory, "cpu", torch.float32)
    found: dict[str, list[Tensor]] = {"blk.2.attn_q.weight": [], "blk.1.attn_output.weight": []}
    layers = model.model.layers
    for name, linear in zip(found, (layers[2].self_attn.q_proj, layers[1].self_attn.o_proj), strict=True):
        linear.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].flatten(0, 1)))
    asked: list[tuple[Tensor, Tensor]] = []

    def experts(_: nn.Module, args: tuple[Any, ...]) -> None:
        asked.append((args[0], args[1]))

    layers[0].mlp.experts.register_forward_pre_hook(experts)
    model(input_ids=ids_NT, use_cache=False)
    x_TH, index_Tk = asked[0]
    expert = int(torch.bincount(index_Tk.flatten()).argmax())
    x_SH = x_TH[(index_Tk == expert).any(1)]
    gate, up = layers[0].mlp.experts.gate_up_proj[expert].chunk(2)
    inner_SI = functional.silu(x_SH @ gate.T) * (x_SH @ up.T)
    known = {name: torch.cat(parts) for name, parts in found.items()}
    return {**known, f"{expert} blk.0.ffn_up_exps.weight": x_SH, f"{expert} blk.0.ffn_down_exps.weight": inner_SI}


def test_numbers_are_those_of_the_model(written: tuple[Path, Any], demo_dir: Path, text_dir: Path) -> None:
    path, report = written
    tensors = read(path)
    recipe = Recipe(calibration=str(text_dir / "calibration.txt"), nsamples=6, seqlen=64)
    tokens, _ = calibration_tokens(demo_dir, recipe, None)
    assert tokens is not None
    checked = 0
    for name, x_TK in seen_by(demo_dir, tokens.ids_NT).items():
        expert, _, tensor = name.rpartition(" ")
        row = int(expert or 0)
        sums, count = tensors[f"{tensor}.in_sum2"][row], float(tensors[f"{tensor}.counts"][row].item())
        assert count == len(x_TK)
        mean = x_TK.square().mean(0)
        if not expert or len(x_TK) >= 256:  # experts with fewer tokens borrow some
            np.testing.assert_allclose(sums / count, mean, rtol=2e-2, atol=1e-5)
            checked += 1
        assert np.corrcoef(sums / count, mean)[0, 1] > 0.9
    assert checked >= 2
    assert report.tensors == len(tensors) // 2 == 4 * (4 + 3)
    assert report.tokens == 6 * 64


def test_every_expert_has_numbers(written: tuple[Path, Any]) -> None:
    """llama.cpp's own program leaves out a tensor of which an expert was never asked."""
    path, report = written
    for name, values in read(path).items():
        assert np.isfinite(values).all()
        if name.endswith("exps.weight.in_sum2"):
            assert values.shape[0] == 16
            assert (values.mean(1) > 0).all()
    assert report.fewest < 256


def test_what_llama_cpp_wants_to_read(written: tuple[Path, Any]) -> None:
    reader = gguf.GGUFReader(written[0])
    facts = {name: reader.get_field(name).contents() for name in ("general.type", "imatrix.chunk_count")}
    assert facts == {"general.type": "imatrix", "imatrix.chunk_count": 6}
    assert reader.get_field("imatrix.chunk_size").contents() == 64
    assert reader.get_field("imatrix.datasets").contents() == ["calibration.txt"]
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        wanted = 1 if str(tensor.name).endswith(".counts") else None
        assert wanted is None or int(tensor.shape[0]) == wanted


def test_bad_input(demo_dir: Path, text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(text_dir / "calibration.txt")
    out = tmp_path / "out.gguf"
    words = ["imatrix", str(demo_dir), str(out), "--calibration", text, "--nsamples", "2", "--seqlen", "16", "--json"]
    assert main([*words, "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 28
    with pytest.raises(OutputError, match="exists"):
        moeq.imatrix(demo_dir, out, calibration=text)
    (tmp_path / "short.txt").write_text("one word", encoding="utf-8")
    with pytest.raises(CalibrationError):
        moeq.imatrix(demo_dir, tmp_path / "b.gguf", calibration=tmp_path / "short.txt", **SIZES)
    with pytest.raises(CheckpointError, match="no GGUF file"):
        moeq.imatrix(demo_dir, tmp_path / "b.gguf", calibration=text, like=tmp_path / "short.txt", **SIZES)
    zoo.make_tiny("deepseek_v3", tmp_path / "other")
    with pytest.raises(OptionError, match="not deepseek_v3"):
        moeq.imatrix(tmp_path / "other", tmp_path / "b.gguf", calibration=text, **SIZES)
    no_partial(tmp_path / "b.gguf")

"""Linears outside the experts are rounded by what they are asked, where calibration text comes by."""

from pathlib import Path

import pytest
import torch
from test_calibrated_packing import make_job
from torch import Tensor

import moeq
import zoo
from moeq.allocation.decide import draft
from moeq.checkpoint.read import Reader, read_headers
from moeq.format.records import decode_matrix
from moeq.layouts.job import Job
from moeq.recipe import Recipe
from moeq.writing import calibrated_packing as calibrated
from moeq.writing.arrangement import _home

# Shared experts; a dense first block and latent attention; blocks of one mixer each; biases.
FAMILIES = ("qwen2_moe", "deepseek_v2", "nemotron_h", "gpt_oss")
WIDTHS = "attention=4,shared=4,dense=4,lm_head=8"
IDS = torch.arange(2, 98).view(8, 12)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_moments_are_those_of_the_model(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make_tiny(model_type, tmp_path / "source").eval()
    (tmp_path / "partial").mkdir()
    monkeypatch.setattr("moeq.calibration.stream.MICRO_BATCH_TOKENS", 24)
    setup = draft(tmp_path / "source", Recipe(bits=8.4, quantizer="gptq", group_size=32, dense_bits="8"))
    heard: dict[str, Tensor] = {}
    plain = Job.hear
    monkeypatch.setattr(Job, "hear", lambda job, linear, h: heard.update({linear.path: h}) or plain(job, linear, h))
    with Reader(tmp_path / "source", setup.headers) as reader:
        job = make_job(tmp_path / "source", tmp_path / "partial", reader, setup)
        calibrated.run(
            job, setup.shards, tmp_path / "source", IDS, routing="natural", finished={}, done=lambda *_: None
        )
    assert not job.heard, "nothing is kept once it is written"
    last = max(int(layer.block.rpartition(".")[2]) for layer in setup.inventory.layers)
    inside = [x for x in setup.inventory.dense if x.block and int(x.block.rpartition(".")[2]) <= last]
    assert set(heard) == {linear.path for linear in inside}
    inputs: dict[str, Tensor] = {}
    for path in heard:
        model.get_submodule(path).register_forward_hook(
            lambda _, args, __, path=path: inputs.__setitem__(path, args[0].detach().flatten(0, -2))
        )
    with torch.no_grad():
        model(IDS)
    first = inside[0].block
    for linear in inside:
        wanted = inputs[linear.path].T @ inputs[linear.path]
        off = float((heard[linear.path] - wanted).norm() / wanted.norm())
        # Blocks before were rounded to 8 bits; nothing was before the first one.
        assert off < (1e-4 if linear.block == first else 0.1), linear.path


def test_errors_at_the_output_are_smaller(tiny_dir: Path, tmp_path: Path, calibration_text: Path) -> None:
    options = {"bits": 5, "dense_bits": WIDTHS, "group_size": 32, "calibration": calibration_text, "nsamples": 8}
    options |= {"method": "uniform", "seqlen": 64, "device": "cpu", "quality": False}
    setup = draft(tiny_dir, Recipe(bits=5, dense_bits=WIDTHS, group_size=32, quantizer="gptq"))
    moments: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    for quantizer in ("gptq", "rtn"):
        out = tmp_path / quantizer
        with pytest.MonkeyPatch.context() as patch:
            plain = Job.hear
            patch.setattr(Job, "hear", lambda job, x, h, plain=plain: moments.update({x.path: h}) or plain(job, x, h))
            moeq.quantize(tiny_dir, out, quantizer=quantizer, **options)
        with Reader(out, read_headers(out)) as reader:
            weights[quantizer] = {
                linear.path: decode_matrix(
                    reader.tensor(f"{linear.path}.moeq_data"),
                    setup.plan.specs[setup.plan.dense[linear.path]],
                    linear.shape,
                    torch.float32,
                )
                for linear in setup.inventory.dense
            }
    with Reader(tiny_dir, setup.headers) as reader:
        source = {linear.path: reader.tensor(linear.source).float() for linear in setup.inventory.dense}
    assert set(moments) == {linear.path for linear in setup.inventory.dense if linear.block}
    assert torch.equal(weights["gptq"]["lm_head"], weights["rtn"]["lm_head"])
    for path, hessian in moments.items():
        both = [weights[name][path] - source[path] for name in ("gptq", "rtn")]
        with_text, without = (float(((change @ hessian) * change).sum()) for change in both)
        assert with_text < 0.6 * without, path


def test_a_linear_goes_where_its_text_has_come_by() -> None:
    blocks = ["model.layers.1", "model.layers.4", "model.layers.10", "mtp.layers.0"]
    cases = {
        "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1, "model.layers.4": 1, "model.layers.9": 2,
        "model.layers.11": 0, "mtp.layers.0": 3, "": 0,
    }  # fmt: skip
    assert {block: _home(block, blocks) for block in cases} == cases

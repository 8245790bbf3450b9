"""Calibrated packing works for every family, and what it packs is what the packed model computes with."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging

import zoo
from moeq.allocation.decide import draft
from moeq.calibration import experts as experts_module
from moeq.checkpoint.read import Reader
from moeq.layouts.grouped import writer
from moeq.layouts.job import Job
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import Recipe
from moeq.writing import calibrated_packing as calibrated
from moeq.writing.decision import Decision

NOT_CALIBRATED = {"diffusion_gemma": "not supported at all"}


def make_job(source: Path, partial: Path, reader: Reader, setup: Decision) -> Job:
    return Job(
        inventory=setup.inventory,
        plan=setup.plan,
        reader=reader,
        partial=partial,
        quantizer=make_quantizer("gptq"),
        dense_quantizer=make_quantizer("rtn"),
        heard_quantizer=make_quantizer("gptq"),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("model_type", [name for name in zoo.FAMILIES if name not in NOT_CALIBRATED])
def test_family(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.disable_progress_bar()
    source, partial = tmp_path / "source", tmp_path / "partial"
    zoo.make_tiny(model_type, source, dtype=torch.float32)
    partial.mkdir()
    monkeypatch.setattr("moeq.calibration.stream.MICRO_BATCH_TOKENS", 24)
    ids_NT = torch.arange(2, 98).view(8, 12)
    setup = draft(source, Recipe(bits=4.4, quantizer="gptq", group_size=32, dense_bits="8"))
    answers: dict[int, Tensor] = {}
    plain = experts_module.quantize_experts

    def spy(task: experts_module.ExpertsTask, module: nn.Module, capture: object) -> tuple[Tensor, list[int]]:
        y_TH, counts = plain(task, module, capture)
        answers[len(answers)] = y_TH
        return y_TH, counts

    monkeypatch.setattr(writer, "quantize_experts", spy)
    done: dict[str, object] = {}
    with Reader(source, setup.headers) as reader:
        job = make_job(source, partial, reader, setup)
        counts = calibrated.run(
            job,
            setup.shards,
            source,
            ids_NT,
            routing="natural",
            finished={},
            done=lambda name, digest: done.update({name: digest}),
        )
    assert len(done) == len(setup.inventory.layers)
    for index, layer in enumerate(setup.inventory.layers):
        # Experts of another modality never see text: they are rounded without statistics.
        wanted = 0 if (model_type, index % 2) == ("ernie4_5_vl_moe", 1) else ids_NT.numel() * layer.top_k
        assert sum(counts[index]) == wanted
        assert bool(answers[index].isfinite().all())
        assert bool(answers[index].abs().sum() > 0) == (wanted > 0)


def test_the_head_is_never_loaded(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = draft(tiny_dir, Recipe(bits=4.4, quantizer="gptq", group_size=32))
    read: list[str] = []
    plain = Reader.tensor
    monkeypatch.setattr(Reader, "tensor", lambda self, name: read.append(name) or plain(self, name))
    with Reader(tiny_dir, setup.headers) as reader:
        job = make_job(tiny_dir, tmp_path, reader, setup)
        ids_NT = torch.arange(2, 50).view(4, 12)
        calibrated.run(job, setup.shards, tiny_dir, ids_NT, routing="natural", finished={}, done=lambda *_: None)
    assert "lm_head.weight" in setup.headers
    assert "model.embed_tokens.weight" in read
    assert "lm_head.weight" not in read


def test_cpus_without_bfloat16_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for capability, bfloat16 in (("AVX2", torch.float32), ("DEFAULT", torch.float32), ("AVX512", torch.bfloat16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert calibrated.compute_dtype(torch.bfloat16, cpu) == bfloat16
        assert calibrated.compute_dtype(torch.float16, cpu) == torch.float32
        assert calibrated.compute_dtype(torch.float32, cpu) == torch.float32
        assert calibrated.compute_dtype(torch.bfloat16, gpu) == torch.bfloat16
        assert calibrated.compute_dtype(torch.float16, gpu) == torch.float16

"""Sizes predicted from headers are the sizes on disk, to the byte."""

import json
from pathlib import Path

import pytest

import moeq
from hostile import copy_of, split
from moeq.allocation.decide import draft
from moeq.checkpoint.read import read_headers
from moeq.recipe import Recipe
from moeq.spec import ALIGN
from moeq.writing import arrangement as shards

PLANS = {
    "one width": {"bits": 4.9, "group_size": 32},
    "two widths": {"bits": 5.6, "group_size": 32, "dense_bits": "8"},
    "whole rows": {"bits": 3.9, "group_size": -1, "levels": "sym", "dense_bits": "4"},
    "halves": {"bits": 3.3, "group_size": 64, "levels": "half", "dense_bits": "attention=6,lm_head=16"},
    "zeros in 16 bits": {"bits": 7.7, "group_size": 32, "levels": "asym16", "dense_bits": "lm_head=8"},
    "codes": {"bits": 1.5, "accounting": "codes"},
    "size": {"size": "240KB", "dense_bits": "8"},
}


@pytest.mark.parametrize("name", PLANS)
def test_predicted_sizes_are_those_on_disk(name: str, tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    setup = draft(tiny_dir, Recipe(**PLANS[name], quantizer="minmax"))
    planned = moeq.plan(tiny_dir, **PLANS[name], quantizer="minmax")
    report = moeq.quantize(tiny_dir, out, **PLANS[name], quantizer="minmax", device="cpu")
    for shard in setup.shards:
        assert (out / shard.file).stat().st_size == shard.size, shard.file
    headers = read_headers(out)
    kinds = {"experts": 0, "dense": 0, "copied": 0}
    experts = tuple(layer.path for layer in setup.inventory.layers)
    for tensor, info in headers.items():
        packed = "experts" if tensor.startswith(experts) else "dense"
        kinds[packed if ".moeq_" in tensor else "copied"] += info.stop - info.start
    assert kinds == {"experts": setup.sizes.experts, "dense": setup.sizes.dense, "copied": setup.sizes.copied}
    on_disk = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert on_disk == setup.sizes.total == planned.stored_bytes == report.stored_bytes
    assert report.expert_bytes == planned.expert_bytes == kinds["experts"]
    assert report.families == planned.families
    assert report.directory_bytes <= planned.disk_bytes


@pytest.mark.parametrize("size", [210_000, 230_000, 250_000])
@pytest.mark.parametrize("dense_bits", ["16", "8"])
def test_a_size_covers_the_whole_directory(size: int, dense_bits: str, tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = moeq.quantize(tiny_dir, out, size=str(size), dense_bits=dense_bits, quantizer="minmax", device="cpu")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert total == report.directory_bytes <= size


def test_a_size_covers_what_calibration_notes_down(tiny_dir: Path, calibration_text: Path, tmp_path: Path) -> None:
    options = {"calibration": calibration_text, "nsamples": 4, "seqlen": 32, "dense_bits": "8", "device": "cpu"}
    report = moeq.quantize(tiny_dir, tmp_path / "out", size="230KB", quantizer="gptq", **options)
    assert report.tokens_per_expert is not None
    assert report.directory_bytes <= 230_000


@pytest.mark.parametrize("size", ["3200KB", "4400KB"])
def test_a_size_is_used_to_within_two_percent(size: str, demo_dir: Path, tmp_path: Path) -> None:
    report = moeq.quantize(demo_dir, tmp_path / "out", size=size, dense_bits="8", quantizer="minmax", device="cpu")
    wanted = int(float(size[:-2]) * {"KB": 1e3, "MB": 1e6}[size[-2:]])
    assert 0.98 * wanted < report.directory_bytes <= wanted


def test_every_tensor_has_one_place(tiny_dir: Path) -> None:
    setup = draft(tiny_dir, Recipe(bits=5, dense_bits="8"))
    names = [tensor.name for shard in setup.shards for tensor in shard.tensors]
    assert len(names) == len(set(names))
    copied = {tensor.name for shard in setup.shards if shard.layer is None for tensor in shard.tensors}
    replaced = shards.consumed(setup.inventory, setup.plan)
    assert copied == set(setup.headers) - replaced
    assert replaced <= set(setup.headers)
    packed = {name.rpartition(".")[0] for name in set(names) - copied}
    assert packed == {layer.path for layer in setup.inventory.layers} | set(setup.plan.dense)
    assert [shard.layer for shard in setup.shards] == [0, 1, 2, None]
    assert setup.shards[0].file == "model-00001-of-00004.safetensors"


def test_blobs_are_aligned_in_the_file(packed_tiny: Path) -> None:
    headers = read_headers(packed_tiny)
    blobs = [info for name, info in headers.items() if name.endswith(".moeq_data")]
    assert len(blobs) > 3
    assert all(info.start % ALIGN == 0 for info in blobs)
    index = json.loads((packed_tiny / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(headers)
    assert index["metadata"]["total_size"] == sum(info.stop - info.start for info in headers.values())


def test_copied_tensors_are_spread_over_files(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "COPY_SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    report = moeq.quantize(tiny_dir, out, bits=5, group_size=32, quantizer="minmax", device="cpu")
    assert report.verified.logits_finite
    sizes = [path.stat().st_size for path in sorted(out.glob("*.safetensors"))[3:]]
    assert len(sizes) > 2
    assert all(size < 20_000 + 5_000 for size in sizes)


def test_a_source_in_several_files_gives_the_same_shards(tiny_dir: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_dir, tmp_path / "source")
    split(source)
    one, two = (draft(directory, Recipe(bits=5, dense_bits="8")) for directory in (tiny_dir, source))
    assert [shard.size for shard in one.shards[:3]] == [shard.size for shard in two.shards[:3]]
    assert one.sizes == two.sizes
    assert one.plan.experts == two.plan.experts

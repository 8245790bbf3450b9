import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from moeq.checkpoint.identity import fingerprint, model_hash
from moeq.checkpoint.read import read_headers
from moeq.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    torch.manual_seed(0)
    save_file({"a": torch.randn(300, 1000), "b": torch.randn(7).bfloat16()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"hidden_size": 4, "text": {"_name_or_path": "x", "n": 1}}))
    return directory


def identity(directory):
    return model_hash(directory, read_headers(directory))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_fingerprint_sees_every_kind_of_change(checkpoint):
    before = fingerprint(checkpoint)
    assert list(before) == ["config.json", "model.safetensors"]
    path = checkpoint / "model.safetensors"
    assert before == fingerprint(checkpoint)
    assert before["model.safetensors"].size == path.stat().st_size
    times = path.stat().st_mtime_ns

    flip(path, -1)
    os.utime(path, ns=(times, times))
    after = fingerprint(checkpoint)["model.safetensors"]
    assert after.sample_sha256 != before["model.safetensors"].sample_sha256
    assert after.header_sha256 == before["model.safetensors"].header_sha256
    flip(path, -1)
    os.utime(path, ns=(times, times))
    assert before == fingerprint(checkpoint)
    os.utime(path, ns=(times, times + 1))
    assert before != fingerprint(checkpoint)


def test_fingerprint_covers_the_index(checkpoint):
    os.rename(checkpoint / "model.safetensors", checkpoint / "shard.safetensors")
    index = {"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(fingerprint(checkpoint)) == ["config.json", "model.safetensors.index.json", "shard.safetensors"]


def test_model_hash_ignores_place_time_and_volatile_keys(checkpoint, tmp_path):
    before = identity(checkpoint)
    other = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, other)
    os.utime(other / "model.safetensors", ns=(1, 1))
    config = {
        "text": {"n": 1, "_name_or_path": "y"},
        "hidden_size": 4,
        "transformers_version": "9",
        "_commit_hash": "z",
    }
    (other / "config.json").write_text(json.dumps(config, indent=4))
    (other / "README.md").touch()
    assert identity(other) == before
    assert len(before) == 64


@pytest.mark.parametrize("position", [-1, 0])
def test_model_hash_sees_the_weights(checkpoint, position):
    before = identity(checkpoint)
    start = min(info.start for info in read_headers(checkpoint).values())
    flip(checkpoint / "model.safetensors", -1 if position else start)
    assert identity(checkpoint) != before


def test_model_hash_sees_config_names_and_dtypes(checkpoint):
    seen = {identity(checkpoint)}
    (checkpoint / "config.json").write_text('{"hidden_size": 5}')
    seen.add(identity(checkpoint))
    zeros = torch.zeros(8)
    for tensors in ({"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 4)}, {"a": zeros.int()}):
        save_file(tensors, checkpoint / "model.safetensors")
        seen.add(identity(checkpoint))
    assert len(seen) == 6


def test_config_absent_or_broken(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        identity(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        identity(checkpoint)

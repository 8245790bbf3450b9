import errno
import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moeq.checkpoint import write
from moeq.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from moeq.checkpoint.header import scan
from moeq.checkpoint.read import Reader, read_headers
from moeq.checkpoint.write import (
    FileDigest,
    ShardWriter,
    copy_sidecars,
    hash_file,
    header_bytes,
    write_file_atomic,
    write_index,
)
from moeq.errors import CheckpointError, HeaderError, StorageError

LIBRARY_DTYPES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "F8_E4M3", "F8_E5M2")
DECLARED = [("a", "BF16", (3, 5)), ("b", "U8", (7,)), ("c", "F32", ())]


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"a": torch.randn(3, 5).bfloat16(), "b": torch.randint(0, 256, (7,)).byte(), "c": torch.randn(())}


def save(path):
    with ShardWriter(path, DECLARED) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda s: s != "__metadata__")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(names, st.sampled_from(LIBRARY_DTYPES), shapes), unique_by=lambda t: t[0], max_size=6))
def test_the_library_reads_what_we_write_and_so_do_we(tmp_path_factory, declared):
    directory = tmp_path_factory.getbasetemp() / "round-trip"
    directory.mkdir(exist_ok=True)
    path = directory / "model.safetensors"
    made = {name: torch.randint(0, 2, shape).to(TORCH_DTYPES[dtype]) for name, dtype, shape in declared}
    writer = ShardWriter(path, declared)
    for name, tensor in made.items():
        writer.write(name, tensor)
    digest = writer.close()
    size = header_bytes(declared) + sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    assert digest == hash_file(path) == FileDigest(bytes=size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert scan(path).data_start == header_bytes(declared)
    with safe_open(path, "pt") as file, Reader(directory) as reader:
        assert set(file.keys()) == set(made) == set(reader.headers)
        for name, tensor in made.items():
            for got in (file.get_tensor(name), reader.tensor(name)):
                assert got.dtype == tensor.dtype
                assert torch.equal(got.double(), tensor.double())


def test_the_data_section_is_aligned(tmp_path):
    for length in range(1, 80):
        assert header_bytes([("x" * length, "U8", (1,))]) % 64 == 0
    save(tmp_path / "model.safetensors")
    header = scan(tmp_path / "model.safetensors")
    assert header.data_start == header_bytes(DECLARED)
    assert header.data_start % 64 == 0
    assert header.metadata == {"format": "pt"}


def test_bytes_chunks_and_strided_tensors(tmp_path):
    w = torch.arange(15, dtype=torch.int16).view(3, 5)
    raw = w.numpy().tobytes()
    with ShardWriter(tmp_path / "model.safetensors", [(name, "I16", (5, 3)) for name in "abcde"]) as writer:
        writer.write("a", w.t())
        writer.write("b", raw)
        writer.write("c", memoryview(raw))
        writer.write("d", bytearray(raw))
        writer.write("e", (raw[i : i + 7] for i in range(0, len(raw), 7)))
    with Reader(tmp_path) as reader:
        assert torch.equal(reader.tensor("a"), w.t())
        assert all(bytes(reader.raw(name)) == raw for name in "bcde")


def test_same_input_same_bytes(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "b")
    assert hash_file(tmp_path / "a") == hash_file(tmp_path / "b")


def test_nothing_is_seen_before_close(tmp_path):
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(path, DECLARED)
    assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [".model.safetensors.partial"]
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HeaderError, match="closed"):
        writer.write("a", b"")
    with pytest.raises(HeaderError, match="closed"):
        writer.close()


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fails_half_way():
        with ShardWriter(path, DECLARED) as writer:
            writer.write("a", tensors()["a"])
            raise KeyError

    with pytest.raises(KeyError):
        fails_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_run_are_overwritten(tmp_path):
    (tmp_path / ".model.safetensors.partial").write_bytes(bytes(10_000))
    save(tmp_path / "model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(read_headers(tmp_path)) == {"a", "b", "c"}


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".x.partial").symlink_to(victim)
    with pytest.raises(StorageError):
        write_file_atomic(tmp_path / "x", b"new")
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("b", tensors()["b"], "a is due"),
        ("a", tensors()["a"].half(), "float16"),
        ("a", tensors()["a"].t(), r"\[5, 3\]"),
        ("a", bytes(29), "1 bytes of the declared size are missing"),
        ("a", bytes(31), "1 bytes more"),
        ("a", [bytes(10), bytes(19)], "missing"),
        ("a", [bytes(30), bytes(1)], "more"),
    ],
)
def test_what_was_not_declared(tmp_path, name, data, message):
    writer = ShardWriter(tmp_path / "x", DECLARED)
    with pytest.raises(HeaderError, match=message) as caught:
        writer.write(name, data)
    assert caught.value.tensor == name
    assert list(tmp_path.iterdir()) == []


def test_one_too_many_and_one_too_few(tmp_path):
    writer = ShardWriter(tmp_path / "x", DECLARED[1:2])
    writer.write("b", bytes(7))
    with pytest.raises(HeaderError, match="nothing is due"):
        writer.write("c", bytes(4))
    writer = ShardWriter(tmp_path / "x", DECLARED)
    writer.write("a", bytes(30))
    with pytest.raises(HeaderError, match="not written") as caught:
        writer.close()
    assert caught.value.tensor == "b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "declared",
    [
        [("a", "U8", (1,)), ("a", "U8", (1,))],
        [("__metadata__", "U8", (1,))],
        [("a", "Q4", (1,))],
        [("a", "F4", (1,))],
        [("a", "U8", (-1,))],
        [("\ud800", "U8", (1,))],
        [("a", "U8", (2**40, 2**40))],
    ],
)
def test_declarations_that_cannot_be_stored(tmp_path, declared):
    with pytest.raises(HeaderError):
        ShardWriter(tmp_path / "x", declared)
    with pytest.raises(HeaderError):
        header_bytes(declared)
    assert list(tmp_path.iterdir()) == []


def test_every_torch_dtype_has_one_name():
    assert len(DTYPE_NAMES) == len(TORCH_DTYPES)
    assert all(TORCH_DTYPES[name] == dtype for dtype, name in DTYPE_NAMES.items())


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "free 41 bytes"), (errno.EDQUOT, "disk is full"), (errno.EIO, "check the disk")],
)
def test_a_full_disk(tmp_path, monkeypatch, code, message):
    writer = ShardWriter(tmp_path / "x", DECLARED)  # 30 + 7 + 4 bytes are to come

    def refuse(file, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write.os, "write", refuse)
    with pytest.raises(StorageError, match=message) as caught:
        writer.write("a", tensors()["a"])
    assert caught.value.file == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="free 3 bytes" if code == errno.ENOSPC else message):
        write_file_atomic(tmp_path / "y", b"new")
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr(write.os, "write", lambda file, data: whole(file, data[:3]))
    save(tmp_path / "model.safetensors")
    with Reader(tmp_path) as reader:
        assert torch.equal(reader.tensor("a"), tensors()["a"])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, step):
    def refuse(*args):
        raise OSError(errno.EIO, "Input/output error")

    writer = ShardWriter(tmp_path / "x", [])
    if step == "fsync":
        monkeypatch.setattr(write.os, "fsync", refuse)
    else:
        monkeypatch.setattr(write.Path, "replace", refuse)
    with pytest.raises(StorageError, match="Input/output"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(write.os, "open", refuse)
    with pytest.raises(StorageError, match="choose an output directory") as caught:
        ShardWriter(tmp_path / "x", DECLARED)
    assert caught.value.file == str(tmp_path / "x")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")
def test_a_really_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        writer = ShardWriter(tmp_path / "x", [("a", "U8", (10**6,))])
        with pytest.raises(StorageError, match=r"full.*free \d+ bytes"):
            writer.write("a", bytes(10**6))
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_index(tmp_path):
    save(tmp_path / "one.safetensors")
    digest = write_index(tmp_path, dict.fromkeys("cab", "one.safetensors"), 41)
    assert digest == hash_file(tmp_path / "model.safetensors.index.json")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 41}
    assert list(index["weight_map"]) == ["a", "b", "c"]
    assert set(read_headers(tmp_path)) == {"a", "b", "c"}


def test_sidecars(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    wanted = [
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_x.py",
        "sub/code.py",
        "sub/README.md",
        "sub/config.json",
    ]
    unwanted = [
        "model.safetensors", "sub/x.safetensors", "a.bin", "a.index.json", "config.json", "README.md", ".gitattributes",
        ".cache/tokenizer.json", "sub/.hidden", "original/consolidated.00.pth", "x.gguf", "skipped.txt", "sub/skipped",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    copied = copy_sidecars(source, out, skip=["skipped.txt", "sub/skipped"])
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(files) == sorted(wanted)
    assert all((out / name).read_text() == name for name in wanted)
    assert all(copied[name] == hash_file(out / name) for name in wanted)
    assert copy_sidecars(source, out, skip=["skipped.txt", "sub/skipped"]) == copied


def test_sidecars_when_the_output_lies_inside_the_source(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out"
    out.mkdir()
    assert list(copy_sidecars(tmp_path, out)) == list(copy_sidecars(tmp_path, out)) == ["a.txt"]


def test_links_do_not_lead_out(tmp_path):
    source, out, secret = tmp_path / "source", tmp_path / "out", tmp_path / "secret"
    for directory in (source, out, secret):
        directory.mkdir()
    (secret / "key").write_text("secret")
    (source / "real.txt").write_text("real")
    (source / "inside.txt").symlink_to("real.txt")
    (source / "folder").symlink_to(secret)
    assert sorted(copy_sidecars(source, out)) == ["inside.txt", "real.txt"]
    assert not (out / "inside.txt").is_symlink()
    (source / "out.txt").symlink_to(secret / "key")
    with pytest.raises(CheckpointError, match=r"leads out.*out\.txt"):
        copy_sidecars(source, out)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot, out = repo / "snapshots" / "abc", tmp_path / "out"
    for directory in (repo / "blobs", snapshot, out):
        directory.mkdir(parents=True)
    (repo / "blobs" / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    assert list(copy_sidecars(snapshot, out)) == ["tokenizer.json"]
    assert (out / "tokenizer.json").read_text() == "{}"
    (repo / "other").write_text("{}")
    (snapshot / "evil.json").symlink_to("../../other")
    with pytest.raises(CheckpointError, match="leads out"):
        copy_sidecars(snapshot, out)

import contextlib
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeq.checkpoint import header as header_module
from moeq.checkpoint.header import read_header, scan
from moeq.errors import CheckpointError, HeaderError, MissingTensorError, MoeqError


def build(entries, data=b"", raw=None, length=None):
    text = json.dumps(entries).encode() if raw is None else raw
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


GOOD = build({"__metadata__": {"format": "pt"}, "b": entry(4, 10), "a": entry(0, 4, "BF16", [2, 1])}, bytes(10))


def test_offsets_are_absolute(path):
    path.write_bytes(GOOD)
    header = scan(path)
    start = len(GOOD) - 10
    assert header.metadata == {"format": "pt"}
    assert header.data_start == start
    assert header.tensors["a"].shape == (2, 1)
    assert header.tensors["a"].dtype == "BF16"
    assert (header.tensors["a"].start, header.tensors["a"].stop) == (start, start + 4)
    assert (header.tensors["b"].start, header.tensors["b"].stop) == (start + 4, start + 10)
    assert header.tensors["b"].file == "model.safetensors"


def test_empty_and_scalar_tensors_are_fine(path):
    path.write_bytes(build({"e": entry(0, 0, "F32", [0, 7]), "f": entry(0, 0), "s": entry(0, 4, "F32", [])}, bytes(4)))
    assert read_header(path)["s"].shape == ()


def test_trailing_spaces_are_fine(path):
    path.write_bytes(build(None, bytes(3), raw=json.dumps({"a": entry(0, 3)}).encode() + b"   "))
    assert list(read_header(path)) == ["a"]


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE = {
    "empty file": (b"", "only 0 bytes"),
    "seven bytes": (bytes(7), "only 7 bytes"),
    "length beyond the file": (build({}, length=3), "claims 3 bytes"),
    "absurd length": (build({}, length=2**64 - 1), "claims 18446744073709551615"),
    "empty header": (build({}, raw=b""), "start with '{'"),
    "leading space": (build({}, raw=b" {}"), "start with '{'"),
    "utf-16": (build({}, raw="{}".encode("utf-16")), "start with '{'"),
    "not utf-8": (build({}, raw=b'{"\xff":1}'), "UTF-8"),
    "not json": (build({}, raw=b"{nope"), "UTF-8 JSON"),
    "json and more": (build({}, raw=b"{}{}"), "UTF-8 JSON"),
    "nul padding": (build({}, raw=b"{}\0"), "UTF-8 JSON"),
    "NaN": (build({}, raw=b'{"a":NaN}'), "NaN"),
    "huge number": (build({}, raw=b'{"a":' + b"9" * 5000 + b"}"), "UTF-8 JSON"),
    "too deep": (build({}, raw=DEEP), "too deep"),
    "lone surrogate": (build({}, raw=rb'{"\ud800":1}'), "UTF-8 JSON"),
    "tensor twice": (
        build({}, b"x", raw=b'{"a":%b,"a":%b}' % (2 * (json.dumps(entry(0, 1)).encode(),))),
        "'a' comes twice",
    ),
    "key twice": (build({}, b"x", raw=b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}'), "twice"),
    "metadata not strings": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (build({"__metadata__": []}), "__metadata__"),
    "entry a list": (build({"a": []}), "exactly the keys"),
    "missing key": (build({"a": {"dtype": "U8", "shape": [0]}}), "exactly the keys"),
    "unknown key": (build({"a": {**entry(0, 1), "x": 1}}, b"x"), "exactly the keys"),
    "unknown dtype": (build({"a": entry(0, 1, "Q4")}, b"x"), "unknown dtype 'Q4'"),
    "dtype a list": (build({"a": entry(0, 1, ["U8"])}, b"x"), "unknown dtype"),
    "negative shape": (build({"a": entry(0, 1, "U8", [-1, -1])}, b"x"), "shape"),
    "fraction in shape": (build({"a": entry(0, 1, "U8", [1.0])}, b"x"), "shape"),
    "bool in shape": (build({"a": entry(0, 1, "U8", [True])}, b"x"), "shape"),
    "shape a string": (build({"a": entry(0, 1, "U8", "1")}, b"x"), "shape"),
    "65 dimensions": (build({"a": entry(0, 1, "U8", [1] * 65)}, b"x"), "shape"),
    "shape overflows": (build({"a": entry(0, 0, "F32", [2**40, 2**40, 0])}), "2\\^63"),
    "negative offset": (build({"a": entry(-1, 0)}, b""), "data_offsets"),
    "offsets swapped": (build({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"x"), "data_offsets"),
    "three offsets": (build({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, b"x"), "data_offsets"),
    "offset a string": (build({"a": {"dtype": "U8", "shape": [1], "data_offsets": ["0", "1"]}}, b"x"), "data_offsets"),
    "size is not the shape's": (build({"a": entry(0, 4, "F32", [2])}, bytes(4)), "needs 8 bytes, the offsets span 4"),
    "half a byte": (build({"a": entry(0, 1, "F4", [1])}, b"x"), "needs None bytes"),
    "beyond the file": (build({"a": entry(0, 4)}, bytes(3)), "ends at byte"),
    "far beyond the file": (build({"a": entry(0, 2**50)}, bytes(3)), "ends at byte"),
    "overlap": (build({"a": entry(0, 3), "b": entry(2, 4)}, bytes(4)), "overlaps"),
    "same bytes twice": (build({"a": entry(0, 3), "b": entry(0, 3)}, bytes(3)), "overlaps"),
    "hole in front": (build({"a": entry(1, 3)}, bytes(3)), "hole"),
    "hole between": (build({"a": entry(0, 1), "b": entry(2, 3)}, bytes(3)), "hole"),
    "polyglot tail": (build({"a": entry(0, 3)}, bytes(3) + b"PK\x05\x06"), "4 bytes follow"),
    "tail without tensors": (build({}, b"x"), "1 bytes follow"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, path):
    content, message = HOSTILE[name]
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=message) as caught:
        read_header(path)
    assert caught.value.file == str(path)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["unknown dtype", "overlap", "size is not the shape's", "beyond the file"])
def test_names_the_tensor(name, path):
    path.write_bytes(HOSTILE[name][0])
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert caught.value.tensor == ("b" if name == "overlap" else "a")


def test_header_over_the_limit_is_not_read(path, monkeypatch):
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", 100)
    path.write_bytes(build({}, raw=b"{" + b" " * 100 + b"}"))
    with pytest.raises(HeaderError, match="allows 100"):
        read_header(path)


def test_every_truncation_is_caught(path):
    for size in range(len(GOOD)):
        path.write_bytes(GOOD[:size])
        with pytest.raises(HeaderError):
            read_header(path)


def test_absent_directory_and_pipe(tmp_path):
    with pytest.raises(MissingTensorError, match="does not exist"):
        read_header(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="regular"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="regular"):
        read_header(tmp_path / "pipe")


def test_reads_what_the_library_writes(path):
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(7, dtype=torch.uint8),
        "c": torch.zeros((), dtype=torch.int64),
        "d": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "e": torch.zeros(0, 4),
        "f": torch.zeros(3, dtype=torch.bool),
    }
    save_file(tensors, path, metadata={"k": "v"})
    header = scan(path)
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"k": "v"}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=0, max_size=4), st.integers(0, 4)), max_size=4)
)
def test_fuzz_only_typed_errors(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    content = GOOD
    for position, insert, remove in edits:
        content = content[:position] + insert + content[position + remove :]
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except MoeqError:
        return
    covered = sum(info.stop - info.start for info in tensors.values())
    assert covered + 8 + int.from_bytes(content[:8], "little") == len(content)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_fuzz_random_headers(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(build({}, raw=b"{" + raw))
    with contextlib.suppress(HeaderError):
        assert all(info.stop == info.start for info in read_header(path).values())

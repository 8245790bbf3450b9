import json
import threading

import pytest
import torch
from safetensors.torch import save_file

from moeq.checkpoint import read
from moeq.checkpoint.locate import INDEX_NAME, is_plain_name, read_index, resolve
from moeq.checkpoint.read import Reader, is_finite, read_headers
from moeq.errors import CheckpointError, HeaderError, MissingTensorError, TensorError
from moeq.model_parts import MatrixSource

E, N, K = 3, 4, 6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def save(directory, tensors, name="model.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name, {"format": "pt"})


def shard(directory, *shards, weight_map=None):
    names = [f"model-{i:05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save(directory, tensors, name)
    if weight_map is None:
        weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_headers_of_a_single_file_and_of_shards(tmp_path):
    a, b = torch.rand(2, 3), torch.rand(4)
    single, many = tmp_path / "single", tmp_path / "many"
    single.mkdir()
    many.mkdir()
    save(single, {"a": a, "b": b})
    shard(many, {"a": a}, {"b": b})
    assert set(read_headers(single)) == set(read_headers(many)) == {"a", "b"}
    for directory in (single, many):
        with Reader(directory) as reader:
            assert torch.equal(reader.tensor("a"), a)
            assert torch.equal(reader.tensor("b"), b)


def test_a_single_file_wins_over_an_index(tmp_path):
    shard(tmp_path, {"old": torch.zeros(1)})
    save(tmp_path, {"new": torch.zeros(1)})
    assert list(read_headers(tmp_path)) == ["new"]


def test_tensors_that_the_index_forgot_are_not_lost(tmp_path):
    shard(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1), "c": torch.zeros(1)})
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    del index["weight_map"]["c"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    assert set(read_headers(tmp_path)) == {"a", "b", "c"}


def test_the_index_decides_between_two_shards(tmp_path):
    names = shard(tmp_path, {"a": torch.zeros(1), "x": torch.zeros(1)}, {"b": torch.zeros(1), "x": torch.ones(1)})
    with Reader(tmp_path) as reader:
        assert reader.info("x").file == names[1]
        assert reader.tensor("x") == 1
    weight_map = {"a": names[0], "b": names[1]}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(HeaderError, match="two shards") as caught:
        read_headers(tmp_path)
    assert caught.value.tensor == "x"


def test_missing_shard(tmp_path):
    names = shard(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    (tmp_path / names[1]).unlink()
    with pytest.raises(MissingTensorError, match=names[1]):
        read_headers(tmp_path)


def test_stale_entries_of_an_index_are_no_tensors(tmp_path):
    """Tied heads and scales of an earlier format stay in many an index; what the model needs is proven elsewhere."""
    shard(tmp_path, {"a": torch.zeros(1)}, weight_map={"a": "model-00000.safetensors", "z": "model-00000.safetensors"})
    assert set(read_headers(tmp_path)) == {"a"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": '],
)
def test_malformed_index(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(HeaderError):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", "x" * 256, "\ud800"]
)
def test_index_cannot_leave_the_directory(tmp_path, name):
    assert not is_plain_name(name)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(HeaderError):
        read_index(tmp_path / INDEX_NAME)


def test_no_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="convert to safetensors"):
        read_headers(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_headers(tmp_path / "no")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensor_and_raw_of_every_dtype(tmp_path, dtype):
    tensor = torch.randint(0, 2, (5, 3)).to(dtype)
    scalar = torch.ones(()).to(dtype)
    save(tmp_path, {"t": tensor, "s": scalar, "e": torch.empty(0, 2, dtype=dtype)})
    with Reader(tmp_path) as reader:
        got = reader.tensor("t")
        assert got.dtype == dtype
        assert torch.equal(got.to(torch.float64), tensor.to(torch.float64))
        assert reader.tensor("s").shape == ()
        assert reader.tensor("e").shape == (0, 2)
        raw = reader.raw("t")
        assert raw.readonly
        assert bytes(raw) == tensor.view(torch.uint8).numpy().tobytes()
        assert b"".join(reader.chunks("t", 4)) == bytes(raw)
        assert bytes(reader.raw("e")) == b""
        assert list(reader.chunks("e")) == []


def test_sub_byte_dtypes_can_be_copied_but_not_computed_with(tmp_path):
    text = b'{"a":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"xy")
    with Reader(tmp_path) as reader:
        assert bytes(reader.raw("a")) == b"xy"
        with pytest.raises(TensorError, match="F4"):
            reader.tensor("a")


def test_unknown_tensor_and_closed_reader(tmp_path):
    save(tmp_path, {"a": torch.zeros(1)})
    reader = Reader(tmp_path)
    with pytest.raises(MissingTensorError):
        reader.tensor("b")
    reader.close()
    with pytest.raises(CheckpointError, match="closed"):
        reader.tensor("a")


def test_a_file_that_shrinks_is_an_error(tmp_path):
    save(tmp_path, {"a": torch.zeros(1000)})
    with Reader(tmp_path) as reader:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(HeaderError, match="shorter"):
            reader.tensor("a")


def test_a_file_that_goes_away_is_an_error(tmp_path):
    save(tmp_path, {"a": torch.zeros(10)})
    with Reader(tmp_path) as reader:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            reader.tensor("a")


def test_threads_share_a_reader(tmp_path):
    tensors = {f"t{i}": torch.full((500, 40), float(i)) for i in range(12)}
    save(tmp_path, tensors)
    wrong = []

    def work(start):
        for i in range(60):
            name = f"t{(i * 5 + start) % 12}"
            if not torch.equal(reader.tensor(name), tensors[name]):
                wrong.append(name)

    with Reader(tmp_path) as reader:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def sources():
    """name -> (tensors on disk, gate source, up source, per-expert gate and up)."""
    torch.manual_seed(0)
    gate, up = torch.randn(E, N, K), torch.randn(E, N, K)
    fused = torch.cat([gate, up], 1)
    alternating = torch.stack([gate, up], 2).view(E, 2 * N, K)
    single = {f"e.{i + 1}.w1": gate[i] for i in range(E)} | {f"e.{i + 1}.w3": up[i] for i in range(E)}
    flipped = {f"e.{i}.g": gate[i].t() for i in range(E)} | {f"e.{i}.u": up[i].t() for i in range(E)}
    first, second = {"start": 0, "step": 2}, {"start": 1, "step": 2}

    def pair(name, stacked, one, two, **both):
        return MatrixSource(name=name, stacked=stacked, **both, **one), MatrixSource(
            name=name, stacked=stacked, **both, **two
        )

    return (
        gate,
        up,
        {
            "per expert, counted from 1": (
                single,
                MatrixSource(name="e.{expert}.w1", stacked=False, expert_offset=1),
                MatrixSource(name="e.{expert}.w3", stacked=False, expert_offset=1),
            ),
            "per expert, transposed": (
                flipped,
                MatrixSource(name="e.{expert}.g", stacked=False, transposed=True),
                MatrixSource(name="e.{expert}.u", stacked=False, transposed=True),
            ),
            "stacked, fused": ({"w": fused}, *pair("w", True, {}, {"start": N})),
            "stacked, alternating": ({"w": alternating}, *pair("w", True, first, second)),
            "stacked, transposed, fused": ({"w": fused.mT}, *pair("w", True, {}, {"start": N}, transposed=True)),
            "stacked, transposed, alternating": (
                {"w": alternating.mT},
                *pair("w", True, first, second, transposed=True),
            ),
            "stacked, other experts in front": (
                {"w": torch.cat([torch.full((2, 2 * N, K), float("nan")), fused])},
                *pair("w", True, {}, {"start": N}, expert_offset=2),
            ),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sources()[2])
def test_matrix(tmp_path, kind, dtype):
    gate, up, kinds = sources()
    tensors, *pair = kinds[kind]
    save(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    with Reader(tmp_path) as reader:
        for source, truth in zip(pair, (gate, up), strict=True):
            for expert in range(E):
                got = reader.matrix(source, expert, (N, K))
                assert got.is_contiguous()
                assert got.dtype == dtype
                assert torch.equal(got, truth[expert].to(dtype))


def test_matrix_reads_only_its_rows(tmp_path, monkeypatch):
    save(tmp_path, {"w": torch.randn(E, 2 * N, K)})
    counted = []
    preadv = read.os.preadv
    monkeypatch.setattr(read.os, "preadv", lambda *args: counted.append(preadv(*args)) or counted[-1])
    with Reader(tmp_path) as reader:
        reader.matrix(MatrixSource(name="w", stacked=True, start=N), 1, (N, K))
    assert counted == [N * K * 4]


@pytest.mark.parametrize(
    ("source", "expert", "shape", "message"),
    [
        ({"name": "w", "stacked": True}, E, (N, K), "expert 3 of 3"),
        ({"name": "w", "stacked": True, "expert_offset": -1}, 0, (N, K), "expert -1 of 3"),
        ({"name": "w", "stacked": True}, 0, (N, K + 1), "cannot hold a 4 x 7"),
        ({"name": "w", "stacked": True}, 0, (2 * N + 1, K), "cannot hold"),
        ({"name": "w", "stacked": True, "start": N + 1}, 0, (N, K), "cannot hold"),
        ({"name": "w", "stacked": True, "start": 2, "step": 2}, 0, (N, K), "cannot hold"),
        ({"name": "w", "stacked": True, "transposed": True}, 0, (N, K), "cannot hold"),
        ({"name": "w", "stacked": False}, 0, (N, K), "should have 2 dimensions"),
        ({"name": "flat", "stacked": True}, 0, (N, K), "should have 3 dimensions"),
        ({"name": "int", "stacked": False}, 0, (N, K), "dtype I8"),
        ({"name": "w", "stacked": True}, 0, (0, K), "cannot hold"),
    ],
)
def test_matrix_checks_what_it_finds(tmp_path, source, expert, shape, message):
    tensors = {"w": torch.randn(E, 2 * N, K), "flat": torch.randn(N, K), "int": torch.ones(N, K, dtype=torch.int8)}
    save(tmp_path, tensors)
    with Reader(tmp_path) as reader, pytest.raises(TensorError, match=message) as caught:
        reader.matrix(MatrixSource(**source), expert, shape)
    assert caught.value.tensor == source["name"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_that_is_not_finite(tmp_path, bad, dtype):
    w = torch.randn(E, N, K)
    w[1, 2, 3] = bad
    save(tmp_path, {"w": w.to(dtype)})
    source = MatrixSource(name="w", stacked=True)
    with Reader(tmp_path) as reader:
        assert is_finite(reader.matrix(source, 0, (N, K)))
        with pytest.raises(TensorError, match="expert 1 hold NaN") as caught:
            reader.matrix(source, 1, (N, K))
        assert caught.value.tensor == "w"
        assert not is_finite(reader.matrix(source, 1, (N, K), check_finite=False))


def resident():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    count, shape = 24, (1, 4096, 1024)  # 24 experts of 16 MiB
    text = json.dumps(
        {"w": {"dtype": "F32", "shape": [count, *shape[1:]], "data_offsets": [0, count * 2**24]}}
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + count * 2**24)  # a sparse file: reads as zeros, takes no disk
    source = MatrixSource(name="w", stacked=True)
    with Reader(tmp_path) as reader:
        before = resident()
        for expert in range(count):
            reader.matrix(source, expert, shape[1:])
        assert sum(len(chunk) for chunk in reader.chunks("w")) == count * 2**24
        assert resident() - before < 5 * 2**24


def test_resolve_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert resolve(tmp_path) == tmp_path
    assert str(resolve("org/name")) == "org/name"
    for model in ("nowhere", "./org/other", "a/b/c", "/org/other", tmp_path / "no", "new/"):
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve(model)
    with pytest.raises(CheckpointError, match="this is a file"):
        resolve(tmp_path / "file")


def test_resolve_a_hub_id(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(model, **options):
        asked.append((model, options["local_files_only"]))
        if model == "org/private":
            raise OSError("401 denied\nlong story")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("org/model-1.5") == tmp_path
    assert resolve("org/model-1.5", local_files_only=True) == tmp_path
    assert asked == [("org/model-1.5", False), ("org/model-1.5", True)]
    with pytest.raises(CheckpointError, match="401 denied") as caught:
        resolve("org/private")
    assert "long story" not in str(caught.value)

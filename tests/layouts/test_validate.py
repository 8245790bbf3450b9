import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq.checkpoint.write import ShardWriter, hash_file, write_file_atomic, write_index
from moeq.errors import ArtifactError, CheckpointError, HeaderError, MissingTensorError, MoeqError, PackedError
from moeq.format.manifest import MANIFEST_NAME, Manifest, PackedLayer, PackedLinear, read_manifest, write_manifest
from moeq.format.records import pack_matrix
from moeq.layouts.grouped.stored import build_table
from moeq.layouts.validate import validate_packed, verify_files
from moeq.spec import QuantSpec, num_groups

PATH, LINEAR = "model.layers.0.mlp.experts", "model.layers.0.attn.q"
SHAPES = {"gate": (8, 20), "up": (8, 20), "down": (20, 8)}
SPECS = (
    (QuantSpec(bits=2), QuantSpec(bits=3, group_size=32), QuantSpec(bits=8, levels="sym")),
    (QuantSpec(bits=1, levels="trellis"), QuantSpec(bits=4, levels="asym16"), QuantSpec(bits=6, levels="half")),
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def pack(spec, shape):
    grid = shape[0], num_groups(shape[1], spec.group_size)
    zero = {"asym": torch.zeros(grid).byte(), "asym16": torch.zeros(grid).half()}.get(spec.levels)
    return pack_matrix(torch.randint(0, 2**spec.bits, shape).byte(), torch.ones(grid).half(), zero, spec)


def blob(specs, shapes):
    return torch.cat([pack(spec, shape) for expert in specs for spec, shape in zip(expert, shapes, strict=True)])


def contents():
    torch.manual_seed(0)
    dense = ((QuantSpec(bits=4),),)
    return {
        f"{PATH}.moeq_data": blob(SPECS, tuple(SHAPES.values())),
        f"{PATH}.moeq_table": build_table(SPECS, tuple(SHAPES.values())),
        f"{LINEAR}.moeq_data": blob(dense, ((16, 20),)),
        f"{LINEAR}.moeq_table": build_table(dense, ((16, 20),)),
        "norm.weight": torch.ones(20).bfloat16(),
    }


MANIFEST = Manifest(
    moeq_version="0.1.0",
    method="uniform",
    plan_hash="p",
    model_hash="m",
    files={},
    layers=(PackedLayer(path=PATH, num_experts=2, projections=("gate", "up", "down"), shapes=SHAPES),),
    dense=(PackedLinear(path=LINEAR, shape=(16, 20)),),
)


def write_packed(directory, tensors=None, manifest=MANIFEST):
    """A small packed checkpoint; its manifest lists what is on disk, so that only `tensors` can be wrong."""
    directory.mkdir(exist_ok=True)
    tensors = contents() if tensors is None else tensors
    names = {torch.uint8: "U8", torch.int64: "I64", torch.bfloat16: "BF16", torch.int32: "I32"}
    weight_map = {name: SHARDS[name.startswith(LINEAR)] for name in tensors}
    for shard in SHARDS:
        chosen = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        declared = [(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in chosen.items()]
        with ShardWriter(directory / shard, declared) as writer:
            for name, tensor in chosen.items():
                writer.write(name, tensor)
    write_index(directory, weight_map, 0)
    write_file_atomic(directory / "config.json", b"{}\n")
    return relist(directory, manifest)


def relist(directory, manifest=MANIFEST):
    files = {path.name: hash_file(path) for path in directory.iterdir() if path.name != MANIFEST_NAME}
    write_manifest(directory, replace(manifest, files=files))
    return directory


def check(directory):
    verify_files(directory, validate_packed(directory))


@pytest.fixture
def packed(tmp_path):
    return write_packed(tmp_path / "packed")


def test_a_good_one(packed):
    manifest = validate_packed(packed)
    assert manifest.layers == MANIFEST.layers
    assert set(manifest.files) == {*SHARDS, "config.json", "model.safetensors.index.json"}
    check(packed)


def test_not_packed_at_all(tmp_path):
    with pytest.raises(PackedError, match="not a packed checkpoint"):
        validate_packed(tmp_path)


@pytest.mark.parametrize("name", [*SHARDS, "config.json", "model.safetensors.index.json"])
def test_every_file_is_guarded(packed, name):
    path = packed / name
    good = path.read_bytes()
    for damaged, message in ((good[:-1], "bytes, the manifest says"), (good + b" ", "bytes, the manifest says")):
        path.write_bytes(damaged)
        with pytest.raises(PackedError, match=message) as caught:
            validate_packed(packed)
        assert caught.value.file == str(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(PackedError, match="sha256") as caught:
        verify_files(packed, read_manifest(packed))
    assert caught.value.file == str(path)
    path.unlink()
    for test in (validate_packed, check, lambda directory: verify_files(directory, read_manifest(directory))):
        with pytest.raises(PackedError, match="cannot be opened"):
            test(packed)
    path.mkdir()
    with pytest.raises(PackedError, match="not a regular file"):
        validate_packed(packed)


@pytest.mark.parametrize(
    ("change", "message", "tensor"),
    [
        (lambda t: t.pop(f"{PATH}.moeq_data"), "missing", f"{PATH}.moeq_data"),
        (lambda t: t.pop(f"{LINEAR}.moeq_table"), "missing", f"{LINEAR}.moeq_table"),
        (lambda t: t.update({"x.moeq_data": t[f"{PATH}.moeq_data"]}), "does not know", "x.moeq_data"),
        (lambda t: t.update({"x.moeq_table": t[f"{PATH}.moeq_table"]}), "does not know", "x.moeq_table"),
        (lambda t: t.update({f"{PATH}.moeq_data": t[f"{PATH}.moeq_data"][:-64]}), "records take", f"{PATH}.moeq_table"),
        (lambda t: t.update({f"{PATH}.moeq_data": t[f"{PATH}.moeq_data"][None]}), "not U8 with 1", f"{PATH}.moeq_data"),
        (lambda t: t.update({f"{PATH}.moeq_data": torch.zeros(9).int()}), "not U8", f"{PATH}.moeq_data"),
        (lambda t: t.update({f"{PATH}.moeq_table": t[f"{PATH}.moeq_table"].int()}), "not I64", f"{PATH}.moeq_table"),
        (lambda t: t.update({f"{PATH}.moeq_table": t[f"{PATH}.moeq_table"][:1]}), "2 experts", f"{PATH}.moeq_table"),
        (lambda t: t.update({f"{PATH}.moeq_table": t[f"{PATH}.moeq_table"][:, :2]}), "3 matr", f"{PATH}.moeq_table"),
        (lambda t: t[f"{PATH}.moeq_table"][1, 1, 0].fill_(0), "start at byte 0", f"{PATH}.moeq_table"),
        (lambda t: t[f"{LINEAR}.moeq_table"][0, 0, 1].fill_(7), "illegal spec", f"{LINEAR}.moeq_table"),
    ],
)
def test_tensors_that_contradict_the_manifest(tmp_path, change, message, tensor):
    tensors = contents()
    change(tensors)
    directory = write_packed(tmp_path / "packed", tensors)
    with pytest.raises(PackedError, match=message) as caught:
        validate_packed(directory)
    assert caught.value.tensor == tensor


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"num_experts": 3}, "3 experts"),
        ({"shapes": {**SHAPES, "down": (20, 800)}}, "start at byte"),
        ({"projections": ("up", "down"), "shapes": {"up": (8, 20), "down": (20, 8)}}, "with 2 matrices"),
        ({"path": "elsewhere"}, "does not know"),
    ],
)
def test_a_manifest_that_contradicts_the_tensors(packed, layer, message):
    relist(packed, replace(MANIFEST, layers=(replace(MANIFEST.layers[0], **layer),)))
    with pytest.raises(PackedError, match=message):
        validate_packed(packed)


def test_a_shard_that_the_manifest_does_not_list(packed):
    manifest = read_manifest(packed)
    files = {name: digest for name, digest in manifest.files.items() if name != SHARDS[1]}
    write_manifest(packed, replace(manifest, files=files))
    with pytest.raises(PackedError, match="does not list") as caught:
        validate_packed(packed)
    assert caught.value.file == str(packed / SHARDS[1])


def test_a_planted_single_file_is_not_loaded(packed):
    shutil.copy(packed / SHARDS[0], packed / "model.safetensors")
    with pytest.raises(PackedError, match="does not list"):
        validate_packed(packed)


def test_broken_headers_and_index(packed):
    (packed / SHARDS[0]).write_bytes(b"\xff" * 100)
    relist(packed)
    with pytest.raises(HeaderError):
        validate_packed(packed)
    (packed / SHARDS[0]).unlink()
    relist(packed)
    with pytest.raises(MissingTensorError):
        validate_packed(packed)
    (packed / "model.safetensors.index.json").write_text("{}")
    relist(packed)
    with pytest.raises(CheckpointError):
        validate_packed(packed)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    directory = write_packed(tmp_path_factory.mktemp("golden"))
    return directory, {path.name: path.read_bytes() for path in directory.iterdir()}


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=3
)


def edit(content, changes):
    for where, remove, insert in changes:
        at = int(where * len(content))
        content = content[:at] + insert + content[at + remove :]
    return content


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([*SHARDS, "config.json", "model.safetensors.index.json"]), edits)
def test_fuzz_no_damaged_file_passes(golden, name, changes):
    directory, files = golden
    damaged = edit(files[name], changes)
    (directory / name).write_bytes(damaged)
    try:
        if damaged == files[name]:
            check(directory)
        else:
            with pytest.raises(MoeqError):
                check(directory)
            with pytest.raises(PackedError) as caught:
                verify_files(directory, read_manifest(directory))
            assert Path(str(caught.value.file)).name == name
    finally:
        (directory / name).write_bytes(files[name])


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(SHARDS), edits)
def test_fuzz_headers_and_tables_of_a_listed_file(golden, name, changes):
    """Even when the manifest agrees with the damage, `validate_packed` either proves the structure or says no."""
    directory, files = golden
    (directory / name).write_bytes(edit(files[name], changes))
    relist(directory)
    try:
        manifest = validate_packed(directory)
    except (PackedError, CheckpointError):
        return
    finally:
        for each, content in files.items():
            (directory / each).write_bytes(content)
    assert manifest.layers == MANIFEST.layers


@settings(deadline=None, max_examples=150)
@given(edits)
def test_fuzz_the_manifest(golden, changes):
    directory, files = golden
    good = read_manifest(directory)
    (directory / MANIFEST_NAME).write_bytes(edit(files[MANIFEST_NAME], changes))
    try:
        manifest = validate_packed(directory)
    except (PackedError, ArtifactError, CheckpointError):
        return
    finally:
        (directory / MANIFEST_NAME).write_bytes(files[MANIFEST_NAME])
    assert manifest == good

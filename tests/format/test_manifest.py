from dataclasses import replace

import pytest

from moeq.checkpoint.write import FileDigest
from moeq.errors import ArtifactError, PackedError, VersionError
from moeq.format.manifest import MANIFEST_NAME, Manifest, PackedLayer, PackedLinear, read_manifest, write_manifest

SHAPES = {"gate": (4, 6), "up": (4, 6), "down": (6, 4)}
LAYER = PackedLayer(path="m.experts", num_experts=2, projections=("gate", "up", "down"), shapes=SHAPES)
DIGEST = FileDigest(bytes=3, sha256="0" * 64)
MANIFEST = Manifest(
    moeq_version="0.1.0",
    method="uniform",
    plan_hash="p",
    model_hash="m",
    files={"config.json": DIGEST, "sub/code.py": DIGEST},
    layers=(LAYER,),
    dense=(PackedLinear(path="m.q", shape=(4, 4)),),
    recipe={"bits": 3, "groups": [32, None]},
)


def test_round_trip(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    got = read_manifest(tmp_path)
    assert got == MANIFEST
    assert got.hash == MANIFEST.hash
    assert got.layers[0].ordered_shapes == ((4, 6), (4, 6), (6, 4))
    assert (tmp_path / MANIFEST_NAME).read_bytes().endswith(b"}\n")


def test_a_plain_expert_has_no_gate(tmp_path):
    layer = replace(LAYER, projections=("up", "down"), shapes={"up": (4, 6), "down": (6, 4)})
    write_manifest(tmp_path, replace(MANIFEST, layers=(layer,)))
    assert read_manifest(tmp_path).layers[0].ordered_shapes == ((4, 6), (6, 4))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (), "dense": ()},
        {"layers": (LAYER, LAYER)},
        {"dense": (PackedLinear(path="m.experts", shape=(1, 1)),)},
        {"dense": (PackedLinear(path="m.q", shape=(0, 1)),)},
        {"dense": (PackedLinear(path="m.q", shape=(1, 2**31)),)},
        {"layers": (replace(LAYER, num_experts=0),)},
        {"layers": (replace(LAYER, projections=("up", "gate", "down")),)},
        {"layers": (replace(LAYER, projections=("gate", "up")),)},
        {"layers": (replace(LAYER, shapes={**SHAPES, "router": (1, 1)}),)},
        {"layers": (replace(LAYER, projections=(), shapes={}),)},
        {"layers": (replace(LAYER, shapes={**SHAPES, "up": (-4, 6)}),)},
        {"files": {"config.json": replace(DIGEST, bytes=-1)}},
        {"files": {"config.json": replace(DIGEST, sha256="0" * 63)}},
        {"files": {"config.json": replace(DIGEST, sha256="G" * 64)}},
    ],
)
def test_contradictions(tmp_path, changes):
    with pytest.raises(ArtifactError):
        write_manifest(tmp_path, replace(MANIFEST, **changes))
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/../x", "./a", "a//b", "a/", "a\\b", "C:a", "a\0", "\ud800", "moeq.json"]
)
def test_files_stay_inside(tmp_path, name):
    with pytest.raises(ArtifactError):
        write_manifest(tmp_path, replace(MANIFEST, files={name: DIGEST}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"uniform"', '"pmq"'),
        ("[4,6]", "[4,7]"),
        ('"bits":3', '"bits":NaN'),
        ('"sha256":"', '"sha256":"x'),
        ("32", "33"),
    ],
)
def test_a_manifest_that_was_edited(tmp_path, old, new):
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / MANIFEST_NAME
    edited = new.join(path.read_text().rsplit(old, 1))
    assert edited != path.read_text()
    path.write_text(edited)
    with pytest.raises(PackedError, match="not what moeq wrote") as caught:
        read_manifest(tmp_path)
    assert caught.value.file == str(path)


def test_values_nested_too_deeply_to_have_been_written(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / MANIFEST_NAME
    path.write_text(path.read_text().replace('"bits":3', '"bits":' + "[" * 900 + "]" * 900))
    with pytest.raises((PackedError, ArtifactError)):
        read_manifest(tmp_path)


def test_absent_future_and_damaged(tmp_path):
    with pytest.raises(PackedError, match="not a packed checkpoint"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / MANIFEST_NAME
    text = path.read_text()
    path.write_text(text.replace('"format_version":1', '"format_version":2'))
    with pytest.raises(VersionError):
        read_manifest(tmp_path)
    for damaged in (
        "",
        text[:-20],
        text.replace("packed-checkpoint", "plan"),
        text.replace("method", "way"),
        "[" * 10**5,
    ):
        path.write_text(damaged)
        with pytest.raises(ArtifactError) as caught:
            read_manifest(tmp_path)
        assert caught.value.file == str(path)

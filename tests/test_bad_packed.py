"""Packed checkpoints that were tampered with: `verify` finds everything, `load` what would break it."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moeq
from hostile import copy_of, edit_header, edit_json, flip, refused
from moeq import cli, codec, errors
from moeq.stages import inspect

LAYER = "model-00001-of-00004.safetensors"
COPIED = "model-00004-of-00004.safetensors"
DATA = "model.layers.0.mlp.experts.moeq_data"
TABLE = "model.layers.0.mlp.experts.moeq_table"


def reseal(packed: Path, *names: str, **changes: Any) -> None:
    """Make the manifest agree again: what only a forger or another version would do."""
    path = packed / "moeq.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data.pop("sha256")
    data.update(changes)
    for name in names:
        content = (packed / name).read_bytes()
        data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_bytes(codec.canonical({**data, "sha256": codec.digest(data)}))


def replace(name: str, old: bytes, new: bytes) -> Callable[[Path], object]:
    def change(packed: Path) -> None:
        content = (packed / name).read_bytes()
        assert old in content
        (packed / name).write_bytes(content.replace(old, new, 1))

    return change


def sealed(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(packed: Path) -> None:
        change(packed)
        reseal(packed, name)

    return both


def add_tensor(packed: Path) -> None:
    """One more packed tensor, in a well-formed file."""

    def change(header: dict[str, Any]) -> None:
        stop = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["model.pie.moeq_data"] = {"dtype": "U8", "shape": [64], "data_offsets": [stop, stop + 64]}

    edit_header(packed / LAYER, change)
    with (packed / LAYER).open("ab") as file:
        file.write(b"\0" * 64)
    edit_json(packed / "model.safetensors.index.json", lambda d: d["weight_map"].update({"model.pie.moeq_data": LAYER}))


def shrink_table(header: dict[str, Any]) -> None:
    header[TABLE]["shape"] = [2, 6, 4]


def other_width(packed: Path) -> None:
    """Say in the table that the first matrix is stored in another width."""
    raw = (packed / LAYER).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])[TABLE]
    flip(packed / LAYER, 8 + length + table["data_offsets"][0] + 8)


TAMPERED: dict[str, tuple[Callable[[Path], object], type[errors.MoeqError], tuple[str, ...], bool]] = {
    "bit in a header": (lambda packed: flip(packed / LAYER, 20), errors.HeaderError, (LAYER,), True),
    "bit in a header length": (lambda packed: flip(packed / LAYER, 6), errors.HeaderError, (LAYER,), True),
    "bit in a blob": (lambda packed: flip(packed / LAYER, 5000), errors.PackedError, (LAYER, "sha256"), False),
    "bit in a table": (other_width, errors.PackedError, (TABLE,), True),
    "bit in a copied tensor": (lambda packed: flip(packed / COPIED, -3), errors.PackedError, (COPIED, "sha256"), False),
    "config": (
        replace("config.json", b'"num_hidden_layers": 3', b'"num_hidden_layers": 2'),
        errors.PackedError, ("config.json",), False,
    ),
    "size of config": (
        replace("config.json", b'"hidden_size": 64', b'"hidden_size": 640'),
        errors.PackedError, ("config.json", "bytes"), True,
    ),
    "plan": (replace("moeq_plan.json", b'"uniform"', b'"uniFORM"'), errors.PackedError, ("moeq_plan.json",), False),
    "recipe": (replace("moeq_recipe.yaml", b"5.0", b"4.0"), errors.PackedError, ("moeq_recipe.yaml",), False),
    "manifest": (replace("moeq.json", b'"uniform"', b'"uniFORM"'), errors.PackedError, ("moeq.json",), True),
    "manifest is not JSON": (lambda p: (p / "moeq.json").write_text("{"), errors.ArtifactError, ("moeq.json",), True),
    "no manifest": (lambda packed: (packed / "moeq.json").unlink(), errors.PackedError, ("moeq.json",), True),
    "no shard": (lambda packed: (packed / LAYER).unlink(), errors.PackedError, (LAYER,), True),
    "no config": (lambda packed: (packed / "config.json").unlink(), errors.PackedError, ("config.json",), True),
    "no index": (
        lambda packed: (packed / "model.safetensors.index.json").unlink(), errors.PackedError, ("index.json",), True,
    ),
    "truncated shard": (
        lambda packed: (packed / LAYER).write_bytes((packed / LAYER).read_bytes()[:-64]),
        errors.PackedError, (LAYER, "bytes"), True,
    ),
    "extra tensor": (add_tensor, errors.PackedError, (LAYER, "bytes"), True),
    "a shard beside": (
        lambda packed: (packed / "model.safetensors").write_bytes((packed / COPIED).read_bytes()),
        errors.PackedError, ("model.safetensors", "does not list"), True,
    ),
    "two shards changed places": (
        lambda packed: (packed / LAYER).rename(packed / "t") and (packed / COPIED).rename(packed / LAYER)
        and (packed / "t").rename(packed / COPIED),
        errors.PackedError, (LAYER, "bytes"), True,
    ),
    "sealed: extra tensor": (
        lambda packed: (add_tensor(packed), reseal(packed, LAYER, "model.safetensors.index.json")),
        errors.PackedError, ("model.pie.moeq_data",), True,
    ),
    "sealed: table of another shape": (
        sealed(LAYER, lambda packed: edit_header(packed / LAYER, shrink_table)), errors.PackedError, (TABLE,), True,
    ),
    "sealed: broken config": (
        sealed("config.json", lambda packed: (packed / "config.json").write_text("{")),
        errors.ArtifactError, ("config.json",), True,
    ),
    "sealed: config of another model": (
        sealed("config.json", lambda packed: edit_json(packed / "config.json", lambda d: d.update(hidden_size=32))),
        errors.PackedError, ("config.json",), True,
    ),
    "sealed: config without us": (
        sealed("config.json", lambda p: edit_json(p / "config.json", lambda d: d.pop("quantization_config"))),
        errors.PackedError, ("config.json", "quantization_config"), True,
    ),
    "sealed: config with other layers": (
        sealed("config.json", lambda packed: edit_json(
            packed / "config.json", lambda d: d["quantization_config"]["layers"].pop()
        )),
        errors.PackedError, ("config.json", "different layers"), True,
    ),
    "sealed: config of the future": (
        sealed("config.json", lambda packed: edit_json(
            packed / "config.json", lambda d: d["quantization_config"].update(format_version=2)
        )),
        errors.VersionError, ("config.json", "version 2"), True,
    ),
    "manifest of the future": (
        lambda packed: reseal(packed, format_version=2), errors.VersionError, ("moeq.json", "version 2"), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered(case: str, packed_tiny: Path, tmp_path: Path) -> None:
    change, kind, words, cheap = TAMPERED[case]
    packed = copy_of(packed_tiny, tmp_path / "packed")
    change(packed)
    refused(kind, lambda: moeq.verify(packed), *words)
    if cheap:  # found without reading the data
        refused(kind, lambda: moeq.load(packed, device="cpu"), *words)


def test_what_is_not_tampered_with_passes(packed_tiny: Path, tmp_path: Path) -> None:
    packed = copy_of(packed_tiny, tmp_path / "packed")
    reseal(packed, LAYER, "config.json")
    (packed / "notes.txt").write_text("a file of the user", encoding="utf-8")
    assert moeq.verify(packed).logits_finite


def test_every_byte_of_every_listed_file_counts(packed_tiny: Path, tmp_path: Path) -> None:
    packed = copy_of(packed_tiny, tmp_path / "packed")
    listed = json.loads((packed / "moeq.json").read_text(encoding="utf-8"))["files"]
    rest = {path.name for path in packed.iterdir()} - set(listed)
    assert rest == {"moeq.json", "README.md", "moeq_report.json"}
    for name in listed:
        content = (packed / name).read_bytes()
        flip(packed / name, len(content) * 2 // 3)
        # A bit of the index may turn one file name into another, which is found first.
        with pytest.raises(errors.MoeqError, match="file" if name.endswith("index.json") else re.escape(name)):
            moeq.verify(packed)
        (packed / name).write_bytes(content)
    assert moeq.verify(packed).files == len(listed)


def test_inspect_finds_what_is_cheap_to_find(packed_tiny: Path, tmp_path: Path) -> None:
    packed = copy_of(packed_tiny, tmp_path / "packed")
    flip(packed / LAYER, 20)
    refused(errors.HeaderError, lambda: inspect.run(packed), LAYER)


@pytest.mark.parametrize("verb", ["verify", "eval", "generate"])
def test_on_the_command_line(
    verb: str, packed_demo: Path, text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = copy_of(packed_demo, tmp_path / "packed")
    flip(packed / "model-00001-of-00005.safetensors", 20)
    rest = {"verify": [], "eval": ["--text", str(text_dir / "eval.txt")], "generate": ["Once"]}[verb]
    assert cli.main([verb, str(packed), *rest, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == "HeaderError"
    assert "model-00001" in document["message"]


def test_not_a_packed_checkpoint(tiny_dir: Path, tmp_path: Path) -> None:
    refused(errors.PackedError, lambda: moeq.verify(tiny_dir), "moeq.json", "not a packed checkpoint")
    refused(errors.PackedError, lambda: moeq.load(tiny_dir), "moeq.json")
    refused(errors.PackedError, lambda: moeq.load(tmp_path / "nothing"), "nothing")
    refused(errors.DeviceError, lambda: moeq.load(tiny_dir, device="banana"), "option device")

"""Tools to break checkpoints, and the one check that every refusal must pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeq.checkpoint.journal import JOURNAL_NAME
from moeq.errors import MoeqError

OPTIONS: dict[str, Any] = {"bits": 5, "group_size": 32, "quantizer": "minmax", "device": "cpu"}
"""Options under which the tiny models of the zoo are packed in half a second."""
WEIGHTS = "model.safetensors"


def copy_of(directory: Path, target: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(directory, target)
    return target


def refused(kind: type[MoeqError], call: Callable[[], object], *words: str, out: Path | None = None) -> MoeqError:
    """`call` must raise exactly `kind`, name `words` and a fix, and leave nothing that looks complete."""
    with pytest.raises(MoeqError) as caught:
        call()
    error = caught.value
    text = str(error)
    assert type(error) is kind, f"{type(error).__name__}: {text}"
    for word in words:
        assert word in text, text
    assert error.fix, text
    assert "Fix: " in text
    assert len(text.splitlines()) == 1, text
    if out is not None:
        nothing_complete(out)
    return error


def nothing_complete(out: Path) -> None:
    """There is no output, and a partial one only if it can be resumed."""
    assert not out.exists()
    partial = partial_of(out)
    if partial.exists():
        assert (partial / JOURNAL_NAME).is_file(), sorted(partial.iterdir())


def no_partial(out: Path) -> None:
    """Not even a partial directory was left."""
    assert not out.exists()
    assert not partial_of(out).exists(), sorted(partial_of(out).iterdir())


def partial_of(out: Path) -> Path:
    """Where an output is built."""
    return out.with_name(out.name + ".partial")


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and leave its data alone."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file; the file stays well-formed."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def flip(path: Path, position: int) -> None:
    """Flip one bit; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def split(directory: Path) -> Path:
    """Spread a checkpoint over two files with an index; returns the index."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    weight_map = {name: file for file, part in files.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index

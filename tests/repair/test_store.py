"""Trained values go back into their tensors, and into nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeq
from moeq.checkpoint.read import Reader, read_headers
from moeq.checkpoint.write import hash_file
from moeq.errors import HeaderError, MissingTensorError, OptionError
from moeq.format.manifest import read_manifest
from moeq.repair import store
from moeq.repair.router import find_routers
from moeq.runtime.load import from_pretrained

Pack = Callable[[str], Path]


def placed(packed: Path) -> tuple[dict[str, Tensor], dict[str, store.Place]]:
    """Router parameters with new values, and their places."""
    model = moeq.load(packed, device="cpu")
    routers = find_routers(model, [layer.path for layer in read_manifest(packed).layers])
    values = {name: parameter.detach() + 0.25 for name, parameter in routers.items()}
    return values, store.places(model, values, read_headers(packed))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "zaya", "ernie4_5_vl_moe"])
def test_what_is_written_is_what_loads(model_type: str, pack: Pack, tmp_path: Path) -> None:
    """mixtral renames its gates on the way, ernie4_5_vl_moe transposes them."""
    packed = shutil.copytree(pack(model_type), tmp_path / "packed")
    before = dict(moeq.load(packed, device="cpu").state_dict())
    values, places = placed(packed)
    store.rewrite(packed, packed, {places[name].tensor: places[name].stored(value) for name, value in values.items()})
    after = from_pretrained(packed, "auto").state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, values.get(name, before[name])), name


def test_transposed_tensors_are_known(pack: Pack) -> None:
    _, places = placed(pack("ernie4_5_vl_moe"))
    assert {place.swapped for place in places.values()} == {(0, 1)}
    assert all(".text_moe." not in place.tensor for place in places.values())
    _, places = placed(pack("mixtral"))
    assert {place.swapped for place in places.values()} == {None}
    assert all("block_sparse_moe.gate" in place.tensor for place in places.values())


def test_every_other_byte_stays(pack: Pack, tmp_path: Path) -> None:
    packed = pack("qwen3_moe")
    values, places = placed(packed)
    new = {places[name].tensor: places[name].stored(value) for name, value in values.items()}
    digests = store.rewrite(packed, tmp_path, new)
    headers = read_headers(packed)
    assert set(digests) == {path.name for path in tmp_path.iterdir()} == {headers[name].file for name in new}
    for file, digest in digests.items():
        assert hash_file(tmp_path / file) == digest
        old, now = bytearray((packed / file).read_bytes()), (tmp_path / file).read_bytes()
        assert old != now
        for name, value in new.items():
            if headers[name].file == file:
                old[headers[name].start : headers[name].stop] = value.numpy().tobytes()
        assert old == now


def test_only_what_differs_counts_as_changed(pack: Pack) -> None:
    packed = pack("qwen3_moe")
    values, places = placed(packed)
    new = {places[name].tensor: places[name].stored(value) for name, value in values.items()}
    same = sorted(new)[0]
    with Reader(packed) as reader:
        new[same] = reader.tensor(same)
    assert set(store.changed(packed, new)) == set(new) - {same}
    assert store.rewrite(packed, packed, {}) == {}


def test_values_are_rounded_to_the_dtype_on_disk() -> None:
    place = store.Place(tensor="gate", dtype=torch.bfloat16, swapped=(0, 1))
    stored = place.stored(torch.tensor([[1.0, 1 + 2**-9, 3.0]]))
    assert stored.dtype == torch.bfloat16
    assert stored.tolist() == [[1.0], [1.0], [3.0]]
    assert stored.is_contiguous()


def test_parameters_that_are_not_one_tensor_are_refused(pack: Pack) -> None:
    packed = pack("qwen3_moe")
    model = moeq.load(packed, device="cpu")
    headers = read_headers(packed)
    router = "model.layers.1.mlp.gate.weight"
    assert set(store.places(model, [router], headers)) == {router}
    absent = {name: info for name, info in headers.items() if name != router}
    with pytest.raises(OptionError, match=r"qwen3_moe does not store model\.layers\.1\.mlp\.gate.*option router"):
        store.places(model, [router], absent)
    misfit = {**headers, router: headers["model.norm.weight"]}
    with pytest.raises(OptionError, match="option router"):
        store.places(model, [router], misfit)


def test_wrong_tensors_are_refused_and_leave_no_file(pack: Pack, tmp_path: Path) -> None:
    packed = pack("qwen3_moe")
    with pytest.raises(MissingTensorError, match="no such tensor"):
        store.rewrite(packed, tmp_path, {"gate": torch.zeros(2)})
    with pytest.raises(HeaderError, match="declared"):
        store.rewrite(packed, tmp_path, {"model.layers.0.mlp.gate.weight": torch.zeros(2)})
    assert not list(tmp_path.iterdir())

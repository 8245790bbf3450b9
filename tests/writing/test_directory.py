from pathlib import Path

import pytest

from moeq.checkpoint.journal import JOURNAL_NAME
from moeq.errors import (
    CheckpointError,
    HeaderError,
    MissingTensorError,
    MoeqError,
    OutputError,
    StorageError,
    TensorError,
)
from moeq.writing import directory as output


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "source"
    source.mkdir()
    return source, tmp_path / "deep" / "out"


def begin(partial: Path) -> None:
    (partial / JOURNAL_NAME).write_text("{}", encoding="utf-8")
    (partial / "model.safetensors").touch()


def test_building_and_publishing(places: tuple[Path, Path]) -> None:
    source, out = places
    with output.building(source, out, resume=False, needed_bytes=1) as partial:
        assert partial.parent == out.parent, "the rename must stay within one file system"
        begin(partial)
        output.publish(partial, out)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"], "the journal is gone"
    assert not partial.exists()


def test_an_empty_directory_may_be_replaced(places: tuple[Path, Path]) -> None:
    source, out = places
    out.mkdir(parents=True)
    with output.building(source, out, resume=False, needed_bytes=1) as partial:
        begin(partial)
        output.publish(partial, out)
    assert (out / "model.safetensors").exists()


def broken_off(places: tuple[Path, Path], error: BaseException, *, begun: bool = True) -> None:
    """A run that ends in `error`, with or without a journal."""
    with output.building(*places, resume=False, needed_bytes=1) as partial:
        if begun:
            begin(partial)
        else:
            (partial / ".leftover.partial").touch()
        raise error


@pytest.mark.parametrize("error", [TensorError("NaN"), HeaderError("truncated"), MissingTensorError("gone")])
def test_a_run_that_no_resume_can_save_is_removed(error: MoeqError, places: tuple[Path, Path]) -> None:
    with pytest.raises(type(error)):
        broken_off(places, error)
    assert not list(places[1].parent.iterdir())


@pytest.mark.parametrize("error", [StorageError("full"), CheckpointError("unreadable"), KeyboardInterrupt(), OSError()])
def test_a_run_that_can_go_on_stays(error: BaseException, places: tuple[Path, Path]) -> None:
    with pytest.raises(type(error)):
        broken_off(places, error)
    assert not places[1].exists()
    with output.building(*places, resume=True, needed_bytes=1) as again:
        assert (again / "model.safetensors").exists()
        output.publish(again, places[1])


@pytest.mark.parametrize("error", [StorageError("full"), KeyboardInterrupt()])
def test_a_run_that_has_not_begun_leaves_nothing(error: BaseException, places: tuple[Path, Path]) -> None:
    with pytest.raises(type(error)):
        broken_off(places, error, begun=False)
    assert not list(places[1].parent.iterdir())


def test_space_counts_what_is_there(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = places
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"1000 bytes free, the output needs 1500 more.*free 500 bytes"):
        output.prepare(source, out, resume=False, needed_bytes=1500)
    assert not output.partial_of(out).exists()
    partial = output.prepare(source, out, resume=False, needed_bytes=1000)
    begin(partial)
    (partial / "model.safetensors").write_bytes(b"\0" * 600)
    output.prepare(source, out, resume=True, needed_bytes=1500)


def test_a_failed_rename_can_be_repeated(places: tuple[Path, Path]) -> None:
    source, out = places
    partial = output.prepare(source, out, resume=False, needed_bytes=1)
    begin(partial)
    (out / "mine").mkdir(parents=True)
    with pytest.raises(StorageError, match="--resume"):
        output.publish(partial, out)
    assert (partial / JOURNAL_NAME).exists()
    (out / "mine").rmdir()
    output.publish(output.prepare(source, out, resume=True, needed_bytes=1), out)
    assert (out / "model.safetensors").exists()


def test_links_do_not_hide_that_input_and_output_overlap(places: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = places
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "a" / "b", tmp_path, tmp_path / "link" / "a"):
        with pytest.raises(OutputError, match="overlaps"):
            output.prepare(source, out, resume=False, needed_bytes=1)
    assert not any(source.iterdir())


def test_what_a_killed_run_left_beside_its_files_is_not_published(places: tuple[Path, Path]) -> None:
    """Inputs that were written for other processes lie in a directory, which a kill leaves behind."""
    source, out = places
    partial = output.partial_of(out)
    (partial / ".moeq-crew-0" / "deep").mkdir(parents=True)
    (partial / ".moeq-crew-0" / "inputs.pt").write_bytes(b"1")
    for name in (JOURNAL_NAME, ".moeq-costs"):
        (partial / name).write_text("kept", encoding="utf-8")
    assert output.prepare(source, out, resume=True, needed_bytes=1) == partial
    assert sorted(path.name for path in partial.iterdir()) == sorted([".moeq-costs", JOURNAL_NAME])

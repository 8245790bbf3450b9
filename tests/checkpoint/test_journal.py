import json
from dataclasses import replace

import pytest

from moeq.checkpoint.identity import FileStamp
from moeq.checkpoint.journal import JOURNAL_NAME, Journal, remove_journal
from moeq.checkpoint.write import hash_file
from moeq.errors import ResumeError

STAMP = FileStamp(size=10, mtime_ns=5, header_sha256="a" * 64, sample_sha256="b" * 64)
RUN = {
    "fingerprint": {"config.json": STAMP, "model-00001.safetensors": STAMP},
    "options": {"bits": 2, "groups": (32, 64), "seed": 0},
    "plan_hash": "c" * 64,
    "moeq_version": "0.1.0",
}


def begin(directory, **changes):
    return Journal.open_or_create(directory, **{**RUN, **changes})


def finish(journal, directory, name, content=b"data"):
    (directory / name).write_bytes(content)
    return journal.finish_shard(directory, name, hash_file(directory / name))


def test_resume(tmp_path):
    journal = begin(tmp_path)
    assert journal.finished == {}
    journal = finish(journal, tmp_path, "a.safetensors")
    journal = finish(journal, tmp_path, "b.safetensors", b"more")
    again = begin(tmp_path)
    assert again == replace(journal, options=again.options)
    assert list(again.finished) == ["a.safetensors", "b.safetensors"]
    assert again.finished["a.safetensors"].bytes == 4
    remove_journal(tmp_path)
    remove_journal(tmp_path)
    assert begin(tmp_path).finished == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moeq_version": "0.2.0"}, r"moeq version was 0\.1\.0, is 0\.2\.0"),
        ({"options": {**RUN["options"], "bits": 3}}, "option bits was 2, is 3"),
        ({"options": {**RUN["options"], "extra": 1}}, "option extra was not set, is 1"),
        ({"options": {"groups": [32, 64], "seed": 0}}, "option bits was 2, is not set"),
        ({"plan_hash": "d" * 64}, "plan was cccccccccccc, is dddddddddddd"),
        ({"plan_hash": "c" * 63 + "d"}, "the plan differs"),
        ({"fingerprint": {"config.json": STAMP}}, r"input file model-00001\.safetensors is gone"),
        ({"fingerprint": {**RUN["fingerprint"], "new": STAMP}}, "input file new is new"),
    ],
)
def test_names_the_difference(tmp_path, changes, message):
    begin(tmp_path)
    with pytest.raises(ResumeError, match=message) as caught:
        begin(tmp_path, **changes)
    assert "empty output directory" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 12, "mtime_ns": 6}, "changed: size 10 -> 12"),
        ({"header_sha256": "f" * 64, "mtime_ns": 6}, "changed: header a"),
        ({"sample_sha256": "f" * 64, "mtime_ns": 6}, "changed: sampled content b"),
        ({"mtime_ns": 6}, "changed: modification time 5 -> 6"),
    ],
)
def test_names_how_an_input_changed(tmp_path, change, message):
    begin(tmp_path)
    fingerprint = {**RUN["fingerprint"], "model-00001.safetensors": replace(STAMP, **change)}
    with pytest.raises(ResumeError, match=rf"input file model-00001\.safetensors {message}"):
        begin(tmp_path, fingerprint=fingerprint)


def test_names_the_first_of_several_differences(tmp_path):
    begin(tmp_path)
    with pytest.raises(ResumeError, match=r"model-00001\.safetensors is gone") as caught:
        begin(tmp_path, fingerprint={"config.json": STAMP}, options={}, plan_hash="d" * 64)
    assert "option" not in caught.value.message


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"journal"', '"plan"'),
        lambda text: text.replace('"format_version":1', '"format_version":2'),
        lambda text: text.replace('"plan_hash"', '"plan"'),
        lambda text: text.replace('"bytes":4', '"bytes":"4"'),
        lambda text: text.replace("a.safetensors", "../a.safetensors"),
        lambda text: text.replace("a.safetensors", "\\ud800"),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_journal(tmp_path, damage):
    finish(begin(tmp_path), tmp_path, "a.safetensors")
    path = tmp_path / JOURNAL_NAME
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(ResumeError, match="damaged") as caught:
        begin(tmp_path)
    assert caught.value.file == str(path)
    assert caught.value.fix


@pytest.mark.parametrize(("content", "message"), [(b"data!", "size 4 -> 5"), (b"date", "sha256")])
def test_a_finished_file_that_changed(tmp_path, content, message):
    finish(begin(tmp_path), tmp_path, "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ResumeError, match=message) as caught:
        begin(tmp_path)
    assert caught.value.file == str(tmp_path / "a.safetensors")


def test_a_finished_file_that_was_removed_is_written_again(tmp_path):
    journal = finish(begin(tmp_path), tmp_path, "a.safetensors")
    finish(journal, tmp_path, "b.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert list(begin(tmp_path).finished) == ["b.safetensors"]


def test_the_journal_is_replaced_as_a_whole(tmp_path, monkeypatch):
    journal = begin(tmp_path)
    before = (tmp_path / JOURNAL_NAME).read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(journal, tmp_path, "a.safetensors")
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    assert json.loads(before)["finished"] == {}

import hashlib
import json
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moeq.calibration.tokens import (
    DATASET_DOCUMENTS,
    read_documents,
    read_json_lines,
    read_text,
    sample_tokens,
    token_hash,
    windows,
)
from moeq.errors import CalibrationError, OptionError


class Letters:
    """One token per character, and a start token in front of every text."""

    bos_token_id = 1
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_txt_is_one_document_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\r\n\n  \nsecond\u2028still second\n")
    assert read_documents(path) == ["first", "second\u2028still second"]
    assert read_documents(str(path)) == read_documents(path)


def test_txt_as_a_whole_is_untouched(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\n\n = second = \n")
    assert read_text(path) == "first\n\n = second = \n"


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")) == ["abc"]
    assert read_documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "abc"}')) == ["abc"]


def test_jsonl_ignores_other_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\\nb", "domain": 3}\n\n{"text": ""}\n{"text": "c"}\n')
    assert read_documents(path) == ["a\nb", "c"]
    assert read_text(path) == "a\nb\n\nc"
    assert [line for line, _ in read_json_lines(path)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ("plain", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("9" * 5000, "line 2 is not JSON"),
        ('["a"]', "line 2 is not a JSON object"),
        ('{"texts": "a"}', 'line 2 has no string "text"'),
        ('{"text": ["a"]}', 'line 2 has no string "text"'),
        ('{"text": null}', 'line 2 has no string "text"'),
        ('{"text": "\\ud800"}', "line 2 has half a surrogate pair"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=message) as caught:
        read_documents(path)
    assert caught.value.file == str(path)
    assert caught.value.fix


@pytest.mark.parametrize("reader", [read_documents, read_text])
def test_unusable_files(tmp_path: Path, reader) -> None:
    cases = {
        "does not exist": tmp_path / "absent.txt",
        "no text in this directory": tmp_path / "pictures",
        "byte 3 is not UTF-8": write(tmp_path / "latin.txt", b"caf\xe9"),
        "byte 0 is not UTF-8": write(tmp_path / "utf16.txt", "text".encode("utf-16")),
        "there is no text": write(tmp_path / "empty.txt", ""),
        "no text in it": write(tmp_path / "blank.jsonl", '{"text": " "}\n'),
        "what a .csv is": write(tmp_path / "a.csv", "text"),
    }
    (tmp_path / "pictures" / ".git").mkdir(parents=True)
    write(tmp_path / "pictures" / "a.png", "text")
    write(tmp_path / "pictures" / ".git" / "description.txt", "text")
    for message, path in cases.items():
        with pytest.raises(CalibrationError, match=message) as caught:
            reader(path)
        assert caught.value.file == str(path), message
        assert caught.value.fix, message


def test_dataset_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_documents("allenai/c4:en")


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    calls = SimpleNamespace(seen=[], rows=[{"text": "a"}, {"text": "b"}])

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool):
        calls.seen.append((name, config, split, streaming))
        if isinstance(calls.rows, Exception):
            raise calls.rows
        return calls.rows

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_dataset_is_streamed(fake_datasets: SimpleNamespace) -> None:
    assert read_documents("allenai/c4:en") == ["a", "b"]
    assert read_text("org/name") == "a\n\nb"
    assert fake_datasets.seen == [("allenai/c4", "en", "train", True), ("org/name", None, "test", True)]
    fake_datasets.rows = ({"text": str(i)} for i in range(10**9))
    assert len(read_documents("org/name")) == DATASET_DOCUMENTS


@pytest.mark.parametrize("rows", [ValueError("unknown split"), OSError("offline"), [{"content": "a"}]])
def test_dataset_that_cannot_be_read(fake_datasets: SimpleNamespace, rows) -> None:
    fake_datasets.rows = rows
    with pytest.raises(CalibrationError, match="org/name"):
        read_documents("org/name")


def test_a_mistyped_path_is_never_looked_up(
    fake_datasets: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("data/c4", "data/c4.txt", "absent/c4.jsonl", "c4", "./data/c4", "/no/where"):
        with pytest.raises(CalibrationError, match="does not exist"):
            read_documents(source)
    assert fake_datasets.seen == []


def test_samples_are_windows_of_shuffled_documents() -> None:
    documents = ["abc", "defgh", "ij"]
    batch = sample_tokens(Letters(), documents, nsamples=3, seqlen=4, seed=0, source="letters")
    assert batch.ids_NT.shape == (3, 4)
    assert batch.ids_NT.dtype == torch.int64
    assert (batch.source, batch.seed) == ("letters", 0)
    texts = "".join(chr(token) for token in batch.ids_NT.flatten()).split("\x01")[1:]
    assert len(texts) == 3
    assert sorted(texts)[:2] in (["abc", "defgh"], ["abc", "defg"], ["ab", "defgh"])


def test_samples_depend_on_text_sizes_and_seed_only() -> None:
    documents = [f"document {i}" for i in range(40)]
    first = sample_tokens(Letters(), documents, 4, 16, seed=3)
    again = sample_tokens(Letters(), iter(documents), 4, 16, seed=3, source="elsewhere")
    assert torch.equal(first.ids_NT, again.ids_NT)
    assert first.hash == again.hash
    # A prefix stays a prefix: more samples of the same length only add to them.
    assert torch.equal(sample_tokens(Letters(), documents, 8, 16, seed=3).ids_NT[:4], first.ids_NT)
    others = [
        sample_tokens(Letters(), documents, 4, 16, seed=4),
        sample_tokens(Letters(), documents, 4, 15, seed=3),
        sample_tokens(Letters(), documents, 5, 16, seed=3),
        sample_tokens(Letters(), documents[1:], 4, 16, seed=3),
    ]
    assert first.hash not in {other.hash for other in others}


def test_samples_leave_documents_and_global_randomness_alone() -> None:
    documents = ["abc", "def", "ghi"]
    state = torch.random.get_rng_state()
    sample_tokens(Letters(), documents, 1, 4, seed=1)
    assert documents == ["abc", "def", "ghi"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_more_text_is_tokenized_than_needed() -> None:
    seen = []

    class Counting(Letters):
        def __call__(self, text: str, **kwargs: bool) -> dict[str, list[int]]:
            seen.append(text)
            return super().__call__(text, **kwargs)

    sample_tokens(Counting(), ["abcd"] * 100, nsamples=2, seqlen=5, seed=0)
    assert len(seen) == 2


def test_exactly_enough_and_one_too_few() -> None:
    assert sample_tokens(Letters(), ["abc", "def"], nsamples=2, seqlen=4, seed=0).ids_NT.shape == (2, 4)
    with pytest.raises(CalibrationError, match=r"has 8 tokens, 3 samples of 3 need 9.*at most 2 samples"):
        sample_tokens(Letters(), ["abc", "def"], nsamples=3, seqlen=3, seed=0)


@pytest.mark.parametrize(("nsamples", "seqlen", "option"), [(0, 4, "nsamples"), (1, 0, "seqlen"), (-1, 4, "nsamples")])
def test_sizes_must_be_positive(nsamples: int, seqlen: int, option: str) -> None:
    with pytest.raises(OptionError) as caught:
        sample_tokens(Letters(), ["abc"], nsamples, seqlen, seed=0)
    assert caught.value.option == option


def test_hash_tells_shapes_apart() -> None:
    ids = torch.arange(12)
    hashes = {token_hash(ids.view(shape)) for shape in ((3, 4), (4, 3), (1, 12))}
    assert len(hashes) == 3
    # Spelled out a second time: hashes are compared across versions and machines.
    packed = b"".join(struct.pack("<5q", 4, *row) for row in ids.view(3, 4).tolist())
    assert token_hash(ids.view(3, 4)) == hashlib.sha256(packed).hexdigest()


def test_windows_cover_the_text_once() -> None:
    cut = windows(Letters(), "abcdefghij", seqlen=4)
    assert [len(window) for window in cut] == [4, 4, 3]
    assert torch.cat(cut).tolist() == [1, *map(ord, "abcdefghij")]


def test_a_window_with_nothing_to_predict_is_dropped() -> None:
    assert [len(window) for window in windows(Letters(), "abcdefgh", seqlen=4)] == [4, 4]
    assert [len(window) for window in windows(Letters(), "abcdefghijk", seqlen=4, max_tokens=6)] == [4, 2]


def test_windows_of_hardly_any_text() -> None:
    with pytest.raises(CalibrationError, match="has 1 tokens"):
        windows(Letters(), "", seqlen=4)
    for seqlen, max_tokens in ((1, None), (4, 1)):
        with pytest.raises(OptionError):
            windows(Letters(), "abc", seqlen=seqlen, max_tokens=max_tokens)


def test_bundled_texts_with_the_real_tokenizer(text_dir: Path, demo_tokenizer, caplog) -> None:
    documents = read_documents(text_dir / "calibration.txt")
    batch = sample_tokens(demo_tokenizer, documents, nsamples=8, seqlen=256, seed=0)
    assert demo_tokenizer.decode(batch.ids_NT[0]).strip()[:40] in "".join(documents)
    text = read_text(text_dir / "eval.txt")
    cut = windows(demo_tokenizer, text, seqlen=256)
    assert demo_tokenizer.decode(torch.cat(cut)) == text
    assert not caplog.records


def test_bundled_calibration_text_holds_nothing_of_the_evaluation_text(text_dir: Path) -> None:
    calibration = set(read_documents(text_dir / "calibration.txt"))
    assert not calibration & set(read_documents(text_dir / "eval.txt"))


def test_bundled_heldout_text_names_its_domains(text_dir: Path) -> None:
    path = text_dir / "heldout.jsonl"
    domains = {json.loads(line)["domain"] for line in path.read_text(encoding="utf-8").splitlines()}
    assert domains == {"books", "code", "math"}
    assert len(read_documents(path)) == 29
    licences = (text_dir / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"`{name.name}`" in licences for name in text_dir.iterdir() if name.suffix != ".md")

"""Texts from disk, and tokens from texts: the same text, tokenizer, sizes and seed give the same tokens.

Legend: N samples, T tokens per sample.
"""

import hashlib
import importlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moeq.calibration.rows import TABLES, Template, document, read_table
from moeq.errors import CalibrationError, OptionError

DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
"""A hub dataset, "org/name", or one configuration of it, "org/name:config"."""

PLAIN = (".txt", ".md")
"""Files of a directory that are one document each."""

DATASET_DOCUMENTS = 16_384
"""Documents taken from the start of a hub dataset; the papers shuffle 16 documents per sample of theirs."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that moeq uses."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, Any]:
        """Encode `text`; the ids are in "input_ids"."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What was used of one text.

    Attributes:
        name: of the text.
        samples: cut out of it.
        documents: that these samples hold, or parts of them.
        conversations: how many of all documents that were read went through the tokenizer's chat template.
    """

    name: str
    samples: int
    documents: int
    conversations: int = 0

    @property
    def words(self) -> str:
        """The same for people."""
        text = f"{self.name}: {self.samples:,} samples from {self.documents:,} documents"
        return f"{text}, {self.conversations:,} conversations through the chat template" if self.conversations else text


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """Calibration samples of equal length.

    Attributes:
        ids_NT: token ids, int64.
        hash: sha256 of shape and ids, hexadecimal.
        source: where the text came from, for reports.
        seed: what the documents were shuffled with.
        domains: what was used of each text.
        domain_N: the domain of each sample.
    """

    ids_NT: Tensor
    hash: str
    source: str
    seed: int
    domains: tuple[Domain, ...] = ()
    domain_N: tuple[int, ...] = ()


def token_hash(rows: Iterable[Tensor]) -> str:
    """sha256 of token ids: the length of every row and its ids as little-endian int64, hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def read_documents(source: str | Path, *, split: str = "train", template: Template | None = None) -> list[str]:
    """The documents of a text: the unit that calibration shuffles.

    Args:
        source: a .txt file with one document per line (empty lines are dropped), a .jsonl, .parquet or .arrow file of
            rows, a directory of such files (there a .txt or .md file is one document), or a hub dataset
            "org/name[:config]". A row has a "text", or is a conversation: "messages" or "conversations", or "prompt"
            and "completion" (`moeq.calibration.rows`).
        split: which split of a hub dataset.
        template: turns a conversation into text; None if there is no tokenizer that has one.

    Raises:
        CalibrationError: the file is absent, empty, not UTF-8, or a line is no such object; the directory has no such
            file; or the dataset cannot be read.
    """
    if _is_dataset(source):
        documents = list(_dataset_documents(str(source), split, template))
    elif Path(source).is_dir():
        documents = list(_directory_documents(Path(source), template))
    else:
        documents = _file_documents(Path(source), template)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise CalibrationError("there is no text in it", file=source, fix="give a text with at least one document")
    return documents


def _file_documents(path: Path, template: Template | None) -> list[str]:
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return [document(row, f"line {line}", path, template) for line, row in read_json_lines(path)]
    if suffix in TABLES:
        rows = enumerate(read_table(path), start=1)
        return [document(row, f"row {number}", path, template) for number, row in rows]
    return _decode(path).split("\n")


def _directory_documents(directory: Path, template: Template | None) -> Iterator[str]:
    """Those of all files at any depth, in the order of their names; hidden ones are not for readers."""
    files = [path for path in sorted(directory.rglob("*")) if path.suffix.lower() in (*PLAIN, ".jsonl", *TABLES)]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    if not files:
        fix = "give a directory of .txt, .md, .jsonl, .parquet or .arrow files"
        raise CalibrationError("there is no text in this directory", file=directory, fix=fix)
    for path in files:
        if path.suffix.lower() in PLAIN:
            yield _decode(path)
        else:
            yield from _file_documents(path, template)


def read_text(source: str | Path, *, split: str = "test") -> str:
    """A whole text as one string, as perplexity wants it.

    A .txt file is taken as it is; documents of a .jsonl file or a dataset are joined by a blank line
    (the usual WikiText protocol; GEMQ, evaluation setup).

    Raises:
        CalibrationError: as `read_documents`.
    """
    if _is_dataset(source) or _suffix(Path(source)) != ".txt":
        return "\n\n".join(read_documents(source, split=split))
    text = _decode(Path(source))
    if not text.strip():
        raise CalibrationError("there is no text in it", file=source, fix="give a text with at least one document")
    return text


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their line numbers, counted from 1. Blank lines are dropped.

    Raises:
        CalibrationError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"line {number} is not JSON: {error}", file=path, fix="write one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise CalibrationError(f"line {number} is not a JSON object", file=path, fix='write {"text": ...}')
        yield number, row


def sample_tokens(
    tokenizer: Tokenizer, documents: Iterable[str], nsamples: int, seqlen: int, seed: int, *, source: str = "text"
) -> TokenBatch:
    """Cut calibration samples out of shuffled documents (GEMQ, appendix on calibration data).

    Documents are shuffled, each is tokenized with the tokenizer's own special tokens, the ids are
    joined, and consecutive windows are taken: long documents are cut, short ones share a window. Where the tokenizer
    marks neither beginning nor end, the end-of-text token separates documents, as in pretraining. No more text is
    tokenized than is needed.

    Args:
        tokenizer: a transformers tokenizer.
        documents: the texts.
        nsamples: samples wanted (N).
        seqlen: tokens per sample (T).
        seed: seed of the shuffle.
        source: name of the text, kept for reports.

    Raises:
        CalibrationError: too little text.
        OptionError: `nsamples` or `seqlen` is not positive.
    """
    _check_positive(("nsamples", nsamples, 1), ("seqlen", seqlen, 1))
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    needed = nsamples * seqlen
    ids: list[int] = []
    between = _separator(tokenizer)
    used = 0
    for text in shuffled:
        used += 1
        ids += [*_encode(tokenizer, text), *between]
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise CalibrationError(
            f"the text {source!r} has {len(ids)} tokens, {nsamples} samples of {seqlen} need {needed}",
            fix="give a longer text, or shorter samples"
            if len(ids) < seqlen
            else f"give a longer text, or at most {len(ids) // seqlen} samples, or shorter ones",
        )
    ids_NT = torch.tensor(ids[:needed], dtype=torch.int64).view(nsamples, seqlen)
    return TokenBatch(
        ids_NT=ids_NT,
        hash=token_hash(ids_NT),
        source=source,
        seed=seed,
        domains=(Domain(name=source, samples=nsamples, documents=used),),
        domain_N=(0,) * nsamples,
    )


def first_samples(tokens: TokenBatch, count: int) -> TokenBatch:
    """The first samples of a batch, all of them if `count` is 0 or more than there are; texts keep their shares."""
    if not 0 < count < len(tokens.ids_NT):
        return tokens
    ids_NT = tokens.ids_NT[:count]
    return replace(tokens, ids_NT=ids_NT, hash=token_hash(ids_NT), domain_N=tokens.domain_N[:count])


def windows(tokenizer: Tokenizer, text: str, seqlen: int, *, max_tokens: int | None = None) -> list[Tensor]:
    """Tokenize a text once and cut it into windows that do not overlap.

    Args:
        tokenizer: a transformers tokenizer.
        text: the whole text.
        seqlen: tokens per window.
        max_tokens: use this many tokens from the start of the text; all by default.

    Returns:
        int64 ids, (seqlen,) each; the last window is shorter when tokens are left over, and dropped
        when only one is left, for nothing can be predicted in it.

    Raises:
        CalibrationError: the text has fewer than two tokens.
        OptionError: `seqlen` or `max_tokens` is below two.
    """
    _check_positive(("seqlen", seqlen, 2), ("max-tokens", 2 if max_tokens is None else max_tokens, 2))
    ids = torch.tensor(_encode(tokenizer, text)[:max_tokens], dtype=torch.int64)
    if len(ids) < 2:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, at least 2 are needed to predict one", fix="give a longer text"
        )
    return [window for window in ids.split(seqlen) if len(window) >= 2]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake, it is cut into windows.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _separator(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What comes between documents: nothing where the tokenizer marks them itself."""
    if tokenizer.eos_token_id is None or _encode(tokenizer, ""):
        return ()
    return (tokenizer.eos_token_id,)


def _check_positive(*options: tuple[str, int, int]) -> None:
    for option, value, least in options:
        if value < least:
            raise OptionError(f"{value} is too small", option=option, fix=f"give {least} or more")


def _is_dataset(source: str | Path) -> bool:
    # A mistyped path must not turn into a network call: if its folder is here, it is a path.
    return (
        isinstance(source, str)
        and DATASET_ID.fullmatch(source) is not None
        and Path(source).suffix not in (".txt", ".jsonl", *TABLES)
        and not Path(source).parent.exists()
    )


def dataset_text(name: str, split: str = "test") -> str:
    """The rows of a hub dataset "org/name:config", those that are not empty, joined by blank lines.

    Raises:
        CalibrationError: it cannot be read.
    """
    return "\n\n".join(text for text in _dataset_documents(name, split, None) if text.strip())


def _dataset_documents(name: str, split: str, template: Template | None) -> Iterator[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"{name!r} is no file here, and reading it as a hub dataset needs the package datasets",
            option="dataset",
            fix="run `pip install datasets`, or give a .txt or .jsonl file",
        ) from error
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
        texts = [document(row, "a row", Path(name), template) for row in itertools.islice(rows, DATASET_DOCUMENTS)]
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"cannot read split {split!r} of the dataset {name!r}: {error}",
            option="dataset",
            fix='check name, configuration ("org/name:config") and split',
        ) from error
    yield from texts


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl", *TABLES) and path.exists() and not path.is_dir():
        raise CalibrationError(
            f"cannot tell what a {suffix or 'file without suffix'} is",
            file=path,
            fix="rename it to .txt, .jsonl, .parquet or .arrow",
        )
    return suffix


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError("the file does not exist", file=path, fix="check the path") from None
    except IsADirectoryError:
        raise CalibrationError("this is a directory", file=path, fix="give a file") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"byte {error.start} is not UTF-8", file=path, fix="convert the file to UTF-8 text"
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"cannot be read: {error.strerror}", file=path, fix="check the file's permissions"
        ) from error

"""Puts a packed checkpoint on the hub; without being told twice it only says what it would do."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import LocalTokenNotFoundError

from moeq.errors import OptionError, OutputError, PackedError
from moeq.format.manifest import MANIFEST_NAME, Manifest
from moeq.layouts.validate import validate_packed, verify_files

CARD: Final = "README.md"
REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TAG: Final = 100
"""Characters that a tag of a card may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What was, or would be, put there; field names are those of the JSON document (docs/json.md).

    Attributes:
        repo: owner and name.
        url: of the commit, "" while nothing was uploaded.
        private: whether others are kept out of a repository that is new.
        uploaded: whether anything was.
        files: path in the directory -> bytes.
        total_bytes: of all files.
        warnings: what the hub or its readers would miss.
    """

    repo: str
    url: str
    private: bool
    uploaded: bool
    files: dict[str, int]
    total_bytes: int
    warnings: tuple[str, ...]


def run(directory: str | Path, repo: str, *, upload: bool = False, private: bool = True) -> PushReport:
    """Check every file by its hash and the card by the hub's rules, then upload if told so.

    Args:
        directory: what `moeq quantize` wrote.
        repo: "owner/name" on the hub; made if it is not there.
        upload: do it; else nothing leaves this machine.
        private: a repository that is made for it is seen by its owner alone.

    Raises:
        OptionError: `repo` is no name.
        PackedError: the directory is no packed checkpoint, or is damaged, or its card cannot be read.
        OutputError: the hub refuses, or is not reached.
    """
    if not REPO.fullmatch(repo):
        raise OptionError(f"{repo!r} names no repository", option="repo", fix="give owner/name")
    source = Path(directory)
    manifest = validate_packed(source)
    verify_files(source, manifest)
    warnings = _card_warnings(source)
    files = {name: (source / name).stat().st_size for name in _names(source, manifest)}
    url = _upload(source, repo, list(files), private=private) if upload else ""
    return PushReport(
        repo=repo,
        url=url,
        private=private,
        uploaded=upload,
        files=files,
        total_bytes=sum(files.values()),
        warnings=warnings,
    )


def _names(source: Path, manifest: Manifest) -> list[str]:
    """The checkpoint's files, and no others that lie beside them."""
    beside = [name for name in (MANIFEST_NAME, CARD, "moeq_report.json") if (source / name).is_file()]
    return sorted({*manifest.files, *beside})


def _card_warnings(source: Path) -> tuple[str, ...]:
    """What the card lacks.

    Raises:
        PackedError: there is none, or its metadata is no YAML that the hub takes.
    """
    path = source / CARD
    try:
        data = huggingface_hub.ModelCard.load(path).data.to_dict()
    except Exception as error:  # whatever the library and its YAML reader make of it
        message = f"the card cannot be read: {' '.join(str(error).split())[:200]}"
        raise PackedError(message, file=path, fix="quantize again, or mend its metadata") from error
    tags = data.get("tags") or []
    if not all(isinstance(tag, str) and 0 < len(tag) <= TAG for tag in tags):
        raise PackedError("a tag of the card is no short text", file=path, fix="mend its metadata")
    found = []
    if "base_model" not in data:
        found.append("the card names no original (base_model): the hub will not list it there")
    if "license" not in data:
        found.append("the card names no license: add that of the original")
    return tuple(found)


def _upload(source: Path, repo: str, names: list[str], *, private: bool) -> str:
    try:
        api = huggingface_hub.HfApi()
        huggingface_hub.ModelCard.load(source / CARD).validate()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=source, allow_patterns=names, commit_message="Upload a checkpoint packed by moeq"
        )
    except LocalTokenNotFoundError as error:
        raise OutputError("nobody is logged in", option="repo", fix="run hf auth login") from error
    except Exception as error:  # the client's own errors, and those of whatever carries its requests
        message = f"the hub refuses: {' '.join(str(error).split())[:300]}"
        raise OutputError(message, option="repo", fix="run hf auth login, and check the name and the rights") from error
    return str(getattr(done, "commit_url", ""))

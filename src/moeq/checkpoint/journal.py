"""Remembers how far a run came, so that the same run can go on after it was killed.

The journal lies in the partial output directory and is replaced as a whole after every shard. A run may go on
only if input, options, plan and version are the ones it began with: otherwise the result would be a mixture.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from moeq import codec
from moeq.checkpoint.identity import FileStamp
from moeq.checkpoint.locate import is_plain_name
from moeq.checkpoint.write import FileDigest, hash_file, write_file_atomic
from moeq.codec import Artifact
from moeq.errors import ArtifactError, ResumeError

JOURNAL_NAME: Final = ".moeq-journal.json"

_AGAIN: Final = "start again in an empty output directory"
_STAMP_WORDS: Final = {
    "size": "size",
    "header_sha256": "header",
    "sample_sha256": "sampled content",
    "mtime_ns": "modification time",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal(Artifact):
    """The state of an unfinished run.

    Attributes:
        fingerprint: input file -> stamp.
        options: everything else that the output depends on, plain JSON values.
        plan_hash: hash of the plan that is carried out.
        moeq_version: version that began the run.
        finished: output file -> size and hash, for files that are safely on disk.
        notes: what steps after packing found out; a step with a note is done.
    """

    KIND: ClassVar[str] = "journal"

    fingerprint: dict[str, FileStamp]
    options: dict[str, Any]
    plan_hash: str
    moeq_version: str
    finished: dict[str, FileDigest]
    notes: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise ArtifactError if a finished file lies outside the output directory."""
        for name in self.finished:
            if not is_plain_name(name):
                raise ArtifactError(f"{name[:80]!r} is not a file name", fix=_AGAIN)

    @classmethod
    def open_or_create(
        cls,
        directory: Path,
        *,
        fingerprint: Mapping[str, FileStamp],
        options: Mapping[str, Any],
        plan_hash: str,
        moeq_version: str,
    ) -> Self:
        """Begin a run in `directory`, or find out where the run that began there stopped.

        A finished file that the user removed is dropped and will be written again; one whose bytes changed is
        an error, since neither a crash nor this code can do that.

        Raises:
            ResumeError: the run there was another one, its journal is damaged, or a finished file changed.
            StorageError: the journal cannot be written.
        """
        wanted = cls(
            fingerprint=dict(fingerprint),
            options=dict(options),
            plan_hash=plan_hash,
            moeq_version=moeq_version,
            finished={},
        )
        path = directory / JOURNAL_NAME
        if not path.exists():
            wanted._save(directory)
            return wanted
        try:
            found = cls.load(path)
        except ArtifactError as error:
            raise ResumeError(f"the journal is damaged: {error.message}", file=path, fix=_AGAIN) from error
        found.check_same(wanted)
        return replace(found, finished=_still_there(directory, found.finished))

    def finish_shard(self, directory: Path, name: str, digest: FileDigest) -> Self:
        """The journal with one more finished file, on disk before this returns.

        Raises:
            StorageError: the journal cannot be written.
        """
        journal = replace(self, finished={**self.finished, name: digest})
        journal._save(directory)
        return journal

    def forget(self, directory: Path, names: Iterable[str]) -> Self:
        """The journal without some finished files, which are about to be replaced; on disk before this returns.

        Raises:
            StorageError: the journal cannot be written.
        """
        gone = set(names)
        kept = {name: digest for name, digest in self.finished.items() if name not in gone}
        journal = replace(self, finished=kept)
        journal._save(directory)
        return journal

    def replaced(self, directory: Path, files: Mapping[str, FileDigest], step: str, note: Any) -> Self:
        """The journal after a step that replaced files: they and the step's note are entered at once.

        Raises:
            StorageError: the journal cannot be written.
        """
        journal = replace(self, finished={**self.finished, **files}, notes={**self.notes, step: note})
        journal._save(directory)
        return journal

    def check_same(self, wanted: "Journal") -> None:
        """Compare the run that began (`self`) with the one that is asked for.

        Raises:
            ResumeError: naming the first difference: version, then input files, options, plan.
        """
        difference = (
            _difference("moeq version", self.moeq_version, wanted.moeq_version)
            or _file_difference(self.fingerprint, wanted.fingerprint)
            or _option_difference(_plain(self.options), _plain(wanted.options))
            or _difference("plan", self.plan_hash[:12], wanted.plan_hash[:12])
        )
        if difference or self.plan_hash != wanted.plan_hash:
            raise ResumeError(
                f"the unfinished run in the output directory is another one: {difference or 'the plan differs'}",
                fix=f"undo the change, or {_AGAIN}",
            )

    def _save(self, directory: Path) -> None:
        write_file_atomic(directory / JOURNAL_NAME, codec.canonical(self.to_dict()) + b"\n")


def remove_journal(directory: Path) -> None:
    """Forget the run; call it when the output is complete."""
    (directory / JOURNAL_NAME).unlink(missing_ok=True)


def _still_there(directory: Path, finished: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    kept = {}
    for name, digest in finished.items():
        try:
            actual = hash_file(directory / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ResumeError(
                f"a finished file cannot be read: {error.strerror}", file=directory / name, fix="remove it; run again"
            ) from error
        if actual != digest:
            raise ResumeError(
                f"a finished file changed: {_digest_difference(digest, actual)}",
                file=directory / name,
                fix="remove it, and it will be written again",
            )
        kept[name] = digest
    return kept


def _digest_difference(before: FileDigest, now: FileDigest) -> str:
    if before.bytes != now.bytes:
        return f"size {before.bytes} -> {now.bytes}"
    return f"sha256 {before.sha256[:12]} -> {now.sha256[:12]}"


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a reader of JSON sees them: tuples are lists, dataclasses are dicts."""
    encoded: dict[str, Any] = codec.encode(options)
    return encoded


def _difference(what: str, before: Any, now: Any) -> str | None:
    return None if before == now else f"{what} was {before}, is {now}"


def _option_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for key in sorted(set(before) | set(now)):
        if key not in before:
            return f"option {key} was not set, is {now[key]}"
        if key not in now:
            return f"option {key} was {before[key]}, is not set"
        if before[key] != now[key]:
            return f"option {key} was {before[key]}, is {now[key]}"
    return None


def _file_difference(before: Mapping[str, FileStamp], now: Mapping[str, FileStamp]) -> str | None:
    for name in sorted(set(before) | set(now)):
        if name not in now:
            return f"input file {name} is gone"
        if name not in before:
            return f"input file {name} is new"
        old, new = codec.encode(before[name]), codec.encode(now[name])
        for key, word in _STAMP_WORDS.items():
            if old[key] != new[key]:
                return f"input file {name} changed: {word} {str(old[key])[:20]} -> {str(new[key])[:20]}"
    return None

"""Rows of text as people have them: plain, prompts with their completions, conversations; and tables of such rows."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moeq.errors import CalibrationError

Message = dict[str, Any]
Template = Callable[[list[Message], Any], str]
"""(messages, tools) -> the text that the model sees; a tokenizer's chat template."""
TABLES: Final = (".parquet", ".arrow")
ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Names of roles in "conversations" -> those of chat templates."""
WAYS: Final = '"text", "messages", "conversations", or "prompt" with "completion"'


def document(row: Mapping[str, Any], where: str, file: Path, template: Template | None = None) -> str:
    """The text of a row.

    Args:
        row: has one of `WAYS`.
        where: of the row, for messages.
        file: likewise.
        template: the tokenizer's; without one, messages are written one under the other.

    Raises:
        CalibrationError: it has none of them, one is of another type, or the template refuses.
    """
    text = row.get("text")
    if not isinstance(text, str):
        messages = _messages(row, where, file)
        text = _plain(messages) if template is None else _templated(messages, row, template, where, file)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message, fix = f"{where} has half a surrogate pair in its text", "write the file as UTF-8 again"
        raise CalibrationError(message, file=file, fix=fix) from error
    return text


def _messages(row: Mapping[str, Any], where: str, file: Path) -> list[Message]:
    for name in ("messages", "conversations", "conversation"):
        given = row.get(name)
        if isinstance(given, Sequence) and not isinstance(given, str) and given:
            return [_message(each, where, file) for each in given]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    for name in ("prompt", "completion"):  # lists of messages
        if isinstance(row.get(name), list):
            rest = row.get("completion") if name == "prompt" else []
            return [_message(each, where, file) for each in [*row[name], *(rest if isinstance(rest, list) else [])]]
    raise CalibrationError(f'{where} has no string "text" and no conversation', file=file, fix=f"write {WAYS}")


def _message(given: Any, where: str, file: Path) -> Message:
    if isinstance(given, Mapping):
        message = {key: value for key, value in given.items() if value is not None}
        if "from" in message and "value" in message:
            return {"role": ROLES.get(str(message["from"]), str(message["from"])), "content": message["value"]}
        if "role" in message and ("content" in message or "tool_calls" in message):
            return {"content": "", **message}
    message_ = f"{where} has a message without role and content"
    raise CalibrationError(message_, file=file, fix='write {"role": ..., "content": ...} for each message')


def _templated(messages: list[Message], row: Mapping[str, Any], template: Template, where: str, file: Path) -> str:
    try:
        return template(messages, row.get("tools"))
    except Exception as error:  # templates are programs of the checkpoint, and raise what they like
        line = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"the chat template refuses {where}: {line}", file=file, fix="give messages as the model's card shows them"
        ) from error


def _plain(messages: list[Message]) -> str:
    """Contents one under the other; of a list of parts, the text."""
    texts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            parts = (part.get("text") for part in content if isinstance(part, Mapping))
            content = "\n".join(part for part in parts if part)
        texts.append(str(content))
    return "\n".join(text for text in texts if text.strip())


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or arrow file.

    Raises:
        CalibrationError: pyarrow is missing, or cannot read the file.
    """
    try:
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise CalibrationError(
            f"a {path.suffix} file needs the package pyarrow", file=path, fix="run `pip install pyarrow`"
        ) from error
    try:
        if path.suffix == ".parquet":
            batches = importlib.import_module("pyarrow.parquet").ParquetFile(path).iter_batches()
            for batch in batches:
                yield from batch.to_pylist()
            return
        ipc = importlib.import_module("pyarrow.ipc")
        with arrow.memory_map(str(path)) as file:
            try:
                reader = ipc.open_stream(file)
            except arrow.ArrowInvalid:
                reader = ipc.open_file(file)
            for batch in reader.read_all().to_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise CalibrationError(f"cannot be read: {error}", file=path, fix="write the file again") from error

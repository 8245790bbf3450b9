"""Texts as people have them: rows, conversations, tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from moeq.calibration.rows import document
from moeq.calibration.tokens import read_documents, read_text
from moeq.errors import CalibrationError

HERE = Path("a.jsonl")
USER, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}


def template(messages: list[dict[str, Any]], tools: Any) -> str:
    return "".join(f"<{each['role']}>{each['content']}" for each in messages) + ("" if tools is None else f"|{tools}")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "plain", "messages": [USER]}, "plain"),
        ({"messages": [USER, ANSWER]}, "<user>why<assistant>so"),
        ({"messages": [{"role": "system", "content": "be"}, USER]}, "<system>be<user>why"),
        ({"messages": [USER], "tools": ["f"]}, "<user>why|['f']"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "<assistant>"),
        (
            {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
            "<user>why<assistant>so",
        ),
        ({"prompt": "why", "completion": "so"}, "<user>why<assistant>so"),
        ({"prompt": [USER], "completion": [ANSWER]}, "<user>why<assistant>so"),
    ],
)
def test_rows_go_through_the_template(row: dict[str, Any], wanted: str) -> None:
    assert document(row, "line 1", HERE, template) == wanted


def test_without_a_template_contents_stand_under_each_other() -> None:
    assert document({"messages": [USER, ANSWER]}, "line 1", HERE) == "why\nso"
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}
    assert document({"messages": [parts]}, "line 1", HERE) == "what is this"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "line 7 has no string"),
        ({"text": 3}, "line 7 has no string"),
        ({"messages": []}, "line 7 has no string"),
        ({"messages": ["why"]}, "line 7 has a message without"),
        ({"messages": [{"content": "why"}]}, "line 7 has a message without"),
        ({"prompt": "why"}, "line 7 has no string"),
    ],
)
def test_other_rows_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=said) as caught:
        document(row, "line 7", HERE, template)
    assert "messages" in caught.value.fix or "role" in caught.value.fix


def test_a_template_that_refuses_is_named() -> None:
    def refuse(messages: list[dict[str, Any]], tools: Any) -> str:
        raise ValueError("roles must alternate")

    with pytest.raises(CalibrationError, match=r"refuses line 2.*roles must alternate"):
        document({"messages": [USER, USER]}, "line 2", HERE, refuse)


def test_files_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [USER, ANSWER]}) for _ in range(3)))
    assert read_documents(path, template=template) == ["<user>why<assistant>so"] * 3
    assert read_text(path).startswith("why\nso")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table, path = arrow.table({"text": ["a", "b"], "more": [1, 2]}), tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        with arrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    assert read_documents(path) == ["a", "b"]
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_documents(path)

import pytest

from moeq.report.tables import human_bytes, human_number, markdown_table, plain_table


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (8_827_384, "8.83 MB"),
        (12 * 10**9, "12.0 GB"),
        (1234 * 10**15, "1234 PB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text


def test_human_number() -> None:
    assert [human_number(value) for value in (131.0721, 0.0123456, 1.0, 0.0, 123456.7)] == [
        "131.07", "0.012346", "1", "0", "123457",
    ]  # fmt: skip


def test_markdown_table() -> None:
    assert markdown_table(("part", "bytes", "note"), [("a|b", "1,234", ""), ("c\nd", "5.00 kB", "2x")]) == (
        "| part | bytes | note |\n| --- | ---: | --- |\n| a\\|b | 1,234 |  |\n| c d | 5.00 kB | 2x |"
    )


def test_plain_table() -> None:
    rows = [("experts", 12, "3.1%"), ("rest", 3456, "")]
    assert plain_table(("part", "n", "share"), rows) == (
        "part        n  share\n"
        "experts    12   3.1%\n"
        "rest     3456"
    )  # fmt: skip


def test_tables_without_rows() -> None:
    assert markdown_table(("a", "b"), []) == "| a | b |\n| --- | --- |"
    assert plain_table(("a", "b"), []) == "a  b"


@pytest.mark.parametrize("table", [markdown_table, plain_table])
def test_ragged_rows(table) -> None:
    with pytest.raises(ValueError, match="2 cells"):
        table(("a", "b"), [("1",)])


def test_sentences_are_fitted_to_a_terminal_and_tables_are_not() -> None:
    from moeq.cli_text import fitted

    table = plain_table(("name", "a number"), [("a long name of something", "1")])
    sentence = "nothing appears under that name until everything is written"
    found = fitted(f"{table}\n\n{sentence}", 24).splitlines()
    assert found[:2] == table.splitlines()
    assert all(len(line) <= 24 for line in found[3:])
    assert " ".join(" ".join(found[3:]).split()) == sentence

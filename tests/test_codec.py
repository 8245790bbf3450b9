import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq import codec
from moeq.errors import ArtifactError
from moeq.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    name: str
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    maybe: float | None = None
    flag: bool = False
    free: Any = None


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INNER = st.builds(Inner, name=st.text(), pair=st.tuples(st.integers(), FLOATS))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
    max_leaves=8,
)
OUTER = st.builds(
    Outer,
    inner=INNER,
    many=st.lists(INNER).map(tuple),
    table=st.dictionaries(st.text(), st.integers()),
    maybe=st.none() | FLOATS,
    flag=st.booleans(),
    free=JSON,
)


@given(OUTER)
def test_round_trip_through_text(value: Outer) -> None:
    text = codec.canonical(value)
    assert codec.decode(Outer, json.loads(text)) == value
    assert codec.canonical(codec.decode(Outer, json.loads(text))) == text


@given(JSON)
def test_any_json_is_decoded_or_refused(data: Any) -> None:
    try:
        message = "$" if isinstance(codec.decode(Outer, data), Outer) else ""
    except ArtifactError as error:
        message = error.message
    assert "$" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"\$ must be an object"),
        ({}, r"missing key 'inner' at \$"),
        ({"inner": {}}, r"missing key 'name' at \$\.inner"),
        ({"inner": {"name": "a"}, "pie": 1}, r"unknown key 'pie' at \$"),
        ({"inner": {"name": "a", "pie": 1}}, r"unknown key 'pie' at \$\.inner"),
        ({"inner": {"name": 1}}, r"\$\.inner\.name must be str"),
        ({"inner": {"name": "a", "pair": [1]}}, r"\$\.inner\.pair must be 2 items"),
        ({"inner": {"name": "a", "pair": [1.5, 1]}}, r"\$\.inner\.pair\[0\] must be int"),
        ({"inner": {"name": "a", "pair": [True, 1]}}, r"\$\.inner\.pair\[0\] must be int"),
        ({"inner": {"name": "a"}, "many": {}}, r"\$\.many must be a list"),
        ({"inner": {"name": "a"}, "many": [{"name": None}]}, r"\$\.many\[0\]\.name must be str"),
        ({"inner": {"name": "a"}, "table": {"x": "y"}}, r"\$\.table\.x must be int"),
        ({"inner": {"name": "a"}, "maybe": "y"}, r"\$\.maybe must be float"),
        ({"inner": {"name": "a"}, "maybe": True}, r"\$\.maybe must be float"),
        ({"inner": {"name": "a"}, "flag": 1}, r"\$\.flag must be bool"),
    ],
)
def test_strictness_names_the_place(data: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        codec.decode(Outer, data)


def test_whole_numbers_pass_for_floats() -> None:
    value = codec.decode(Outer, {"inner": {"name": "a"}, "maybe": 3})
    assert isinstance(value.maybe, float)


def test_what_a_dataclass_refuses_is_named_with_its_place() -> None:
    with pytest.raises(ArtifactError, match=r"\$\.bits: 7 is not supported.*choose one of"):
        codec.decode(QuantSpec, {"bits": 7})


def test_canonical_text_ignores_the_order_of_keys() -> None:
    assert codec.canonical({"b": 1, "a": (2, 3)}) == b'{"a":[2,3],"b":1}'
    assert codec.digest({"b": 1, "a": 2}) == codec.digest({"a": 2, "b": 1}) != codec.digest({"a": 2, "b": 2})
    with pytest.raises(ValueError, match="JSON"):
        codec.canonical(math.nan)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"a": }', b"[" * 100_000])
def test_files_that_are_not_json(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"file\.json"):
        codec.read_json(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        codec.read_json(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="directory"):
        codec.read_json(tmp_path)

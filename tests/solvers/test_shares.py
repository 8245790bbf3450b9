from fractions import Fraction

import numpy as np
import pytest

from moeq.errors import OptionError
from moeq.solvers.shares import C2C3, Condition, parse_shares, shares_for

GROUPS = [np.arange(0, 8), np.arange(8, 18)]


def test_texts() -> None:
    assert parse_shares("none") == parse_shares("  ") == ()
    assert parse_shares(" C2C3 ") == C2C3
    assert parse_shares("3:1, 2:1") == (Condition(bits=3, count=1), Condition(bits=2, count=1))
    assert parse_shares("3+:12.5%") == (Condition(bits=3, above=True, percent=Fraction(25, 2)),)
    assert parse_shares("3:1,3+:2") == (Condition(bits=3, count=1), Condition(bits=3, above=True, count=2))


@pytest.mark.parametrize(
    "text", ["c2", "3", "3:", ":1", "3:x", "3:1.5", "3:-1", "-3:1", "3:1;2:1", "3:1,", "3++:1", "3:1%%", "٣:1"]
)
def test_texts_that_are_no_shares(text: str) -> None:
    with pytest.raises(OptionError, match="is no share") as raised:
        parse_shares(text)
    assert raised.value.option == "shares"
    assert "c2c3" in raised.value.fix


@pytest.mark.parametrize(("text", "message"), [("3:101%", "above 100 %"), ("3:1,2:1,3:2", "names a width twice")])
def test_texts_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        parse_shares(text)
    assert raised.value.option == "shares"


def test_c2c3_is_the_highest_and_the_second_highest_width() -> None:
    made = shares_for(C2C3, (3, 1, 2, 3), GROUPS)
    assert [(each.candidates, each.count) for each in made] == [((2,), 1), ((0, 3), 1)] * 2
    np.testing.assert_array_equal(made[0].members, GROUPS[0])
    np.testing.assert_array_equal(made[2].members, GROUPS[1])


def test_percentages_round_up_and_plus_means_or_more() -> None:
    made = shares_for(parse_shares("3+:30%,2:0%"), (1, 2, 3, 4), GROUPS)
    assert [(each.candidates, each.count) for each in made] == [((2, 3), 3), ((2, 3), 3)]
    made = shares_for(parse_shares("2+:1"), (1, 3, 4), GROUPS[:1])
    assert made[0].candidates == (1, 2)
    # 7 % of 100 is 7, not 8, as floating point would have it.
    assert shares_for(parse_shares("2:7%"), (1, 2), [np.arange(100)])[0].count == 7


@pytest.mark.parametrize(
    ("text", "bits", "message"),
    [
        ("5:1", (1, 2, 3), "no candidate has 5 bits"),
        ("2:1", (1, 3), "no candidate has 2 bits"),
        ("4+:1", (1, 2, 3), "4 bits or more"),
        ("c2c3", (2, 2), "two widths"),
        ("3:9", (1, 2, 3), "9 units of group 0, which has 8"),
        ("3:60%,2:60%", (1, 2, 3), "10 units of group 0"),
        ("3:4,2+:3,1:5", (1, 2, 3), "9 units of group 0"),
    ],
)
def test_shares_that_the_candidates_or_groups_cannot_meet(text: str, bits: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        shares_for(parse_shares(text), bits, GROUPS)
    assert raised.value.option == "shares"
    assert raised.value.fix


def test_demands_that_overlap_do_not_add_up() -> None:
    # Eight units: four of three bits are among the eight of two or more.
    assert len(shares_for(parse_shares("3:4,2+:8"), (1, 2, 3), GROUPS[:1])) == 2

"""Options of costs come from command lines: anything may be in them."""

import pytest

from moeq.costs.options import check_choice, check_number, check_switch
from moeq.errors import OptionError


def test_what_may_pass() -> None:
    check_choice("form", "full", ("diagonal", "full"))
    check_switch("linear", False)
    check_number("floor", 0)
    check_number("a", 1.5)
    check_number("seqlen", 2, 2, whole=True)


@pytest.mark.parametrize("value", ["1", True, None, float("nan"), float("inf"), -1, 1])
def test_numbers_that_may_not(value: object) -> None:
    with pytest.raises(OptionError, match=r"option floor.*from 2 on"):
        check_number("floor", value, 2)


def test_other_refusals() -> None:
    with pytest.raises(OptionError, match="whole number from 0 on"):
        check_number("seqlen", 2.0, whole=True)
    with pytest.raises(OptionError, match="true or false"):
        check_switch("linear", 1)
    with pytest.raises(OptionError, match="one of diagonal, full"):
        check_choice("form", None, ("diagonal", "full"))

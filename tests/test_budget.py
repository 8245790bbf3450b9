import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq.budget import UNITS, Budget, parse_size
from moeq.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("7.5GiB", 15 * 2**29),
        (" 900 mb ", 900 * 10**6),
        ("12", 12),
        (12, 12),
        ("1kib", 1024),
        ("0.5KB", 500),
        ("3B", 3),
        ("0.1GB", 10**8),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "8 apples", "8G B", "-8GB", "8,5GB", "1e9", "0x10", "inf", "nan", "8GBs", "8Gb/s", ".5GB", "8.GB"],
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(BudgetError, match=r"8GB, 7\.5GiB or 900MB"):
        parse_size(text)


@given(st.integers(0, 2**50), st.sampled_from(sorted(UNITS)))
def test_whole_numbers_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number} {unit}") == number * UNITS[unit]


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except BudgetError:
        size = 0
    assert size >= 0


@pytest.mark.parametrize("given", [{}, {"bits": 3.0, "size": 10}, {"bits": 3.0, "code_bits": 3.0}])
def test_exactly_one_unit(given: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="exactly one"):
        Budget(**given)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"bits": 0.0}, "bits"),
        ({"bits": 16.01}, "bits"),
        ({"bits": float("nan")}, "bits"),
        ({"code_bits": -1.0}, "bits"),
        ({"code_bits": 17.0}, "bits"),
        ({"size": 0}, "size"),
    ],
)
def test_impossible_budgets_name_the_option(given: dict[str, float], option: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**given)
    assert caught.value.option == option


def test_a_size_may_be_large() -> None:
    assert Budget(size=10**12).size == 10**12

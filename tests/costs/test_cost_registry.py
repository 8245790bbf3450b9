import pytest

from moeq.costs.registry import COSTS, make_cost
from moeq.costs.spectral_tail import SpectralTail
from moeq.costs.weight_error import WeightError
from moeq.errors import OptionError


def test_costs_by_name() -> None:
    assert type(make_cost("spectral-tail", gamma=12)) is SpectralTail
    assert type(make_cost("weight-error", relative=True)) is WeightError
    assert make_cost("spectral-tail", gamma=12).needs == "weights"


@pytest.mark.parametrize("name", list(COSTS))
def test_every_cost_says_what_it_needs(name: str) -> None:
    assert make_cost(name).needs in ("weights", "activations", "gradients")


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(OptionError, match="spectral-tail, weight-error, fisher, output-error") as caught:
        make_cost("alpha")
    assert caught.value.option == "cost"


def test_unknown_options_are_refused_with_the_choices() -> None:
    with pytest.raises(OptionError, match="quantizer, relative") as caught:
        make_cost("weight-error", gamma=3)
    assert caught.value.option == "gamma"

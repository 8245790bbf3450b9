import pytest

from moeq.errors import OptionError
from moeq.quantizers.registry import QUANTIZERS, make_quantizer


def test_names() -> None:
    names = "minmax rtn hqq ggml ggml-rtn gptq gptq-mc alternating trellis vector"
    assert list(QUANTIZERS) == names.split()
    needs = {name: make_quantizer(name).needs_hessian for name in QUANTIZERS}
    assert {name for name, needed in needs.items() if needed} == {"ggml", "gptq", "gptq-mc", "trellis", "vector"}


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(OptionError, match="minmax, rtn, hqq, ggml, ggml-rtn, gptq, gptq-mc"):
        make_quantizer("awq")


def test_unknown_options_list_the_choices() -> None:
    with pytest.raises(OptionError, match="damp, act_order"):
        make_quantizer("gptq", damping=1)
    with pytest.raises(OptionError, match="has no options"):
        make_quantizer("minmax", refits=1)


def test_options_reach_the_quantizer() -> None:
    with pytest.raises(OptionError, match="damping"):
        make_quantizer("gptq", damp=-1.0)

import pytest

from moeq.errors import OptionError
from moeq.methods import METHODS, method
from moeq.quantizers.registry import make_quantizer
from moeq.spec import LAYOUTS


@pytest.mark.parametrize("name", METHODS)
def test_rows_name_things_that_exist(name: str) -> None:
    row = method(name)
    assert row.unit in ("none", "expert", "matrix")
    assert row.layout in LAYOUTS
    assert not make_quantizer(row.dataless).needs_hessian
    make_quantizer(row.quantizer)


def test_unknown_methods_are_refused_with_the_choices() -> None:
    with pytest.raises(OptionError, match="choose one of uniform"):
        method("magic")

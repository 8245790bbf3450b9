import pytest

from moeq.costs.registry import make_cost
from moeq.errors import OptionError
from moeq.methods import METHODS, method
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import ROUTER_LOSSES, SCOPES
from moeq.solvers.registry import make_solver
from moeq.solvers.shares import parse_shares
from moeq.spec import BITS, LAYOUTS


@pytest.mark.parametrize("name", METHODS)
def test_rows_name_things_that_exist(name: str) -> None:
    row = method(name)
    assert row.unit in ("none", "expert", "matrix", "component")
    assert row.layout in LAYOUTS
    assert not make_quantizer(row.dataless).needs_hessian
    make_quantizer(row.quantizer)
    assert (row.cost is None) == (row.unit == "none") == (row.solver is None)
    if row.cost is not None:
        make_cost(row.cost, **row.cost_options)
        parse_shares(row.shares)
        if row.unit == "component":  # chosen by threshold, which is no solver of tables
            assert (row.solver, row.layout) == ("threshold", "spectral")
        else:
            make_solver(str(row.solver))
        assert set(row.candidates) - {0} <= set(BITS)
        assert (0 in row.candidates) <= (row.unit == "component")
        assert list(row.candidates) == sorted(row.candidates)
    assert row.scope in SCOPES
    assert row.router in ROUTER_LOSSES


def test_unknown_methods_are_refused_with_the_choices() -> None:
    with pytest.raises(OptionError, match="choose one of auto, uniform"):
        method("magic")

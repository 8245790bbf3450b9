import inspect
import subprocess
import sys

import moeq
from moeq.recipe import Recipe

IMPORT = """
import socket, sys

def refuse(*args, **options):
    raise AssertionError("importing moeq used the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
before = set(sys.modules)
import moeq
for name in moeq.__all__:
    getattr(moeq, name)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
assert "moeq" in AUTO_QUANTIZATION_CONFIG_MAPPING
"""


def test_the_public_names_are_frozen() -> None:
    assert moeq.__all__ == sorted(moeq.__all__)
    assert set(moeq.__all__) == {
        "CostTable",
        "EvalResult",
        "Inventory",
        "MoeqError",
        "Plan",
        "QuantSpec",
        "Recipe",
        "Unit",
        "__version__",
        "allocate",
        "compare",
        "doctor",
        "measure",
        "pareto",
        "export",
        "imatrix",
        "repair",
        "report",
        "evaluate",
        "inspect",
        "load",
        "plan",
        "push",
        "quantize",
        "stored_bytes",
        "verify",
    }


def test_everything_public_is_documented() -> None:
    for name in moeq.__all__:
        value = getattr(moeq, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_importing_prints_nothing_and_uses_no_network() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")


def test_options_are_keyword_only() -> None:
    for call in (moeq.quantize, moeq.plan, moeq.evaluate, moeq.load, moeq.verify):
        positional = [
            name
            for name, parameter in inspect.signature(call).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        assert positional in (["model", "output"], ["model"], ["model", "text"], ["directory"]), call
    assert all(
        parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in inspect.signature(Recipe).parameters.values()
    )

"""moeq makes Mixture-of-Experts language models small.

Importing it registers the quant_method "moeq" with transformers, through the public hooks: this is
what lets `from_pretrained` load packed checkpoints. It has no other effect.
"""

from moeq.api import (
    allocate,
    compare,
    doctor,
    evaluate,
    export,
    imatrix,
    inspect,
    measure,
    pareto,
    plan,
    push,
    quantize,
    repair,
    report,
    verify,
)
from moeq.artifacts import CostTable, EvalResult, Inventory, Plan
from moeq.errors import MoeqError
from moeq.integrations import transformers as _transformers
from moeq.recipe import Recipe
from moeq.runtime.load import load
from moeq.spec import QuantSpec, Unit, stored_bytes
from moeq.version import __version__

_transformers.register()

__all__ = [
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
    "evaluate",
    "export",
    "imatrix",
    "inspect",
    "load",
    "measure",
    "pareto",
    "plan",
    "push",
    "quantize",
    "repair",
    "report",
    "stored_bytes",
    "verify",
]

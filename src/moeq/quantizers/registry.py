"""All quantizers by name."""

import inspect
from typing import Any, Final

from moeq.errors import OptionError
from moeq.quantizers.alternating import Alternating
from moeq.quantizers.base import Quantizer
from moeq.quantizers.ggml import Ggml, GgmlRtn
from moeq.quantizers.gptq import Gptq
from moeq.quantizers.gptq_mc import GptqMc
from moeq.quantizers.hqq import Hqq
from moeq.quantizers.rtn import MinMax, Rtn
from moeq.quantizers.trellis import Trellis
from moeq.quantizers.vector import Vector

QUANTIZERS: Final[dict[str, type[Quantizer]]] = {
    "minmax": MinMax,
    "rtn": Rtn,
    "hqq": Hqq,
    "ggml": Ggml,
    "ggml-rtn": GgmlRtn,
    "gptq": Gptq,
    "gptq-mc": GptqMc,
    "alternating": Alternating,
    "trellis": Trellis,
    "vector": Vector,
}


def make_quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer `name`, made with `options`.

    Raises:
        OptionError: no such quantizer, or it has no such option.
    """
    if name not in QUANTIZERS:
        raise OptionError(
            f"no quantizer is called {name!r}", option="quantizer", fix=f"choose one of {', '.join(QUANTIZERS)}"
        )
    make = QUANTIZERS[name]
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            choices = f"its options are {', '.join(known)}" if known else "it has no options"
            raise OptionError(f"quantizer {name} does not know {option!r}", option=option, fix=choices)
    return make(**options)

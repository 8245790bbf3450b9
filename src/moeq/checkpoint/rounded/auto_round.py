"""AutoRound's own format: the words of GPTQ or AWQ, under another name, told apart by `packing_format`.

Facts: AutoRound 0.16.1. "auto_round" has GPTQ's words with zeros as they are meant, "auto_round:auto_gptq" with zeros
of one less, "auto_round:auto_awq" has AWQ's.
"""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from moeq.checkpoint.rounded.awq import Awq
from moeq.checkpoint.rounded.base import Format, Headers, Read
from moeq.checkpoint.rounded.gptq import Gptq
from moeq.errors import TensorError
from moeq.spec import TensorInfo

PACKINGS: Final[dict[str, tuple[Format, dict[str, str]]]] = {
    "auto_round": (Gptq(), {"checkpoint_format": "gptq_v2"}),
    "auto_round:auto_gptq": (Gptq(), {"checkpoint_format": "gptq"}),
    "auto_round:auto_awq": (Awq(), {}),
}


class AutoRound(Format):
    """As the packing has it; what is found belongs to that format."""

    title = "AutoRound"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every linear that has codes."""
        packing = str(facts.get("packing_format", "auto_round"))
        if packing not in PACKINGS:
            raise TensorError(
                f"AutoRound's packing {packing!r} is not read", file="config.json", fix=f"use {', '.join(PACKINGS)}"
            )
        form, more = PACKINGS[packing]
        return form.weights({**facts, **more}, headers, read)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """Never asked for: weights are of the format that the packing is."""
        raise NotImplementedError

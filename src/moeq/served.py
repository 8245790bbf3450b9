"""What programs can hold that packed checkpoints are made for, as data: `--serve`."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One of them.

    Attributes:
        alike: what gets one width: a "layer", a "kind" of matrix in a layer, or "" if every unit has its own.
        levels: the level set of everything packed, "" for what is best at a width.
        candidates: widths that units get where nothing was said, () for the method's own.
        quantizer: what rounds experts with calibration text, "" for the method's own.
        dataless: the same without text, and what rounds the other linears.
    """

    alike: str = ""
    levels: str = ""
    candidates: tuple[int, ...] = ()
    quantizer: str = ""
    dataless: str = ""

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The only ones that make what it holds; () for all of single weights."""
        return (self.quantizer, self.dataless) if self.quantizer else ()


SERVES: Final = {
    "moeq": Served(),
    "vllm-native": Served(alike="layer", levels="sym"),
    "gguf": Served(alike="kind", levels="ggml", candidates=(2, 3, 4, 5, 6), quantizer="ggml", dataless="ggml-rtn"),
}
"""moeq: itself; vllm-native: `moeq export compressed-tensors`; gguf: `moeq export gguf`."""

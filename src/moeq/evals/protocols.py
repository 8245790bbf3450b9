"""How papers measure, as presets of `moeq eval`: only what is measured alike can be compared."""

from dataclasses import dataclass
from typing import Final

from moeq.errors import OptionError

WIKITEXT: Final = "Salesforce/wikitext:wikitext-2-raw-v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A way of measuring.

    Attributes:
        dataset: hub dataset of the text, "org/name:config", its rows joined by blank lines.
        seqlen: tokens of a window; windows do not overlap.
        tasks: tasks of lm-evaluation-harness.
        shots: examples shown before each question.
        seed: of the tasks.
        source: where it is described, and what is not known of it.
    """

    dataset: str = WIKITEXT
    seqlen: int = 2048
    tasks: tuple[str, ...] = ()
    shots: int = 0
    seed: int = 0
    source: str


PROTOCOLS: Final[dict[str, Protocol]] = {
    "gptq-paper": Protocol(source="Frantar et al. 2022: WikiText-2 test, windows of 2048"),
    "alphaq": Protocol(
        tasks=("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq"),
        source="AlphaQ: six tasks without examples, plain mean; acc or acc_norm is not stated",
    ),
    "gemq": Protocol(
        tasks=("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mathqa", "mmlu"),
        source="GEMQ: seven tasks without examples, acc_norm where there is one; also C4, which is not in this preset",
    ),
    "bitsmoe": Protocol(
        tasks=("mmlu", "hellaswag", "winogrande", "openbookqa", "mathqa", "gsm8k"),
        seed=42,
        source="BitsMoE: seven tasks, of which HumanEval runs code and is left out; its perplexities overlap windows",
    ),
    "tileq": Protocol(
        tasks=("arc_challenge", "arc_easy", "piqa", "winogrande", "hellaswag"),
        source="TileQ: plain acc without examples; MMLU with five is not in this preset",
    ),
}
"""Name -> protocol."""


def protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        OptionError: nobody knows it.
    """
    if name not in PROTOCOLS:
        raise OptionError(f"{name!r} is no way of measuring", option="preset", fix=f"give {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]

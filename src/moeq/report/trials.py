"""What method auto tried, in words. Pure functions; no torch, no files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeq.report.tables import human_number, markdown_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One checkpoint that was made to be compared.

    Attributes:
        name: of the candidate.
        options: what its recipe has beside the budget and the texts.
        expert_bytes: what its routed experts take.
        bits: the same, per expert weight.
        seconds: what making it took.
        kl: text -> mean KL(original || packed) on windows that calibration did not see, nats per token.
        error: why it could not be made, "" if it could.
        chosen: whether it is the result.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    expert_bytes: int = 0
    bits: float = 0.0
    seconds: float = 0.0
    kl: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    chosen: bool = False


def mean_kl(trial: Trial) -> float:
    """The mean over texts."""
    return sum(trial.kl.values()) / len(trial.kl)


def rows_of(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Header and rows: each trial, its KL by text, and what became of it."""
    texts = list(dict.fromkeys(text for trial in trials for text in trial.kl))
    rows = [("candidate", "bits", *(f"KL {text}" for text in texts), "")]
    for trial in trials:
        verdict = trial.error or ("chosen" if trial.chosen else "")
        kls = (human_number(trial.kl[text]) if text in trial.kl else "" for text in texts)
        rows.append((trial.name, f"{trial.bits:.4f}" if trial.bits else "", *kls, verdict))
    return rows


def card_section(trials: Sequence[Trial], note: str) -> str:
    """What the model card says of it."""
    header, *rows = rows_of(trials)
    if not any(trial.kl for trial in trials):
        return f"## How this was chosen\n\n{note[:1].upper()}{note[1:]}.\n"
    return (
        "## How this was chosen\n\nAll candidates obey the same budget. KL to the original, nats per token, on text "
        "that calibration did not see; chosen is the least mean of those that no text is worse with than with "
        "`uniform`.\n\n"
        f"{markdown_table(header, rows)}\n"
    )

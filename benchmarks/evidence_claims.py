"""The papers' claims, each decided by two rows of benchmarks/evidence.py that differ in nothing but the claim."""

import statistics
from dataclasses import dataclass
from typing import Any

from evidence_rows import BITS
from harness import TEXTS, mean_kl

from moeq.report.tables import markdown_table

Row = dict[str, Any]
OTHER = "ref-qwen3moe-22m"
CLEAR = 0.02
"""Ratios nearer to 1 than this decide nothing: seeds of the calibration text move a row by as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Something that a paper says.

    Attributes:
        name: of the claim.
        text: what is said.
        row: that should be better.
        control: than this one.
    """

    name: str
    text: str
    row: str
    control: str


CLAIMS = (
    Claim(name="a1", text="bits by alpha beat uniform bits", row="alphaq", control="uniform"),
    Claim(name="a2", text="alpha tells more than chance", row="alphaq", control="alphaq, alpha shuffled"),
    Claim(name="a3", text="a heavy tail is what needs bits", row="alphaq", control="alphaq, alpha reversed"),
    Claim(name="a4", text="tail times noise beats noise alone", row="alphaq", control="alphaq, gamma 0"),
    Claim(
        name="g1", text="global allocation of experts beats uniform bits", row="gemq, expert units", control="uniform"
    ),
    Claim(name="g2", text="one global program beats layers apart (PMQ)", row="gemq, expert units", control="pmq"),
    Claim(
        name="g3",
        text="tuning routers afterwards helps",
        row="gemq, expert units, router tuning",
        control="gemq, expert units",
    ),
    Claim(
        name="g4",
        text="falling budgets, measured again, help",
        row="gemq, matrix units, progressive",
        control="gemq, matrix units",
    ),
    Claim(name="b1", text="components of a shared basis beat GPTQ", row="bitsmoe", control="uniform"),
    Claim(name="b2", text="the SVD's basis beats none", row="bitsmoe", control="bitsmoe, identity basis"),
    Claim(name="b3", text="bits by the joint cost beat uniform ones", row="bitsmoe", control="bitsmoe, uniform bits"),
    Claim(name="b4", text="a global budget beats one per layer", row="bitsmoe", control="bitsmoe, budget per layer"),
    Claim(name="t1", text="shared factors beat none at the same bytes", row="tileq, rank 4", control="uniform"),
    Claim(
        name="t2",
        text="placing experts by their subspaces beats chance",
        row="tileq, rank 4",
        control="tileq, rank 4, random placement",
    ),
    Claim(
        name="t3",
        text="sharing in two dimensions beats private factors of the same bytes",
        row="tileq, rank 4",
        control="tileq, private factors of the same bytes",
    ),
    Claim(name="t4", text="rotating residuals helps", row="tileq, rotation", control="tileq, rank 4"),
)


def found_of(rows: list[Row], name: str, model: str) -> dict[int, Row]:
    """Seed -> the row of a name at the budget of the claims, calibrated on both texts."""
    return {
        row["seed"]: row
        for row in rows
        if (row["name"], row["model"], row["bits"], row["calibration"]) == (name, model, BITS, "both")
        and "error" not in row
    }


def ratios(claim: Claim, rows: list[Row], model: str) -> list[float]:
    """KL of the row / that of its control, seed by seed."""
    ours, control = (found_of(rows, name, model) for name in (claim.row, claim.control))
    return [mean_kl(ours[seed]) / mean_kl(control[seed]) for seed in sorted(set(ours) & set(control))]


def verdict(found: list[float]) -> str:
    """What seeds say that agree with each other by more than chance moves a row."""
    if not found:
        return "not measured"
    mean = statistics.fmean(found)
    if mean < 1 - CLEAR and max(found) < 1:
        return "holds"
    return "does not hold" if mean > 1 + CLEAR and min(found) > 1 else "makes no difference"


def shown(found: list[float]) -> str:
    """The mean, with the range if there are several."""
    if not found:
        return ""
    mean = f"{statistics.fmean(found):.2f}"
    return mean if len(found) < 2 else f"{mean} ({min(found):.2f} to {max(found):.2f})"


def decided(claim: Claim, rows: list[Row], model: str, other: str) -> tuple[str, ...]:
    """A line of the ledger."""
    ours, control = (found_of(rows, name, model) for name in (claim.row, claim.control))
    here, there = ratios(claim, rows, model), ratios(claim, rows, other)
    seeds = set(ours) & set(control)
    means = [[statistics.fmean(part[at][f"{t}_kl"] for at in seeds) for t in TEXTS] for part in (ours, control) if here]
    texts = " / ".join(f"{left / right:.2f}" for left, right in zip(*means, strict=True)) if here else ""
    words = (claim.name, claim.text, claim.row, claim.control)
    return (*words, shown(here), texts, f"**{verdict(here)}**", f"{shown(there)} {verdict(there)}".strip())


def claims_page(rows: list[Row], model: str, other: str = OTHER) -> str:
    """docs/evidence.md."""
    by_text = f"by text ({' / '.join(TEXTS)})"
    header = ("", "claim", "row", "control", "KL ratio", by_text, "verdict", f"on {other}")
    lines = [decided(claim, rows, model, other) for claim in CLAIMS]
    low, high = 1 - CLEAR, 1 + CLEAR
    return f"""# Evidence: what the papers say, and what was found

Made by `python benchmarks/evidence.py write` from [benchmarks/evidence.md](../benchmarks/evidence.md), which says on
what and how, and has notes on why. Model `{model}` (62 M parameters, 6 layers of 32 experts, top 4, well
trained), {BITS:g} stored bits per expert weight for both sides of every line, the same calibration (half C4, half a
mixture of domains). The ratio is that of mean KL to the original, the mean over seeds of the calibration text where
there are several, with their range. A claim holds where the ratio is below {low:g} and below 1 for every seed, and
does not hold where it is above {high:g} and above 1 for every seed. The last column has the same for a barely trained
model of 22 M parameters.

A verdict is about these models. The papers' models are larger by a factor of a hundred and more, trained on a thousand
times as much, and were judged by perplexity and tasks. `bitsmoe` stands for the method as it is here
([0028](decisions/0028-what-is-dropped-acts-together.md)); as in the paper, with D(0) = 1 and its quantizer, it
collapses on the trained model (see the rows).

{markdown_table(header, lines)}
"""

"""The papers' claims, each decided by two rows of benchmarks/evidence.py that differ in nothing but the claim."""

import statistics
from dataclasses import dataclass
from typing import Any

from evidence_rows import BITS
from harness import TEXTS, mean_kl

from moeq.report.tables import markdown_table

Row = dict[str, Any]
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


def found_of(rows: list[Row], name: str, model: str) -> list[Row]:
    """The rows of a name at the budget of the claims, calibrated on both texts."""
    return [
        row
        for row in rows
        if (row["name"], row["model"], row["bits"], row["calibration"]) == (name, model, BITS, "both")
        and "error" not in row
    ]


def decided(claim: Claim, rows: list[Row], model: str) -> tuple[str, ...]:
    """A line of the ledger."""
    ours, control = (found_of(rows, name, model) for name in (claim.row, claim.control))
    words = (claim.name, claim.text, claim.row, claim.control)
    if not ours or not control:
        return (*words, "", "", "not measured yet")
    seeds = {row["seed"] for row in ours} & {row["seed"] for row in control}
    pairs = [[statistics.fmean(mean_kl(r) for r in part if r["seed"] in seeds)] for part in (ours, control)]
    ratio = pairs[0][0] / pairs[1][0]
    texts = " / ".join(
        f"{statistics.fmean(r[f'{t}_kl'] for r in ours) / statistics.fmean(r[f'{t}_kl'] for r in control):.2f}"
        for t in TEXTS
    )
    verdict = "holds" if ratio < 1 - CLEAR else "does not hold" if ratio > 1 + CLEAR else "makes no difference"
    return (*words, f"{ratio:.2f}", texts, verdict)


def claims_page(rows: list[Row], model: str) -> str:
    """docs/evidence.md."""
    header = ("", "claim", "row", "control", "KL ratio", f"by text ({' / '.join(TEXTS)})", "verdict")
    lines = [decided(claim, rows, model) for claim in CLAIMS]
    seeds = max((len(found_of(rows, claim.row, model)) for claim in CLAIMS), default=0)
    count = "one seed" if seeds < 2 else f"up to {seeds} seeds"
    return f"""# Evidence: what the papers say, and what was found

Made by `python benchmarks/evidence.py write` from [benchmarks/evidence.md](../benchmarks/evidence.md), which says on
what and how. Model `{model}` (62 M parameters, 6 layers of 32 experts, top 4, well trained), {BITS:g} stored bits per
expert weight for both sides of every line, the same calibration (half C4, half a mixture of domains), {count}. The
ratio is that of mean KL to the original; below {1 - CLEAR:g} the claim holds here, above {1 + CLEAR:g} it does not.

A verdict is about this model. The papers' models are larger by a factor of a hundred and more, trained on a thousand
times as much, and were judged by perplexity and tasks.

{markdown_table(header, lines)}
"""

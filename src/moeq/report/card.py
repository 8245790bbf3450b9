"""The README.md of a packed checkpoint: what it is, how it was made, what was measured, how to load it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from moeq.report.tables import human_bytes, human_number, markdown_table

METRICS = {
    "perplexity": "perplexity",
    "kl": "KL divergence from the original, nats per token",
    "kl_stderr": "standard error of the KL divergence over windows",
    "top1_agreement": "top-1 agreement with the original",
    "router_overlap": "experts chosen as in the original",
    "blimp": "BLiMP accuracy",
}
"""Metric of an EvalResult -> its row in the card; others go under their own names."""

IDENTICAL = {"kl": 0.0, "top1_agreement": 1.0, "router_overlap": 1.0}
"""What the original scores against itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFacts:
    """Which text was used, and what each expert saw of it.

    Attributes:
        source: name of the text.
        nsamples: number of samples.
        seqlen: tokens per sample.
        seed: seed of the shuffle.
        tokens_hash: hash of the token ids.
        min_tokens: fewest tokens that any expert got.
        median_tokens: tokens that the median expert got.
        starved: experts that got too few tokens for statistics of their own.
        experts: all experts; 0 if rounding did not use the text, then no tokens per expert are told.
        uses: what the text was used for, as keys of `USES`.
        texts: what was used of each, in words.
    """

    source: str
    nsamples: int
    seqlen: int
    seed: int
    tokens_hash: str
    min_tokens: int
    median_tokens: int
    starved: int
    experts: int
    uses: tuple[str, ...] = ("rounding",)
    texts: tuple[str, ...] = ()


USES = {"costs": "choosing widths", "rounding": "rounding", "routers": "tuning the routers"}
"""What calibration text is used for -> the words for it, in the order in which it happens."""

OPTIMAL = 1e-9
"""Relative gaps up to this are rounding of the solver's sums."""

ROUTERS_KEPT = "Routers are unchanged, but errors of the experts still shift which experts later layers choose."
ROUTERS_TUNED = (
    "Routers were tuned to these experts on the calibration text: they choose other experts than the original's, "
    "and adapters or routers trained for the original may not fit."
)

ROUTER_LOSSES = {
    "task": "cross-entropy of the next token, nats per token",
    "kl": "KL divergence from the original, nats per token",
}
"""Loss that routers were tuned with -> its row in the card; others go under their own names."""

PICTURE_NAME = "allocation.svg"
"""The file beside the card that a card with a heat map embeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFacts:
    """What tuning after packing did.

    Attributes:
        what: what was trained: "routers", or "model", routers, norms, biases and scales.
        loss: what was lowered: "task" or "kl".
        loss_before: mean loss on the calibration tokens before (for "model", on those that were held out).
        loss_after: the same with the tuned weights as they are stored.
        steps: optimizer steps whose outcome was kept; 0 if it was no better, and all stayed as it was.
        parameters: weights that were trained.
        overlap_before: share of experts chosen as in the original before tuning, on windows of the calibration
            text that tuning did not see; None if not measured.
        overlap_after: the same with the tuned routers.
    """

    loss: str
    loss_before: float
    loss_after: float
    steps: int
    parameters: int
    overlap_before: float | None = None
    overlap_after: float | None = None
    what: str = "routers"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything the card says.

    Attributes:
        name: title of the card.
        base_model: hub id of the original; None if it is not known, then no lineage is claimed.
        license: licence identifier inherited from the original, if known.
        pipeline_tag: the hub's task name.
        model_type: the transformers model type.
        method: how the budget was spent.
        quantizer: what rounded the weights.
        command: the exact command line or call, "" if not known.
        versions: package -> version.
        plan_hash: hash of the plan.
        allocation: MoE layer -> code bits -> expert matrices, or components.
        source_bytes: weight bytes of the original.
        stored_bytes: weight bytes of this checkpoint.
        expert_bytes: of these, routed experts with scales, zeros, tables and padding.
        expert_parameters: weights of all routed experts.
        quality: metrics of an EvalResult, empty if nothing was measured.
        quality_text: what it was measured on, or why it was not.
        calibration: what the quantizer saw; None if it used no data.
        units: what each width was chosen for, "expert", "matrix" or "component"; None if nothing was chosen one by one.
        cost: name of the cost that ranked the units, if one did.
        objective: predicted harm of the plan, if a solver made it.
        bound: no plan of the same budget has less predicted harm.
        router: what tuning the routers did; None if they are the original's.
        heatmap: whether `PICTURE_NAME` lies beside the card.
        tiles: projection -> what its experts share in tiles, in words; empty if the layout has none.
        limits: further known limits, one sentence each.
        tags: further tags.
    """

    name: str
    base_model: str | None
    license: str | None
    pipeline_tag: str = "text-generation"
    model_type: str
    method: str
    quantizer: str
    command: str
    versions: Mapping[str, str]
    plan_hash: str
    allocation: tuple[Mapping[int, int], ...]
    source_bytes: int
    stored_bytes: int
    expert_bytes: int
    expert_parameters: int
    quality: Mapping[str, float] = field(default_factory=dict)
    quality_text: str = ""
    calibration: CalibrationFacts | None = None
    units: str | None = None
    cost: str | None = None
    objective: float | None = None
    bound: float | None = None
    router: RouterFacts | None = None
    heatmap: bool = False
    tiles: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the hub's YAML front matter; the same facts give the same text."""
    sections = [
        _front_matter(facts) + "\n" + _introduction(facts),
        "## Loading\n\n" + _loading(facts),
        "## Size\n\n" + _size(facts),
        "## Allocation\n\n" + _allocation(facts),
        "## Quality\n\n" + _quality(facts),
        "## Calibration\n\n" + _calibration(facts.calibration),
        *(["## Router tuning\n\n" + _router(facts.router)] if facts.router is not None else []),
        "## How it was made\n\n" + _provenance(facts),
        "## Known limits\n\n" + _limits(facts),
    ]
    return "\n\n".join(sections) + "\n"


def expert_bits(facts: CardFacts) -> float:
    """Stored bits of one routed expert weight, everything included."""
    return 8 * facts.expert_bytes / facts.expert_parameters


def _front_matter(facts: CardFacts) -> str:
    widths = sorted({bits for layer in facts.allocation for bits in layer})
    matter: dict[str, object] = {}
    if facts.base_model is not None:
        matter["base_model"] = facts.base_model
        matter["base_model_relation"] = "quantized"
    if facts.license is not None:
        matter["license"] = facts.license
    matter["library_name"] = "transformers"
    matter["pipeline_tag"] = facts.pipeline_tag
    tags = ("moeq", "mixture-of-experts", "quantized", facts.model_type, facts.method, facts.quantizer)
    matter["tags"] = list(dict.fromkeys((*tags, *(f"{bits}-bit" for bits in widths if bits), *facts.tags)))
    matter["quantized_by"] = "moeq"
    text = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{text}---\n"


def _introduction(facts: CardFacts) -> str:
    origin = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "The original"
    return (
        f"# {_line(facts.name)}\n\n"
        f"{origin} with its routed experts quantized by moeq to {expert_bits(facts):.3f} bits per weight, "
        f"its weights taking {human_bytes(facts.stored_bytes)} instead of {human_bytes(facts.source_bytes)}."
    )


def _loading(facts: CardFacts) -> str:
    return (
        "With moeq installed (`pip install moeq`):\n\n"
        "```python\n"
        "import moeq\n\n"
        'model = moeq.load("path/to/this/directory")\n'
        "```\n\n"
        "or through transformers; `trust_remote_code` runs the small file in this directory that imports moeq:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)\n'
        "```"
    )


def _size(facts: CardFacts) -> str:
    others = facts.stored_bytes - facts.expert_bytes
    rows = [
        ("weight files", human_bytes(facts.stored_bytes), f"{facts.stored_bytes:,}"),
        ("of these routed experts", human_bytes(facts.expert_bytes), f"{facts.expert_bytes:,}"),
        ("of these everything else", human_bytes(others), f"{others:,}"),
        ("original weights", human_bytes(facts.source_bytes), f"{facts.source_bytes:,}"),
    ]
    return (
        markdown_table(("", "size", "bytes"), rows)
        + f"\n\nRouted experts: {facts.expert_parameters:,} weights at {expert_bits(facts):.4f} bits each, "
        "scales, tables, padding and all else that is stored for them included. All weights together are "
        f"{facts.source_bytes / facts.stored_bytes:.2f} times smaller than the original."
    )


def _allocation(facts: CardFacts) -> str:
    widths = sorted({bits for layer in facts.allocation for bits in layer})
    rows: list[tuple[object, ...]] = [
        (index, *(layer.get(bits, 0) for bits in widths)) for index, layer in enumerate(facts.allocation)
    ]
    total = [sum(layer.get(bits, 0) for layer in facts.allocation) for bits in widths]
    table = markdown_table(("layer", *(f"{bits} bit" for bits in widths)), [*rows, ("all", *total)])
    picture = f"![Bits of every expert, layer by layer]({PICTURE_NAME})" if facts.heatmap else ""
    what = "Expert matrices by bits per code, for each MoE layer."
    if facts.units == "component":
        picture = picture.replace("every expert", "components along the basis")
        what = "Spectral components of the experts by bits per code, for each MoE layer; 0 bits are dropped."
    shared = "; ".join(f"{name}: {words}" for name, words in facts.tiles.items())
    shared = f"Low-rank factors that experts share, of 8 bits: {shared}." if shared else ""
    parts = (_choice(facts), picture, what, table, shared)
    return "\n\n".join(part for part in parts if part)


def _choice(facts: CardFacts) -> str:
    """How the widths were chosen and how good the choice is proven to be; "" if nothing was chosen."""
    if facts.units is None and facts.objective is None:
        return ""
    text = f"Widths were chosen for each {facts.units or 'unit'}"
    text += f" by the cost `{_line(facts.cost)}`." if facts.cost else "."
    if facts.objective is None:
        return text
    text += f" The plan's predicted cost is {human_number(facts.objective)}"
    if facts.bound is None:
        return text + "; how far it is from the least possible is not known."
    gap = max(0.0, facts.objective - facts.bound) / abs(facts.objective) if facts.objective else 0.0
    if gap <= OPTIMAL:
        return text + "; the solver proved that no plan of this budget has less."
    # Rounded up, so that the sentence stays true.
    shown = math.ceil(round(gap * 1e4, 6)) / 100
    return text + f"; the solver proved that no plan of this budget can have less by more than {shown:.2f} %."


def _quality(facts: CardFacts) -> str:
    if not facts.quality:
        return _line(facts.quality_text) or "Not measured."
    rows = []
    for metric, value in facts.quality.items():
        if metric in ("reference_perplexity", "tokens"):
            continue
        baseline = facts.quality.get("reference_perplexity") if metric == "perplexity" else IDENTICAL.get(metric)
        shown = "" if baseline is None else human_number(baseline)
        rows.append((METRICS.get(metric, metric), shown, human_number(value)))
    table = markdown_table(("measure", "original", "this checkpoint"), rows)
    tokens = f"{facts.quality['tokens']:,.0f} tokens" if "tokens" in facts.quality else ""
    text = " of ".join(part for part in (tokens, _line(facts.quality_text)) if part)
    return f"{table}\n\nMeasured on {text}." if text else table


def _calibration(facts: CalibrationFacts | None) -> str:
    if facts is None:
        return "No data was used: the weights were rounded on their own."
    uses = [words for use, words in USES.items() if use in facts.uses]
    text = (
        f"{facts.nsamples} samples of {facts.seqlen} tokens from {_line(facts.source)}, seed {facts.seed} "
        f"(token hash `{facts.tokens_hash[:16]}`). Used for {_and(uses)}."
    )
    if facts.texts:
        text += f" {_line('; '.join(facts.texts))}."
    if not facts.experts:
        return text + " The weights were rounded on their own, without data."
    text += f" Tokens per expert: {facts.min_tokens:,} at least, {facts.median_tokens:,} in the median."
    if facts.starved:
        return text + (
            f" {facts.starved} of {facts.experts} experts saw too few tokens for statistics of their own "
            "and were rounded with pooled ones."
        )
    return text + f" None of the {facts.experts} experts starved."


def _router(facts: RouterFacts) -> str:
    more = facts.what == "model"
    loss = f"{ROUTER_LOSSES.get(facts.loss, facts.loss)}, on " + (
        "other tokens" if more else "the tokens it was tuned on"
    )
    rows = [(loss, human_number(facts.loss_before), human_number(facts.loss_after))]
    if facts.overlap_before is not None and facts.overlap_after is not None:
        overlap = f"{METRICS['router_overlap']}, on other windows"
        rows.append((overlap, human_number(facts.overlap_before), human_number(facts.overlap_after)))
    return (
        f"The routers {'and norms ' if more else ''}({facts.parameters:,} weights) were trained for {facts.steps:,} "
        "steps to lower the loss of the packed model; nothing else was.\n\n"
        + markdown_table(("measure", "before tuning", "after tuning"), rows)
    )


def _provenance(facts: CardFacts) -> str:
    rows = [("method", facts.method), ("quantizer", facts.quantizer), ("plan", f"`{facts.plan_hash}`")]
    table = markdown_table(("", ""), [*rows, *sorted(facts.versions.items())])
    if not facts.command:
        return table
    fence = "```"
    while fence in facts.command:
        fence += "`"
    return f"{fence}sh\n{facts.command}\n{fence}\n\n{table}"


def _limits(facts: CardFacts) -> str:
    rounded = facts.calibration is not None and "rounding" in facts.calibration.uses
    limits = [
        "Other runtimes (vLLM, llama.cpp, ...) do not read this format.",
        ROUTERS_KEPT if facts.router is None else ROUTERS_TUNED,
        *([] if facts.quality else ["Its quality has not been measured."]),
        *([] if rounded else ["The weights were rounded without data, which costs quality below 4 bits."]),
        *facts.limits,
    ]
    return "\n".join(f"- {_line(limit)}" for limit in limits)


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _line(text: str) -> str:
    return " ".join(text.split())

"""The README.md of a packed checkpoint: what it is, how it was made, what was measured, how to load it."""

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
    """What the quantizer saw.

    Attributes:
        source: name of the text.
        nsamples: number of samples.
        seqlen: tokens per sample.
        seed: seed of the shuffle.
        tokens_hash: hash of the token ids.
        min_tokens: fewest tokens that any expert got.
        median_tokens: tokens that the median expert got.
        starved: experts that got too few tokens for statistics of their own.
        experts: all experts.
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
        allocation: MoE layer -> code bits -> expert matrices.
        source_bytes: weight bytes of the original.
        stored_bytes: weight bytes of this checkpoint.
        expert_bytes: of these, routed experts with scales, zeros, tables and padding.
        expert_parameters: weights of all routed experts.
        quality: metrics of an EvalResult, empty if nothing was measured.
        quality_text: what it was measured on, or why it was not.
        calibration: what the quantizer saw; None if it used no data.
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
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the hub's YAML front matter; the same facts give the same text."""
    sections = [
        _front_matter(facts) + "\n" + _introduction(facts),
        "## Loading\n\n" + _loading(facts),
        "## Size\n\n" + _size(facts),
        "## Allocation\n\nExpert matrices by bits per code, for each MoE layer.\n\n" + _allocation(facts),
        "## Quality\n\n" + _quality(facts),
        "## Calibration\n\n" + _calibration(facts.calibration),
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
    matter["tags"] = list(dict.fromkeys((*tags, *(f"{bits}-bit" for bits in widths), *facts.tags)))
    matter["quantized_by"] = "moeq"
    text = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{text}---\n"


def _introduction(facts: CardFacts) -> str:
    origin = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "the original"
    return (
        f"# {_line(facts.name)}\n\n"
        f"{origin} with its routed experts quantized by moeq to {expert_bits(facts):.3f} bits per weight, "
        f"{human_bytes(facts.stored_bytes)} in all instead of {human_bytes(facts.source_bytes)}."
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
        "with scales, zero points, tables and padding. The file is "
        f"{facts.source_bytes / facts.stored_bytes:.2f} times smaller than the original."
    )


def _allocation(facts: CardFacts) -> str:
    widths = sorted({bits for layer in facts.allocation for bits in layer})
    rows: list[tuple[object, ...]] = [
        (index, *(layer.get(bits, 0) for bits in widths)) for index, layer in enumerate(facts.allocation)
    ]
    total = [sum(layer.get(bits, 0) for layer in facts.allocation) for bits in widths]
    return markdown_table(("layer", *(f"{bits} bit" for bits in widths)), [*rows, ("all", *total)])


def _quality(facts: CardFacts) -> str:
    if not facts.quality:
        return _line(facts.quality_text) or "Not measured."
    rows = []
    for metric, value in facts.quality.items():
        if metric == "reference_perplexity":
            continue
        baseline = facts.quality.get("reference_perplexity") if metric == "perplexity" else IDENTICAL.get(metric)
        shown = "" if baseline is None else human_number(baseline)
        rows.append((METRICS.get(metric, metric), shown, human_number(value)))
    table = markdown_table(("measure", "original", "this checkpoint"), rows)
    return f"{table}\n\nMeasured on {_line(facts.quality_text)}." if facts.quality_text else table


def _calibration(facts: CalibrationFacts | None) -> str:
    if facts is None:
        return "No data was used: the weights were rounded on their own."
    text = (
        f"{facts.nsamples} samples of {facts.seqlen} tokens from {_line(facts.source)}, seed {facts.seed} "
        f"(token hash `{facts.tokens_hash[:16]}`). Tokens per expert: {facts.min_tokens:,} at least, "
        f"{facts.median_tokens:,} in the median."
    )
    if facts.starved:
        return text + (
            f" {facts.starved} of {facts.experts} experts saw too few tokens for statistics of their own "
            "and were rounded with pooled ones."
        )
    return text + f" None of the {facts.experts} experts starved."


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
    limits = [
        "Other runtimes (vLLM, llama.cpp, ...) do not read this format.",
        "Routers are unchanged, but errors of the experts still shift which experts later layers choose.",
        *([] if facts.quality else ["Its quality has not been measured."]),
        *([] if facts.calibration else ["No calibration data was used, which costs quality below 4 bits."]),
        *facts.limits,
    ]
    return "\n".join(f"- {_line(limit)}" for limit in limits)


def _line(text: str) -> str:
    return " ".join(text.split())

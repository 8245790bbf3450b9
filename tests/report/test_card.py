import dataclasses
import subprocess
import sys

import pytest
import yaml

from moeq.report.card import CalibrationFacts, CardFacts, RouterFacts, expert_bits, model_card


@pytest.fixture
def facts() -> CardFacts:
    return CardFacts(
        name="Tiny-MoE moeq 2.5 bit",
        base_model="org/Tiny-MoE",
        license="apache-2.0",
        model_type="mixtral",
        method="auto",
        quantizer="gptq",
        command="moeq quantize org/Tiny-MoE --budget 2.5bpw -o out",
        versions={"torch": "2.13.0", "moeq": "0.1.0"},
        plan_hash="f00d" * 16,
        allocation=({2: 20, 3: 4}, {2: 12, 4: 12}),
        source_bytes=8_000_000,
        stored_bytes=2_000_000,
        expert_bytes=1_250_000,
        expert_parameters=4_000_000,
        quality={"perplexity": 12.5, "reference_perplexity": 12.0, "kl": 0.03, "top1_agreement": 0.91, "odd": 3.0},
        quality_text="4,096 tokens of eval.txt",
        calibration=CalibrationFacts(
            source="c4.txt", nsamples=128, seqlen=2048, seed=0, tokens_hash="beef" * 16,
            min_tokens=17, median_tokens=12_345, starved=3, experts=16,
        ),
    )  # fmt: skip


def front_matter(card: str) -> dict:
    head, separator, _ = card.removeprefix("---\n").partition("\n---\n")
    assert card.startswith("---\n")
    assert separator
    return yaml.safe_load(head)


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_shared_factors(facts: CardFacts) -> None:
    assert "Low-rank" not in model_card(facts)
    words = {"gate": "rank 8 in 2 x 4 tiles", "down": "no factors"}
    text = section(model_card(dataclasses.replace(facts, tiles=words)), "Allocation")
    assert "gate: rank 8 in 2 x 4 tiles; down: no factors." in text


def test_front_matter(facts: CardFacts) -> None:
    matter = front_matter(model_card(facts))
    assert matter == {
        "base_model": "org/Tiny-MoE",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moeq", "mixture-of-experts", "quantized", "mixtral", "auto", "gptq", "2-bit", "3-bit", "4-bit"],
        "quantized_by": "moeq",
    }


def test_nothing_is_claimed_that_is_not_known(facts: CardFacts) -> None:
    unknown = dataclasses.replace(facts, base_model=None, license=None, quality={}, quality_text="", calibration=None)
    card = model_card(unknown)
    matter = front_matter(card)
    assert not {"base_model", "base_model_relation", "license"} & set(matter)
    assert section(card, "Quality").strip() == "Not measured."
    assert "No data was used" in section(card, "Calibration")
    assert "has not been measured" in section(card, "Known limits")
    assert "rounded without data" in section(card, "Known limits")
    assert "allocation.svg" not in card
    assert "Widths were chosen" not in card
    assert "## Router tuning" not in card
    assert "huggingface.co" not in card
    noted = model_card(dataclasses.replace(unknown, quality_text="skipped: no tokenizer"))
    assert section(noted, "Quality").strip() == "skipped: no tokenizer"


def test_sizes(facts: CardFacts) -> None:
    assert expert_bits(facts) == 2.5
    text = section(model_card(facts), "Size")
    assert "| of these routed experts | 1.25 MB | 1,250,000 |" in text
    assert "| of these everything else | 750 kB | 750,000 |" in text
    assert "2.5000 bits each" in text
    assert "4.00 times smaller" in text


def test_allocation_is_a_histogram(facts: CardFacts) -> None:
    lines = section(model_card(facts), "Allocation").strip().splitlines()[2:]
    assert lines[0] == "| layer | 2 bit | 3 bit | 4 bit |"
    assert lines[2:] == ["| 0 | 20 | 4 | 0 |", "| 1 | 12 | 0 | 12 |", "| all | 32 | 4 | 12 |"]


def test_quality_has_the_original_beside_it(facts: CardFacts) -> None:
    text = section(model_card(facts), "Quality")
    assert "| perplexity | 12 | 12.5 |" in text
    assert "| KL divergence from the original, nats per token | 0 | 0.03 |" in text
    assert "| top-1 agreement with the original | 1 | 0.91 |" in text
    assert "| odd |  | 3 |" in text
    assert "reference_perplexity" not in text
    assert "Measured on 4,096 tokens of eval.txt." in text
    counted = dataclasses.replace(facts, quality={"kl": 0.5, "tokens": 1016.0}, quality_text="windows of a.txt")
    text = section(model_card(counted), "Quality")
    assert "Measured on 1,016 tokens of windows of a.txt." in text
    assert "| tokens" not in text


def test_calibration(facts: CardFacts) -> None:
    text = section(model_card(facts), "Calibration")
    for part in ("128 samples of 2048 tokens from c4.txt", "17 at least", "12,345 in the median", "3 of 16 experts"):
        assert part in text
    assert facts.calibration is not None
    fed = dataclasses.replace(facts, calibration=dataclasses.replace(facts.calibration, starved=0))
    assert "None of the 16 experts starved" in section(model_card(fed), "Calibration")


def test_the_text_is_not_said_to_have_rounded_what_it_did_not(facts: CardFacts) -> None:
    """Costs or routers may use the text while the quantizer does not."""
    assert facts.calibration is not None
    apart = dataclasses.replace(facts.calibration, uses=("routers", "costs"), experts=0)
    card = model_card(dataclasses.replace(facts, calibration=apart))
    text = section(card, "Calibration")
    assert "Used for choosing widths and tuning the routers." in text
    assert "rounded on their own, without data" in text
    assert "Tokens per expert" not in text
    assert "rounded without data" in section(card, "Known limits")
    all_uses = dataclasses.replace(facts.calibration, uses=("rounding", "costs", "routers"))
    card = model_card(dataclasses.replace(facts, calibration=all_uses))
    assert "Used for choosing widths, rounding and tuning the routers." in section(card, "Calibration")
    assert "without data" not in card


def test_picture(facts: CardFacts) -> None:
    text = section(model_card(dataclasses.replace(facts, heatmap=True)), "Allocation")
    assert "\n![Bits of every expert, layer by layer](allocation.svg)\n" in text
    assert "| layer | 2 bit | 3 bit | 4 bit |" in text


@pytest.mark.parametrize(
    ("objective", "bound", "words"),
    [
        (None, None, "cost `output-error`."),
        (2.0, None, "predicted cost is 2; how far"),
        (2.0, 2.0, "no plan of this budget has less."),
        (2.0, 2.0000001, "no plan of this budget has less."),
        (2.0, 1.99, "have less by more than 0.50 %."),
        (2.0, 1.9999, "have less by more than 0.01 %."),
        (2.0, 1.99989, "have less by more than 0.01 %."),
        (2.0, 1.99979, "have less by more than 0.02 %."),
        (0.0, 0.0, "no plan of this budget has less."),
    ],
)
def test_choice_of_widths(facts: CardFacts, objective: float | None, bound: float | None, words: str) -> None:
    """The gap is rounded up: 0.0105 % may not be called 0.01 %."""
    chosen = dataclasses.replace(facts, units="matrix", cost="output-error", objective=objective, bound=bound)
    text = section(model_card(chosen), "Allocation")
    assert "Widths were chosen for each matrix by the cost `output-error`." in text
    assert words in text


def test_routers(facts: CardFacts) -> None:
    assert "Routers are unchanged" in section(model_card(facts), "Known limits")
    router = RouterFacts(loss="task", loss_before=3.25, loss_after=3.125, steps=128, parameters=16384)
    card = model_card(dataclasses.replace(facts, router=router))
    text = section(card, "Router tuning")
    assert "(16,384 weights) were trained for 128 steps" in text
    assert "| cross-entropy of the next token, nats per token, on the tokens it was tuned on | 3.25 | 3.125 |" in text
    assert "experts chosen" not in text
    limits = section(card, "Known limits")
    assert "Routers are unchanged" not in limits
    assert "Routers were tuned" in limits
    seen = dataclasses.replace(router, loss="kl", overlap_before=0.75, overlap_after=0.875)
    text = section(model_card(dataclasses.replace(facts, router=seen)), "Router tuning")
    assert "| KL divergence from the original, nats per token, on the tokens it was tuned on | 3.25 | 3.125 |" in text
    assert "| experts chosen as in the original, on other windows | 0.75 | 0.875 |" in text


def test_command_and_versions(facts: CardFacts) -> None:
    text = section(model_card(facts), "How it was made")
    assert "```sh\nmoeq quantize org/Tiny-MoE --budget 2.5bpw -o out\n```" in text
    assert text.index("| moeq | 0.1.0 |") < text.index("| torch | 2.13.0 |")
    assert facts.plan_hash in text
    tricky = model_card(dataclasses.replace(facts, command="echo '```'"))
    assert "````sh\necho '```'\n````" in tricky


def test_both_ways_to_load(facts: CardFacts) -> None:
    text = section(model_card(facts), "Loading")
    assert "moeq.load(" in text
    assert "trust_remote_code=True" in text


def test_names_cannot_break_out(facts: CardFacts) -> None:
    hostile = dataclasses.replace(facts, name="a\n---\n# b", license="no\nbase_model: evil", tags=("on", "x: y"))
    card = model_card(hostile)
    matter = front_matter(card)
    assert matter["license"] == "no\nbase_model: evil"
    assert matter["base_model"] == "org/Tiny-MoE"
    assert matter["tags"][-2:] == ["on", "x: y"]
    assert "\n# a --- # b\n" in card


def test_same_facts_same_text(facts: CardFacts) -> None:
    turned = dataclasses.replace(facts, versions=dict(reversed(facts.versions.items())))
    assert model_card(turned) == model_card(facts)


def test_report_needs_no_torch() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('moeq'); package.__path__ = [sys.argv[1]]; sys.modules['moeq'] = package\n"
        "import moeq.report.card, moeq.report.heatmap, moeq.report.curves\n"
        "assert 'torch' not in sys.modules\n"
    )
    from moeq import errors

    subprocess.run([sys.executable, "-c", code, str(errors.__file__).rsplit("/", 1)[0]], check=True)

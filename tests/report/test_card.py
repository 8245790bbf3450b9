import dataclasses
import subprocess
import sys

import pytest
import yaml

from moeq.report.card import CalibrationFacts, CardFacts, expert_bits, model_card


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
    assert "4,096 tokens of eval.txt" in text


def test_calibration(facts: CardFacts) -> None:
    text = section(model_card(facts), "Calibration")
    for part in ("128 samples of 2048 tokens from c4.txt", "17 at least", "12,345 in the median", "3 of 16 experts"):
        assert part in text
    assert facts.calibration is not None
    fed = dataclasses.replace(facts, calibration=dataclasses.replace(facts.calibration, starved=0))
    assert "None of the 16 experts starved" in section(model_card(fed), "Calibration")


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
        "import moeq.report.card\n"
        "assert 'torch' not in sys.modules\n"
    )
    from moeq import errors

    subprocess.run([sys.executable, "-c", code, str(errors.__file__).rsplit("/", 1)[0]], check=True)

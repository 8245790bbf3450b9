"""What `moeq quantize` did, as files, terminals and notebooks show it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeq.calibration.tokens import Domain, TokenBatch
from moeq.notebook import Shows, Table
from moeq.report import trials
from moeq.report.tables import human_bytes
from moeq.report.trials import Trial
from moeq.stages import verify
from moeq.writing import weight_families
from moeq.writing.decision import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport(Shows):
    """What was done; field names are those of the JSON document (docs/json.md)."""

    output: str
    model_type: str
    method: str
    quantizer: str
    plan_hash: str
    stored_bytes: int
    directory_bytes: int
    source_bytes: int
    expert_bytes: int
    expert_parameters: int
    expert_bits_per_weight: float
    families: dict[str, weight_families.Family]
    calibration: tuple[Domain, ...]
    tokens_per_expert: dict[str, Any] | None
    quality: dict[str, float] | None
    quality_by_text: dict[str, dict[str, float]]
    quality_note: str | None
    verified: verify.VerifyReport
    seconds: dict[str, float]
    trials: tuple[Trial, ...] = ()
    trials_note: str = ""

    def tables(self) -> Iterator[Table]:
        """Sizes, quality, what was tried."""
        yield weight_families.table(f"{self.output}: {human_bytes(self.directory_bytes)}", self.families)
        found = self.quality_by_text or ({"held-out text": self.quality} if self.quality else {})
        names = list(dict.fromkeys(name for each in found.values() for name in each))
        if found:
            rows = [(text, *(each.get(name) for name in names)) for text, each in found.items()]
            yield Table(title="quality on held-out text", header=("text", *names), rows=rows)
        if any(trial.kl for trial in self.trials):
            header, *tried = trials.rows_of(self.trials)
            yield Table(title="what was tried", header=header, rows=tried)


def report_of(
    decision: Decision,
    out: Path,
    partial: Path,
    tokens: TokenBatch | None,
    counts: Mapping[int, list[int]],
    checked: verify.VerifyReport,
) -> QuantizeReport:
    """What is known before anything is measured."""
    shares = None
    if counts:
        flat = sorted(count for layer in counts.values() for count in layer)
        shares = {
            "min": flat[0],
            "median": flat[len(flat) // 2],
            "max": flat[-1],
            "without_tokens": sum(count == 0 for count in flat),
            "layers": [counts[layer] for layer in sorted(counts)],
        }
    return QuantizeReport(
        output=str(out),
        model_type=decision.inventory.model_type,
        method=decision.plan.method,
        quantizer=str(decision.recipe.quantizer),
        plan_hash=decision.plan.hash,
        stored_bytes=sum((partial / shard.file).stat().st_size for shard in decision.shards),
        directory_bytes=directory_bytes(partial),
        source_bytes=decision.inventory.source_bytes,
        expert_bytes=decision.plan.expert_bytes,
        expert_parameters=decision.inventory.expert_parameters,
        expert_bits_per_weight=8 * decision.plan.expert_bytes / decision.inventory.expert_parameters,
        families=weight_families.families(decision.inventory, decision.headers, decision.plan),
        calibration=() if tokens is None else tokens.domains,
        tokens_per_expert=shares,
        quality=None,
        quality_by_text={},
        quality_note=None,
        verified=checked,
        seconds={},
    )


def directory_bytes(directory: Path) -> int:
    """Bytes of all files of a checkpoint directory but the journal."""
    return sum(
        path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".moeq")
    )

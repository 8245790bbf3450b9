"""`moeq_report.json`: what was found out while a checkpoint was made, for `moeq report`. No torch.

Nothing in it is needed to load the checkpoint; nothing in it depends on when or how fast the run was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

from moeq.codec import Artifact
from moeq.errors import ArtifactError
from moeq.report.card import RouterFacts
from moeq.report.trials import Trial

FACTS_NAME: Final = "moeq_report.json"
BINS: Final = 32
"""Numbers that a spectrum is told in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One budget, solved.

    Attributes:
        expert_bytes: stored bytes of all routed experts.
        objective: predicted cost.
        widths: layer -> a digit for each matrix, expert by expert in storage order: its code bits; no layers where
            units are components.
    """

    expert_bytes: int
    objective: float
    widths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts(Artifact):
    """What a report shows beside what plan and manifest say.

    Attributes:
        model_hash: the original.
        plan_hash: the plan that was carried out.
        source_bytes: weight bytes of the original.
        stored_bytes: weight bytes of the checkpoint.
        quality: metrics on held-out windows; empty if nothing was measured.
        quality_by_text: the same, text by text.
        quality_note: why nothing was measured.
        trials: what method auto compared.
        trials_note: why it compared nothing.
        router: what tuning after packing did.
        curve: budgets solved by the same costs, by rising size; empty without costs.
        statistics: name -> one number for each unit of the costs, in storage order; "harm" is the predicted harm of
            the width that the unit got.
        spectra: "layer.projection" -> mean energy of a run of basis directions, strongest first, where units are
            components.
    """

    KIND: ClassVar[str] = "report-facts"

    model_hash: str
    plan_hash: str
    source_bytes: int
    stored_bytes: int
    quality: Mapping[str, float] = field(default_factory=dict)
    quality_by_text: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quality_note: str = ""
    trials: tuple[Trial, ...] = ()
    trials_note: str = ""
    router: RouterFacts | None = None
    curve: tuple[CurvePoint, ...] = ()
    statistics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise ArtifactError if parts have different lengths."""
        if len({len(values) for values in self.statistics.values()}) > 1:
            raise ArtifactError("statistics are of different units")
        shapes = {tuple(map(len, point.widths)) for point in self.curve}
        if len(shapes) > 1:
            raise ArtifactError("the points of a curve have different matrices")

"""The Python API: the CLI's verbs under the CLI's names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeq.arch.gguf_source import open_source
from moeq.arch.inventory import read_inventory
from moeq.artifacts import CostTable, EvalResult, Inventory, Plan
from moeq.checkpoint.locate import resolve_packed
from moeq.costs.component_table import ComponentTable
from moeq.defaults import filled
from moeq.fleet import HERE, Fleet
from moeq.progress import Progress
from moeq.recipe import Recipe
from moeq.stages import allocate as allocate_stage
from moeq.stages import compare as compare_stage
from moeq.stages import doctor as doctor_stage
from moeq.stages import evaluate as evaluate_stage
from moeq.stages import export as export_stage
from moeq.stages import imatrix as imatrix_stage
from moeq.stages import measure as measure_stage
from moeq.stages import pareto as pareto_stage
from moeq.stages import plan as plan_stage
from moeq.stages import push as push_stage
from moeq.stages import quantize as quantize_stage
from moeq.stages import repair as repair_stage
from moeq.stages import report as report_stage
from moeq.stages import verify as verify_stage
from moeq.stages.compare import CompareReport
from moeq.stages.doctor import DoctorReport
from moeq.stages.export import ExportReport
from moeq.stages.imatrix import ImatrixReport
from moeq.stages.pareto import ParetoReport
from moeq.stages.plan import PlanReport
from moeq.stages.push import PushReport
from moeq.stages.quantize_report import QuantizeReport
from moeq.stages.repair import RepairReport
from moeq.stages.report import ReportReport
from moeq.stages.verify import VerifyReport


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    fleet: Fleet = HERE,
    **options: Any,
) -> QuantizeReport:
    """Quantize a checkpoint; options are those of `moeq.Recipe` (and of `moeq quantize`).

    `fleet` is who does the work: `moeq.integrations.ray_fleet.RayFleet`, or this process.

    Example:
        >>> moeq.quantize("models/olmoe", "olmoe-3bit", bits=3, calibration="text.txt")  # doctest: +SKIP

    Raises:
        MoeqError: of the kind that says what is wrong.
    """
    recipe = Recipe(**filled(model, options))
    return quantize_stage.run(model, output, recipe, resume=resume, progress=progress, fleet=fleet)


def plan(model: str | Path, *, workers: int | None = None, **options: Any) -> PlanReport:
    """What `quantize` with the same options would do, also with so many workers; reads no weights."""
    return plan_stage.run(model, Recipe(**filled(model, options)), workers)


def measure(model: str | Path, *, progress: Progress | None = None, **options: Any) -> CostTable | ComponentTable:
    """What each width would cost each unit; its `save` makes a file for the option `costs`. Needs no budget."""
    return measure_stage.run(model, Recipe(**filled(model, options)), progress)


def allocate(model: str | Path, **options: Any) -> Plan:
    """Spend a budget; `Plan.save` the result for the option `plan`. Methods that rank units need `costs`."""
    return allocate_stage.run(model, Recipe(**filled(model, options))).plan


def pareto(model: str | Path, *, points: int = 20, **options: Any) -> ParetoReport:
    """Solve many budgets by one table of `costs`."""
    return pareto_stage.run(model, Recipe(**filled(model, options)), points)


def export(
    directory: str | Path,
    output: str | Path,
    *,
    form: str = "compressed-tensors",
    like: str | Path | None = None,
    embeddings: int = 8,
) -> ExportReport:
    """Write a packed checkpoint in a format that other programs run, see `moeq.stages.export.run`."""
    return export_stage.run(resolve_packed(directory), output, form=form, like=like, embeddings=embeddings)


def imatrix(model: str | Path, output: str | Path, *, calibration: str | Path, **options: Any) -> ImatrixReport:
    """Write an importance matrix for llama.cpp's quantizer; options are those of `moeq.stages.imatrix.run`."""
    return imatrix_stage.run(model, output, calibration=str(calibration), **options)


def push(directory: str | Path, repo: str, *, upload: bool = False, private: bool = True) -> PushReport:
    """Put a packed checkpoint on the hub, see `moeq.stages.push.run`."""
    return push_stage.run(resolve_packed(directory), repo, upload=upload, private=private)


def repair(directory: str | Path, output: str | Path, *, calibration: str | Path, **options: Any) -> RepairReport:
    """Tune the routers of a packed checkpoint; options are those of `moeq repair`, see `moeq.stages.repair.run`."""
    return repair_stage.run(directory, output, calibration=str(calibration), **options)


def inspect(model: str | Path) -> Inventory:
    """What a source checkpoint holds; no code of it is run."""
    return read_inventory(open_source(model), trust_remote_code=True)[0]


def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    **options: Any,
) -> EvalResult:
    """Measure a packed or any other model; options are those of `moeq eval`, see `moeq.stages.evaluate.run`."""
    return evaluate_stage.run(model, text, reference=reference, **options)


def compare(models: Sequence[str | Path], texts: Sequence[str | Path], **options: Any) -> CompareReport:
    """Measure checkpoints on the same texts; options are those of `moeq compare`, see `moeq.stages.compare.run`."""
    return compare_stage.run(models, texts, **options)


def report(directories: Sequence[str | Path], output: str | Path = "report.html", **options: Any) -> ReportReport:
    """Write one page about packed checkpoints; see `moeq report`."""
    return report_stage.run(directories, output, **options)


def verify(directory: str | Path, *, trust_remote_code: bool = False) -> VerifyReport:
    """Prove a packed checkpoint: structure, hashes, every matrix, a forward pass."""
    return verify_stage.run(resolve_packed(directory), every=True, trust_remote_code=trust_remote_code)


def doctor() -> DoctorReport:
    """Test the compiled kernels of this machine again, and say what runs on them; see `moeq doctor`."""
    return doctor_stage.run()

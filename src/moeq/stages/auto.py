"""`--method auto`: candidates of one budget, compared on text that calibration did not see; the best one is taken.

It is never worse than `uniform`: that is always one of them, and a candidate that any text is worse with is out.
"""

import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from moeq import codec
from moeq.arch.inventory import read_inventory
from moeq.calibration.tokens import TokenBatch
from moeq.errors import BudgetError, OptionError
from moeq.methods import method
from moeq.progress import Progress
from moeq.quantizers.registry import QUANTIZERS
from moeq.recipe import EFFORTS, Recipe
from moeq.repair.tune import TuneOptions, by_domain, divergences
from moeq.report.trials import Trial, mean_kl
from moeq.runtime.load import pick_device, predicts_tokens
from moeq.stages import repair
from moeq.writing import calibration_text
from moeq.writing.decision import Decision
from moeq.writing.routers import loaded, teaching

WINDOWS: Final = 32
"""Windows of text that candidates are compared on."""
BASELINE: Final = "uniform"
TUNED: Final = "tuned"
USUAL: Final = "normal"
SHARED: Final = (
    "bits", "size", "accounting", "group_size", "levels", "calibration", "nsamples", "seqlen", "seed", "routing",
    "act_order", "damp", "gain", "device", "mtp", "trust_remote_code", "quality",
    "serve",
)  # fmt: skip
"""Options that every candidate takes over."""
DENSE: Final = "16"
"""Width of other linears where the program would have chosen it and has nothing to choose by."""
MEASURING: Final = 1.0
"""Measuring costs takes this many times the packing; compensation and tuning likewise (62M reference model, CPU)."""
FITTING: Final = 0.3
TUNING: Final = 3.0
DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(s|min|m|h|d)")
SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def tries(recipe: Recipe) -> bool:
    """Whether a recipe is one for several candidates."""
    return method(recipe.method).chooses and recipe.effort != "fast" and not recipe.progressive and recipe.plan is None


class Kept(Protocol):
    """Makes a checkpoint, or finds it made; the answer is a `moeq.stages.quantize.QuantizeReport`."""

    def __call__(self, path: Path, source: Path, stage: Recipe) -> Any:
        """The report of the checkpoint at `path`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The best candidate.

    Attributes:
        path: where it lies.
        report: of its making.
        trials: everything that was tried.
        note: why nothing was compared, "" if it was.
    """

    path: Path
    report: Any
    trials: tuple[Trial, ...]
    note: str


def run(kept: Kept, source: Path, work: Path, name: str, recipe: Recipe, progress: Progress | None) -> Chosen:
    """Make all candidates, compare them, tune the best one where effort is "best".

    Args:
        kept: makes one.
        source: the original.
        work: where they are made.
        name: what the checkpoint will be called.
        recipe: one that `tries`, its effort by name.
        progress: called as work is done.

    Raises:
        MoeqError: the main candidate cannot be made; another that its options forbid is left out.
    """
    rest, note = windows(source, recipe)
    wanted = candidates(recipe)
    if rest is None:
        wanted = {recipe.method: wanted[recipe.method]}
    reports: dict[str, Any] = {}
    trials: dict[str, Trial] = {}
    for number, (each, stage) in enumerate(wanted.items(), start=1):
        if progress is not None and len(wanted) > 1:
            progress("candidates", number, len(wanted))
        options = _options(stage)
        try:
            made = reports[each] = kept(work / each / name, source, stage)
        except (OptionError, BudgetError) as error:
            if each == recipe.method:
                raise
            trials[each] = Trial(name=each, options=options, error=error.message)
            continue
        spent = math.fsum(made.seconds.values())
        trials[each] = Trial(
            name=each, options=options, expert_bytes=made.expert_bytes, bits=made.expert_bits_per_weight, seconds=spent
        )
    if rest is not None:
        judge = partial(judged, source, rest=rest, recipe=recipe, scratch=work, progress=progress)
        for each, kl in judge({each: work / each / name for each in reports}).items():
            trials[each] = replace(trials[each], kl=kl)
    best = choice(trials, recipe.method)
    if rest is not None and recipe.effort == "best":
        path, started = work / TUNED / name, time.perf_counter()
        reports[TUNED] = _tuned(reports[best], work / best / name, path, source, recipe, progress)
        trials[TUNED] = replace(
            trials[best],
            name=TUNED,
            options={"tune": "model", "of": best},
            seconds=time.perf_counter() - started,
            kl=judge({TUNED: path})[TUNED],
        )
        best = choice(trials, recipe.method)
    trials[best] = replace(trials[best], chosen=True)
    return Chosen(path=work / best / name, report=reports[best], trials=tuple(trials.values()), note=note)


def _tuned(report: Any, made: Path, path: Path, source: Path, recipe: Recipe, progress: Progress | None) -> Any:
    """Tune a candidate; its report with what changed."""
    shutil.rmtree(path, ignore_errors=True)
    done = repair.run(
        made,
        path,
        calibration=str(recipe.calibration),
        nsamples=recipe.nsamples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        tune="model",
        reference=source,
        device=recipe.device,
        progress=progress,
    )
    seconds = {**report.seconds, "tune": math.fsum(done.seconds.values())}
    return replace(report, quality=done.after, quality_by_text={}, verified=done.verified, seconds=seconds)


def _options(stage: Recipe) -> dict[str, Any]:
    """What a candidate's recipe has beside what all share."""
    usual = codec.encode(Recipe())
    told = {name: value for name, value in codec.encode(stage).items() if value != usual.get(name)}
    return {name: value for name, value in told.items() if name not in (*SHARED, "effort", "dense_bits")} | {
        "method": stage.method
    }


def candidates(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> recipe of what is made and compared, the baseline last."""
    main = replace(recipe, effort="fast", tune="none")
    found = {recipe.method: main}
    shared = {name: getattr(recipe, name) for name in SHARED}
    dense = DENSE if recipe.joining() else recipe.dense_bits
    if recipe.effort == "best":
        if recipe.quantizer is None and recipe.levels == "auto" and not recipe.served.alike:
            found["plain-levels"] = replace(main, quantizer="gptq")
        if "," in str(recipe.calibration) or recipe.calibration == "bundled":
            options = ",".join(part for part in (recipe.cost_options, "texts=worst") if part)
            found["worst-text"] = replace(main, cost_options=options)
        if not recipe.served.alike:
            found["tiled"] = Recipe(
                method="tileq", rank="auto", allocation="gemq", compensate=True, dense_bits=dense, **shared
            )
            levels = {"levels": "auto"}
            found["spectral"] = Recipe(method="bitsmoe", compensate=True, dense_bits=dense, **(shared | levels))
    found[BASELINE] = Recipe(method="uniform", dense_bits=dense, **shared)
    return found


def within(recipe: Recipe, decision: Decision) -> Recipe:
    """The recipe with an effort by name, the highest that a given time allows.

    Raises:
        OptionError: not even the lowest is expected to be ready by then.
    """
    effort = recipe.effort or USUAL
    if effort in EFFORTS:
        return recipe
    limit = seconds_of_duration(effort)
    expected = efforts(decision)
    fitting = [name for name in EFFORTS if expected[name] <= limit]
    if not fitting:
        least = expected[EFFORTS[0]]
        raise OptionError(
            f"{effort} is not enough: {EFFORTS[0]} takes about {least / 60:.1f} min on two CPU cores",
            option="effort",
            fix=f"give --effort {max(1, round(least / 60 + 0.5))}min, or --method uniform",
        )
    return replace(recipe, effort=fitting[-1])


def seconds_of_duration(text: str) -> float:
    """The seconds of "90s", "30min", "2h", "1d".

    Raises:
        OptionError: it is no such text.
    """
    found = DURATION.fullmatch(text.strip())
    if found is None:
        raise OptionError(f"{text!r} is no effort", option="effort", fix=f"give {', '.join(EFFORTS)}, 30min or 2h")
    return float(found[1]) * SECONDS[found[2]]


def efforts(decision: Decision) -> dict[str, float]:
    """Effort -> rough seconds on two CPU cores, reading and writing left out; empty for methods that do not try."""
    recipe, weights = decision.recipe, decision.inventory.expert_parameters
    if not method(recipe.method).chooses:
        return {}

    def packing(quantizer: str, fitted: bool) -> float:
        return weights / QUANTIZERS[quantizer].weights_per_second * (1 + FITTING * fitted)

    own = packing(str(recipe.quantizer), bool(recipe.compensate)) * (1 + (recipe.costs is None) * MEASURING)
    normal = own + packing("gptq", fitted=False)
    others = 2 * own + 2 * packing("gptq", fitted=True) * (1 + MEASURING)
    return {"fast": own, "normal": normal, "best": normal + others + TUNING * own}


def windows(source: Path, recipe: Recipe) -> tuple[TokenBatch | None, str]:
    """What candidates are compared on, or None and why not."""
    if not predicts_tokens(source):
        return None, "not compared with uniform: the model does not predict the next token"
    _, rest = calibration_text.calibration_tokens(source, recipe, None, held_out=WINDOWS)
    if rest is None:
        return None, "not compared with uniform: no calibration text was left over; give more text, or less --nsamples"
    return rest, ""


def judged(
    source: Path,
    made: Mapping[str, Path],
    rest: TokenBatch,
    recipe: Recipe,
    scratch: Path,
    progress: Progress | None,
) -> dict[str, dict[str, float]]:
    """Name of a candidate -> text -> KL to the original. The original is never in memory as a whole.

    Args:
        source: the original.
        made: name -> packed checkpoint.
        rest: the windows.
        recipe: says on which device, and whether code may run.
        scratch: where large hidden states go.
        progress: called as candidates are done.
    """
    device = pick_device(recipe.device)
    inventory, _ = read_inventory(source, trust_remote_code=recipe.trust_remote_code)
    groups = {rest.domains[number].name: indices for number, indices in by_domain(rest.domain_N).items()}
    found = {}
    with teaching(source, inventory, rest, TuneOptions(loss="kl"), device, scratch, None) as teacher:
        assert teacher is not None
        for number, (name, directory) in enumerate(made.items(), start=1):
            losses = divergences(loaded(directory, device), rest.ids_NT, [*groups.values()], teacher)
            found[name] = dict(zip(groups, losses, strict=True))
            if progress is not None:
                progress("compared", number, len(made))
    return found


def choice(trials: Mapping[str, Trial], main: str) -> str:
    """The least mean KL among those that no text is worse with than with the baseline; the first without figures."""
    base = trials.get(BASELINE)
    good = {name: trial for name, trial in trials.items() if trial.kl and not trial.error}
    if base is not None and base.kl and not base.error:
        good = {n: t for n, t in good.items() if all(t.kl[text] <= base.kl[text] for text in base.kl)}
    return min(good, key=lambda name: mean_kl(good[name])) if good else main

"""GEMQ's progressive loop: falling budgets, each measured on the packed and tuned result of the one before.

Every stage rounds the original's weights again: errors of rounding do not add up (GEMQ, section on progressive
quantization). What a stage hands to the next is the context that gradients and activations come from.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from moeq import codec
from moeq.checkpoint.read import resolve
from moeq.errors import MoeqError
from moeq.format.manifest import read_manifest
from moeq.recipe import Recipe
from moeq.stages import inspect, output, quantize
from moeq.stages.packing import Progress
from moeq.stages.quantize import QuantizeReport
from moeq.stages.tuning import REPAIRS

STAGES_SUFFIX = ".stages"


def run(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a checkpoint, through all budgets of `recipe.progressive`; without any, `quantize.run`.

    Stages lie beside the output, in OUT.stages, until the last one is complete; a run that goes on takes them up.
    Arguments and errors are those of `quantize.run`.
    """
    budgets = recipe.progressive_bits()
    if not budgets:
        return quantize.run(model, out, recipe, resume=resume, command=command, progress=progress)
    source, out = resolve(model), Path(os.path.abspath(out))
    output.check_free(source, out, output.partial_of(out), resume)
    work = out.with_name(out.name + STAGES_SUFFIX)
    context = recipe.context
    for number, bits in enumerate(budgets, start=1):
        path = work / f"{number}-{bits:g}-bits"
        stage = dataclasses.replace(
            recipe,
            bits=bits,
            progressive=None,
            context=context,
            round_context=recipe.round_context and context is not None,
        )
        if not _is_done(path, source, stage):
            shutil.rmtree(path, ignore_errors=True)
            quantize.run(model, path, stage, resume=resume, command=command, progress=progress)
        context = str(path)
    report = quantize.run(model, out, recipe, resume=resume, command=command, progress=progress, context=context)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _is_done(path: Path, source: Path, stage: Recipe) -> bool:
    """Whether an earlier run finished exactly this stage."""
    if not path.is_dir():
        return False
    try:
        manifest = read_manifest(path)
    except MoeqError:
        return False
    inventory, _ = inspect.run(source)
    done = {name: value for name, value in manifest.recipe.items() if name != REPAIRS}
    return manifest.model_hash == inventory.model_hash and done == codec.encode(stage.settled())

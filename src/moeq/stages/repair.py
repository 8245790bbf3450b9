"""Tunes the routers of a packed checkpoint to its experts; all other bytes stay what they were."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeq.arch.gguf_source import open_source
from moeq.artifacts import Inventory
from moeq.checkpoint.write import write_file_atomic
from moeq.errors import StorageError
from moeq.format.manifest import Manifest, write_manifest
from moeq.layouts.validate import validate_packed, verify_files
from moeq.progress import Progress
from moeq.recipe import Recipe
from moeq.repair import store
from moeq.repair.tune import RATES, TuneOptions
from moeq.report.card import ROUTERS_KEPT, ROUTERS_TUNED
from moeq.report.tables import human_number, markdown_table
from moeq.runtime import load
from moeq.stages import facts, verify
from moeq.writing import calibration_text
from moeq.writing.directory import all_or_nothing, building, publish
from moeq.writing.routers import Retuned, inventory_of, retune, teaching, updated

REFERENCE_BYTES = 2**30
"""Originals up to this size are loaded to compare predictions on held-out windows."""
CARD_NAME = "README.md"
WHO = {"routers": "The routers", "model": "Routers, norms and scales"}
BESIDE_BYTES = 2**16
"""Upper bound of what manifest and model card grow by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What was done; field names are those of the JSON document (docs/json.md).

    Attributes:
        tune: what was trained, "routers" or "model".
        loss: what was lowered, "task" or "kl".
        loss_before: its mean on the calibration tokens before tuning, nats per token.
        loss_after: the same with the tuned routers as they are stored.
        parameters: weights that were trained.
        changed: names of the tensors whose bytes changed.
        before: metrics on held-out windows of the calibration text before tuning: perplexity, and with a
            reference also what `moeq eval` compares.
        after: the same after tuning.
        quality_note: why `before` and `after` lack something, "" if they do not.
    """

    output: str
    tune: str
    loss: str
    lr: float
    epochs: int
    weight_decay: float
    steps: int
    parameters: int
    loss_before: float
    loss_after: float
    before: dict[str, float] | None
    after: dict[str, float] | None
    quality_note: str
    changed: tuple[str, ...]
    verified: verify.VerifyReport
    seconds: dict[str, float]


def run(
    directory: str | Path,
    out: str | Path,
    *,
    calibration: str,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    tune: str = "routers",
    loss: str | None = None,
    reference: str | Path | None = None,
    lr: float | None = None,
    epochs: int = 1,
    weight_decay: float = 1e-4,
    device: str = "auto",
    progress: Progress | None = None,
) -> RepairReport:
    """Write a packed checkpoint that differs from another one in its routers only, or in what else is small.

    Nothing appears under `out` until every file is written, hashed and reloaded.

    Args:
        directory: what `moeq quantize` wrote, or a hub id of such.
        out: the directory to make.
        calibration: text file, jsonl, or dataset id.
        nsamples: sequences to train on.
        seqlen: tokens of a sequence.
        seed: of the order of the documents.
        tune: "routers", or "model": scales, norms and biases too.
        loss: "task" or "kl"; None is "task" for routers and "kl" for more.
        reference: the original; for "kl", and to compare with it.
        lr: learning rate; None is the usual one.
        epochs: passes over the sequences.
        weight_decay: of AdamW.
        device: where to compute.
        progress: called as work is done.

    Raises:
        PackedError: `directory` is not a packed checkpoint, or is damaged.
        OptionError: an option is wrong, the routers cannot be trained, or `reference` is another model.
        CalibrationError: the text is too short, or training diverged.
        StorageError: the disk is full or refuses.
    """
    started = time.perf_counter()
    usual = RATES.get(tune, RATES["routers"])
    options = TuneOptions(
        what=tune, loss=loss or ("kl" if tune == "model" else "task"), lr=usual if lr is None else lr, epochs=epochs,
        weight_decay=weight_decay,
    )  # fmt: skip
    place = load.pick_device(device)
    source, out = open_source(directory), Path(os.path.abspath(out))
    manifest = validate_packed(source)
    original = None if reference is None else open_source(reference)
    inventory = inventory_of(original, manifest, options)
    recipe = Recipe(calibration=calibration, nsamples=nsamples, seqlen=seqlen, seed=seed)
    tokens, rest = calibration_text.calibration_tokens(source, recipe, "router tuning")
    assert tokens is not None
    rows = () if rest is None else tuple(rest.ids_NT)
    needed = sum(digest.bytes for digest in manifest.files.values()) + BESIDE_BYTES
    with building(source, out, resume=False, needed_bytes=needed) as partial, all_or_nothing(partial):
        # What is about to get new hashes must be what was packed.
        verify_files(source, manifest)
        with teaching(original, inventory, tokens, options, place, partial, progress) as teacher:
            note, compared = _comparable(original, inventory, rows, place)
            result = retune(
                source, tokens, options, teacher=teacher, rows=rows, original=compared, device=place, progress=progress
            )
        tuned = time.perf_counter()
        _copy(source, partial, manifest)
        digests = store.rewrite(source, partial, result.tensors)
        write_manifest(partial, updated(manifest, digests, tokens, options))
        _write_card(source, partial, out.name, result)
        facts.carry_over(source, partial, result.facts)
        checked = verify.run(partial)
        publish(partial, out)
    seconds = {"tune": tuned - started, "write": time.perf_counter() - tuned}
    return _report(out, options, result, note, checked, seconds)


def _report(
    out: Path,
    options: TuneOptions,
    result: Retuned,
    note: str,
    checked: verify.VerifyReport,
    seconds: dict[str, float],
) -> RepairReport:
    return RepairReport(
        output=str(out),
        tune=options.what,
        loss=options.loss,
        lr=options.lr,
        epochs=options.epochs,
        weight_decay=options.weight_decay,
        steps=result.facts.steps,
        parameters=result.facts.parameters,
        loss_before=result.facts.loss_before,
        loss_after=result.facts.loss_after,
        before=result.before,
        after=result.after,
        quality_note=note,
        changed=tuple(sorted(result.tensors)),
        verified=checked,
        seconds=seconds,
    )


def _comparable(
    reference: Path | None, inventory: Inventory | None, rows: Sequence[Tensor], device: torch.device
) -> tuple[str, nn.Module | None]:
    """Why nothing is compared on held-out windows, or "" and the original."""
    if not rows:
        return "not measured: no calibration text was left over; run moeq eval", None
    if reference is None or inventory is None:
        return "not compared with the original: no reference was given", None
    if inventory.source_bytes > REFERENCE_BYTES:
        return "not compared: the original is too large to load it unasked; run moeq eval", None
    return "", load.load_any(reference, device)


def _copy(source: Path, partial: Path, manifest: Manifest) -> None:
    """Copy the files of the manifest; `verify` will compare the copies with it."""
    for name in manifest.files:
        path = partial / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", file=path, fix="check the disk") from error


def _write_card(source: Path, partial: Path, name: str, result: Retuned) -> None:
    path = source / CARD_NAME
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace").replace(ROUTERS_KEPT, ROUTERS_TUNED)
        write_file_atomic(partial / CARD_NAME, f"{text.rstrip()}\n\n{card_section(name, result)}".encode())


def card_section(name: str, result: Retuned) -> str:
    """What the model card says of a checkpoint whose routers were tuned after it had been packed."""
    facts = result.facts
    where = "calibration tokens" if facts.what == "routers" else "calibration tokens that were not trained on"
    rows = [(f"{facts.loss} loss on the {where}", facts.loss_before, facts.loss_after)]
    for metric, value in (result.before or {}).items():
        if result.after is not None and metric in result.after:
            rows.append((f"{metric} on held-out windows", value, result.after[metric]))
    table = markdown_table(
        ("measure", "before", "after"), [(label, human_number(old), human_number(new)) for label, old, new in rows]
    )
    return (
        f"## Routers of {name}\n\n"
        f"{WHO[facts.what]} ({facts.parameters:,} weights) were tuned after packing, {facts.steps:,} steps; nothing "
        f"else was changed. What is said above under quality was measured before.\n\n{table}\n"
    )

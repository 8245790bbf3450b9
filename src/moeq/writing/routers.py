"""Tunes what is small in one packed checkpoint: what `moeq repair` and the end of `moeq quantize` share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq import codec
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Inventory
from moeq.calibration.opening import open_stream
from moeq.calibration.stream import compute_dtype
from moeq.calibration.tokens import TokenBatch
from moeq.checkpoint.journal import Journal
from moeq.checkpoint.read import read_headers
from moeq.checkpoint.write import FileDigest
from moeq.errors import OptionError
from moeq.evals import suite
from moeq.evals.perplexity import perplexity
from moeq.format.manifest import Manifest, read_manifest, write_manifest
from moeq.layouts.serving import Loose
from moeq.layouts.validate import validate_packed
from moeq.progress import Progress
from moeq.repair import store
from moeq.repair.router import decoder_blocks, find_routers, find_vectors
from moeq.repair.tune import RATES, Teacher, Tuned, TuneOptions, held_out_of, tune
from moeq.report.card import RouterFacts
from moeq.runtime import attach, load
from moeq.writing.decision import Decision

ROUTERS = "routers"
"""The journal's note of router tuning."""
REPAIRS = "repairs"
"""Key of the manifest's recipe: what was done to the checkpoint after it was packed, in order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retuned:
    """What tuning gave, before or after it is written.

    Attributes:
        tensors: name on disk -> new value, for the tensors whose bytes changed.
        facts: for the model card.
        before: metrics on held-out windows before tuning, None if there were no windows.
        after: the same with the tuned routers.
    """

    tensors: dict[str, Tensor]
    facts: RouterFacts
    before: dict[str, float] | None
    after: dict[str, float] | None


def tune_directory(
    directory: Path,
    tokens: TokenBatch,
    options: TuneOptions,
    *,
    reference: Path | None,
    device: torch.device,
    replacing: Callable[[tuple[str, ...]], None] | None = None,
    progress: Progress | None = None,
) -> Retuned:
    """Tune the routers of a complete packed checkpoint, its manifest included, in place.

    A crash leaves files that the old manifest does not describe: for a directory that is still being built.

    Args:
        directory: the checkpoint.
        tokens: what to train on.
        options: how to train.
        reference: the original; needed for "kl" only.
        device: where to compute.
        replacing: called with the names of the files that are about to be replaced, before any is.
        progress: called as work is done.

    Raises: as `moeq.stages.repair.run`.
    """
    manifest = validate_packed(directory)
    inventory = inventory_of(reference, manifest, options)
    with teaching(reference, inventory, tokens, options, device, directory, progress) as teacher:
        result = retune(directory, tokens, options, teacher=teacher, device=device, progress=progress)
    headers = read_headers(directory)
    if replacing is not None:
        replacing(tuple(sorted({headers[name].file for name in result.tensors})))
    digests = store.rewrite(directory, directory, result.tensors)
    write_manifest(directory, updated(manifest, digests, tokens, options))
    return result


def tune_packed(
    decision: Decision,
    partial: Path,
    journal: Journal,
    tokens: TokenBatch | None,
    device: torch.device,
    progress: Progress | None,
) -> RouterFacts | None:
    """Tune the routers if the recipe says so and an interrupted run did not; the manifest is up to date after it.

    Args and errors are those of `tune_directory`; `journal` knows whether it was done.

    Between `forget` and `replaced` the journal does not know the files: a run that is killed there packs them again.
    """
    recipe = decision.recipe
    if recipe.router == "none":
        return None
    assert tokens is not None
    what = "model" if recipe.tune == "model" else "routers"
    lr = RATES[what] if recipe.router_lr is None else recipe.router_lr
    options = TuneOptions(what=what, loss=str(recipe.router), lr=lr, epochs=recipe.router_epochs)
    note = journal.notes.get(ROUTERS)
    if note is not None:
        write_manifest(partial, updated(read_manifest(partial), {}, tokens, options))
        return codec.decode(RouterFacts, note)
    replaced: list[str] = []

    def replacing(names: tuple[str, ...]) -> None:
        replaced.extend(names)
        journal.forget(partial, names)

    result = tune_directory(
        partial,
        tokens,
        options,
        reference=decision.source,
        device=device,
        replacing=replacing,
        progress=progress,
    )
    files = read_manifest(partial).files
    journal.replaced(partial, {name: files[name] for name in replaced}, ROUTERS, codec.encode(result.facts))
    return result.facts


def retune(
    directory: Path,
    tokens: TokenBatch,
    options: TuneOptions,
    *,
    teacher: Teacher | None,
    device: torch.device,
    rows: Sequence[Tensor] = (),
    original: nn.Module | None = None,
    progress: Progress | None = None,
) -> Retuned:
    """Tune the routers of a packed checkpoint in memory; nothing is written.

    Args:
        directory: the checkpoint.
        tokens: what to train on.
        options: how to train.
        teacher: the original's logits, for the loss "kl".
        device: where to compute.
        rows: held-out windows to measure on, before and after.
        original: the original, to compare with on `rows`.
        progress: called as work is done.

    Raises: as `moeq.stages.repair.run`.
    """
    manifest = validate_packed(directory)
    model = loaded(directory, device)
    suite.check_vocabulary(model, (*tokens.ids_NT, *rows))
    paths = [layer.path for layer in manifest.layers if layer.attached]
    routers = find_routers(model, paths)
    places = store.places(model, routers, read_headers(directory))
    blobs: dict[str, tuple[Loose, ...]] = {}
    if options.what == "model":
        vectors = find_vectors(model)
        places |= store.places(model, vectors, read_headers(directory), strict=False)
        routers |= {name: vectors[name] for name in places if name in vectors}
    before = _measure(model, original, rows)
    if options.what == "model":
        blobs = attach.loosen(model, [layer for layer in manifest.layers if layer.attached], manifest.dense)
        ours = {id(parameter) for parts in blobs.values() for part in parts for parameter in part.parameters()}
        routers |= {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ours}
    tuned = tune(
        model,
        routers,
        tokens.ids_NT,
        options,
        blocks=decoder_blocks(model, paths),
        stored={name: place.dtype for name, place in places.items()},
        teacher=teacher,
        held_out=held_out_of(tokens.domain_N) if options.what == "model" else (),
        progress=None if progress is None else lambda done, total: progress("tuning", done, total),
    )
    after = _measure(model, original, rows)
    tensors = {place.tensor: place.stored(tuned.weights[name]) for name, place in places.items()}
    tensors |= {name: torch.cat([part.blob() for part in parts]) for name, parts in blobs.items()}
    return Retuned(
        tensors=store.changed(directory, tensors),
        facts=_facts(tuned, options, before, after),
        before=before,
        after=after,
    )


def loaded(directory: Path, device: torch.device) -> PreTrainedModel:
    """A packed checkpoint whose activations stay floats, in the dtype that is fast on a device."""
    model = load.load(directory, device=device, exact_activations=True)
    dtype = compute_dtype(model.dtype, device)
    return model if dtype == model.dtype else model.to(dtype)


def inventory_of(reference: Path | None, manifest: Manifest, options: TuneOptions) -> Inventory | None:
    """What the original holds, proven to be the model that was packed; None without a reference.

    Raises:
        OptionError: it is another model, or the loss needs one and there is none.
        CheckpointError: it cannot be read.
    """
    if reference is None:
        if options.loss == "kl":
            raise OptionError(
                "the loss kl compares with the original", option="reference", fix="give the original, or use task"
            )
        return None
    inventory, _ = read_inventory(reference)
    if inventory.model_hash != manifest.model_hash:
        raise OptionError(
            f"{reference.name} is model {inventory.model_hash[:12]}, packed was {manifest.model_hash[:12]}",
            option="reference",
            fix="give the model that this checkpoint was made from",
        )
    return inventory


@contextmanager
def teaching(
    reference: Path | None,
    inventory: Inventory | None,
    tokens: TokenBatch,
    options: TuneOptions,
    device: torch.device,
    scratch: Path,
    progress: Progress | None,
) -> Iterator[Teacher | None]:
    """The original's logits for the loss "kl": its blocks run once, one in memory at a time, its head as needed.

    Args:
        reference: the original.
        inventory: what it holds.
        tokens: what will be trained on.
        options: other losses need no teacher, and get None.
        device: where blocks and head run.
        scratch: where the last hidden states go when they are large.
        progress: called as blocks are done.

    Raises:
        CheckpointError: the original cannot be read.
    """
    if options.loss != "kl":
        yield None
        return
    assert reference is not None
    assert inventory is not None
    with open_stream(reference, inventory, device=device, scratch=scratch, progress=progress) as stream:
        hidden_NTH = stream.last_hidden(tokens.ids_NT)

        def teacher(start: int, ids_BT: Tensor) -> Tensor:
            with torch.no_grad():
                return stream.logits(ids_BT, hidden_NTH[start : start + len(ids_BT)])

        yield teacher


def _measure(model: nn.Module, original: nn.Module | None, rows: Sequence[Tensor]) -> dict[str, float] | None:
    if not rows:
        return None
    if original is None:
        return {"perplexity": perplexity(model, rows).value}
    return suite.compare_all(model, original, rows, 1, None)[0]


def _facts(
    tuned: Tuned, options: TuneOptions, before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> RouterFacts:
    return RouterFacts(
        what=options.what,
        loss=options.loss,
        loss_before=tuned.loss_before,
        loss_after=tuned.loss_after,
        steps=tuned.steps,
        parameters=sum(weight.numel() for weight in tuned.weights.values()),
        overlap_before=(before or {}).get("router_overlap"),
        overlap_after=(after or {}).get("router_overlap"),
    )


def updated(
    manifest: Manifest, digests: Mapping[str, FileDigest], tokens: TokenBatch, options: TuneOptions
) -> Manifest:
    """The manifest with the new files, and with what they depend on."""
    done: dict[str, Any] = {
        "routers": codec.encode(options),
        "calibration": {
            "source": tokens.source,
            "tokens_hash": tokens.hash,
            "shape": list(tokens.ids_NT.shape),
            "seed": tokens.seed,
        },
    }
    recipe = {**manifest.recipe, REPAIRS: [*manifest.recipe.get(REPAIRS, []), done]}
    return replace(manifest, files={**manifest.files, **digests}, recipe=recipe)

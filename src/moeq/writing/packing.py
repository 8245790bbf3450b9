"""Packs the experts of a decided run: every layer by its layout's writer, with a journal of what is finished."""

import functools
from dataclasses import replace
from pathlib import Path

import torch

from moeq import codec, native
from moeq.calibration.tokens import TokenBatch
from moeq.checkpoint.identity import fingerprint
from moeq.checkpoint.journal import Journal
from moeq.checkpoint.read import Reader
from moeq.checkpoint.write import FileDigest
from moeq.fleet import HERE, Fleet
from moeq.layouts.job import Job
from moeq.layouts.layer_writer import writer
from moeq.progress import Progress
from moeq.quantizers.base import Quantizer
from moeq.spec import Unit
from moeq.version import __version__
from moeq.writing import calibrated_packing
from moeq.writing.arrangement import Shard
from moeq.writing.decision import Decision
from moeq.writing.quantizer_choice import dataless_quantizer, dense_quantizer, heard_quantizer
from moeq.writing.shard_writer import write_copied, write_layer


def pack(
    decision: Decision,
    partial: Path,
    quantizer: Quantizer,
    tokens: TokenBatch | None,
    device: torch.device,
    progress: Progress | None,
    fleet: Fleet = HERE,
) -> tuple[Job, Journal, dict[int, list[int]]]:
    """Write all shards that are not finished yet; each is entered in the journal as it is on disk.

    Args:
        decision: what to write.
        partial: the directory to write in.
        quantizer: rounds the experts.
        tokens: calibration tokens, if there are any.
        device: where rounding is done.
        progress: called as work is done.
        fleet: who rounds.

    Returns:
        What was packed, with digests of a few weights; the journal; and MoE layer -> routed tokens of each expert.

    Raises:
        ResumeError: the directory holds an unfinished run of other options.
    """
    recipe = decision.recipe
    options = {**codec.encode(recipe), "tokens": None if tokens is None else tokens.hash}
    journal = Journal.open_or_create(
        partial,
        fingerprint=fingerprint(decision.source),
        # Compiled and torch rounding differ in last bits.
        options={**options, "native_rounding": native.available()},
        plan_hash=decision.plan.hash,
        moeq_version=__version__,
    )
    with Reader(decision.source, decision.headers) as reader:
        job = _job(decision, partial, reader, quantizer, device, fleet)
        journal, counts = _pack_shards(job, decision, journal, tokens, progress)
    return job, journal, counts


def _job(
    decision: Decision, partial: Path, reader: Reader, quantizer: Quantizer, device: torch.device, fleet: Fleet
) -> Job:
    recipe = decision.recipe
    return Job(
        inventory=decision.inventory,
        plan=decision.plan,
        reader=reader,
        partial=partial,
        quantizer=quantizer,
        dense_quantizer=dense_quantizer(recipe),
        heard_quantizer=heard_quantizer(recipe),
        device=device,
        table=decision.table,
        gain=recipe.gain,
        damp=recipe.damp,
        compensate=bool(recipe.compensate),
        tiles=recipe.tiles(),
        seed=recipe.seed,
        fleet=fleet,
    )


def _pack_shards(
    job: Job, decision: Decision, journal: Journal, tokens: TokenBatch | None, progress: Progress | None
) -> tuple[Journal, dict[int, list[int]]]:
    state = journal
    counts: dict[int, list[int]] = {}

    def done(name: str, digest: FileDigest) -> None:
        nonlocal state
        state = state.finish_shard(job.partial, name, digest)
        if progress is not None:
            progress("shards", len(state.finished), len(decision.shards))

    for shard in decision.shards:
        if shard.layer is None and shard.file not in state.finished:
            done(shard.file, write_copied(job, shard))
    if tokens is not None and job.quantizer.needs_hessian:
        counts = calibrated_packing.run(
            job,
            decision.shards,
            decision.source,
            tokens.ids_NT,
            routing=decision.recipe.routing,
            finished=dict(state.finished),
            done=done,
            progress=progress,
        )
        # What no module runs sees no text.
        job = replace(job, quantizer=dataless_quantizer(decision.recipe))
    rest = [shard for shard in decision.shards if shard.layer is not None and shard.file not in state.finished]
    work = functools.partial(_pack_shard, replace(job, fleet=HERE))
    for shard, (digest, noted) in zip(rest, job.fleet.spread(work, rest), strict=True):
        job.noted.update(noted)
        done(shard.file, digest)
    return state, counts


def _pack_shard(job: Job, shard: Shard) -> tuple[FileDigest, dict[Unit, str]]:
    """Write the file of a layer without data; its digest, and those of a few weights."""
    assert shard.layer is not None
    make = writer(job.plan.layout)(job, shard.layer)
    digest = write_layer(job, shard, make.plain(), make.tables())
    return digest, {unit: noted for unit, noted in job.noted.items() if unit.layer == shard.layer}

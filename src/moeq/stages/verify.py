"""Proves a packed checkpoint: structure, hashes, decoded weights, and a forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moeq.errors import PackedError
from moeq.format.manifest import Manifest, PackedLayer
from moeq.layouts.job import weights_digest
from moeq.layouts.serving import ExpertsModule, layout
from moeq.layouts.validate import validate_packed, verify_files
from moeq.runtime import attach, load
from moeq.runtime.load import speaker
from moeq.spec import Unit

PROBE_TOKENS = 2
"""Enough to see every part of the model work; more would decode most experts of a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked.

    Attributes:
        files: files whose size and sha256 match the manifest.
        layers: layers of experts whose tables and bytes were decoded.
        decoded: matrices decoded and found finite (and equal to what was rounded, where known).
        logits_finite: a forward pass of a few tokens gave finite logits.
    """

    files: int
    layers: int
    decoded: int
    logits_finite: bool


def run(
    directory: Path,
    *,
    hashes: bool = True,
    expected: Mapping[Unit, str] | None = None,
    every: bool = False,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check a packed checkpoint from the outside, as a user would load it.

    Args:
        directory: the checkpoint.
        hashes: read every file and compare its sha256 with the manifest.
        expected: digests of decoded weights noted while they were rounded.
        trust_remote_code: the code in the directory may run, for a model that transformers does not have.
        every: decode every matrix, not only those of `expected` and the first of each layer.

    Raises:
        PackedError and its relatives: naming the file or tensor that is wrong.
    """
    manifest = validate_packed(directory)
    if hashes:
        verify_files(directory, manifest)
    model = load.load(directory, device="cpu", trust_remote_code=trust_remote_code)
    expected = expected or {}
    decoded = 0
    for index, layer in enumerate(manifest.layers):
        weights = _weights(model, layer, directory, manifest)
        for expert in range(layer.num_experts):
            for projection in layer.projections:
                unit = Unit(layer=index, expert=expert, projection=projection)
                if every or unit in expected or expert == 0:
                    _check_matrix(weights(expert, projection), unit, layer.path, expected.get(unit))
                    decoded += 1
    ids = torch.arange(1, 1 + PROBE_TOKENS).unsqueeze(0) % int(model.config.get_text_config().vocab_size)
    with torch.inference_mode():
        logits = speaker(model)(input_ids=ids, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise _not_finite(model, directory)
    files = len(manifest.files) if hashes else 0
    return VerifyReport(files=files, layers=len(manifest.layers), decoded=decoded, logits_finite=True)


def _weights(
    model: nn.Module, layer: PackedLayer, directory: Path, manifest: Manifest
) -> Callable[[int, str], torch.Tensor]:
    """(expert, projection) -> decoded weights: by the module that will serve them, or from the file if none does."""
    if layer.attached and not layer.members:
        packed = attach.find(model, layer.path).get_submodule("moeq")
        assert isinstance(packed, ExpertsModule)
        return packed.weights
    files = (directory / name for name in manifest.files if name.endswith(".safetensors"))
    return layout(layer.layout).open(layer, attach.map_packed(files)).dense


def _not_finite(model: nn.Module, directory: Path) -> PackedError:
    bad = next((name for name, value in model.named_parameters() if not bool(value.isfinite().all())), None)
    fix = "this tensor was copied as it is: look at the original"
    if bad is None:
        fix = (
            "load the original with transformers: if its logits are not finite either, as of bfloat16 models that were "
        )
        fix += "saved in float16, convert it to bfloat16 from a better copy; else report this"
    return PackedError("the reloaded model gives logits that are not finite", file=directory, tensor=bad, fix=fix)


def _check_matrix(weights: torch.Tensor, unit: Unit, path: str, wanted: str | None) -> None:
    if not bool(weights.isfinite().all()):
        raise PackedError(
            f"expert {unit.expert} {unit.projection} decodes to NaN or infinity", tensor=path, fix="quantize again"
        )
    if wanted is not None and weights_digest(weights) != wanted:
        raise PackedError(
            f"expert {unit.expert} {unit.projection} decodes to other weights than were packed",
            tensor=path,
            fix="the disk or the memory of this machine may be faulty; quantize again",
        )

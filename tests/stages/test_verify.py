from pathlib import Path

import pytest
import torch

import moeq
from hostile import OPTIONS, copy_of, edit_tensors, partial_of
from moeq.errors import PackedError
from moeq.format.records import decode_matrix
from moeq.layouts.job import weights_digest
from moeq.spec import Unit
from moeq.stages import verify


def unit(expert: int = 1, layer: int = 2, projection: str = "down") -> Unit:
    return Unit(layer=layer, expert=expert, projection=projection)


def digest(packed: Path, wanted: Unit) -> str:
    model = moeq.load(packed, device="cpu")
    layer = model.model.layers[wanted.layer].mlp.experts.moeq.layer
    matrix = layer.matrix(wanted.expert, wanted.projection)
    return weights_digest(decode_matrix(matrix.record, matrix.spec, matrix.shape))


def test_counts(packed_tiny: Path) -> None:
    files = len(list(packed_tiny.iterdir())) - 3  # all but manifest, model card and facts for reports are listed
    every = verify.run(packed_tiny, every=True)
    assert every == verify.VerifyReport(files=files, layers=3, decoded=3 * 4 * 3, logits_finite=True)
    assert verify.run(packed_tiny).decoded == 3 * 3
    assert verify.run(packed_tiny, hashes=False).files == 0
    assert verify.run(packed_tiny, expected={unit(): digest(packed_tiny, unit())}).decoded == 3 * 3 + 1


def test_other_weights_than_were_rounded_are_found(packed_tiny: Path) -> None:
    with pytest.raises(PackedError, match=r"expert 1 down decodes to other weights.*layers\.2\.mlp\.experts"):
        verify.run(packed_tiny, expected={unit(): digest(packed_tiny, unit(expert=0))})


def test_digests_depend_on_every_weight() -> None:
    weights = torch.zeros(3, 5)
    plain = weights_digest(weights)
    weights[2, 4] = 1e-30
    assert weights_digest(weights) != plain
    assert weights_digest(weights.t().contiguous().t()) == weights_digest(weights)


def test_weights_that_overflow_are_blamed_on_their_tensor(tiny_dir: Path, tmp_path: Path) -> None:
    """Infinity is copied, as masks may hold it; a model that it breaks is not published."""
    source, out = copy_of(tiny_dir, tmp_path / "source"), tmp_path / "out"
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(PackedError, match=r"not finite.*tensor model\.norm\.weight.*look at the original"):
        moeq.quantize(source, out, **OPTIONS)
    assert not out.exists()
    assert partial_of(out).exists()


def test_quantize_compares_the_reloaded_model_with_what_it_rounded(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    plain = verify.run

    def spy(directory: Path, **options: object) -> verify.VerifyReport:
        seen.update(options)
        return plain(directory, **options)

    monkeypatch.setattr(verify, "run", spy)
    moeq.quantize(tiny_dir, tmp_path / "out", **OPTIONS)
    assert {found.layer for found in seen["expected"]} == {0, 1, 2}
    assert len(seen["expected"]) == 3 * 2 * 3

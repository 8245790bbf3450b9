"""`moeq repair`: a new checkpoint that differs in its routers only, proven like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moeq
import zoo
from families import HIDDEN
from hostile import copy_of, flip, no_partial, refused
from moeq.checkpoint.read import Reader, read_headers
from moeq.checkpoint.write import hash_file
from moeq.errors import CalibrationError, MoeqError, OptionError, OutputError, PackedError
from moeq.format.manifest import read_manifest
from moeq.layouts.validate import validate_packed, verify_files
from moeq.recipe import Recipe
from moeq.repair.tune import TuneOptions
from moeq.report.card import ROUTERS_KEPT, ROUTERS_TUNED
from moeq.runtime import attach
from moeq.runtime.load import load_any
from moeq.spec import LEVELS, QuantSpec, sections
from moeq.stages import repair, verify
from moeq.writing import calibration_text as choices
from moeq.writing import routers as tuning
from moeq.writing.calibrated_packing import compute_dtype

SIZES: dict[str, Any] = {"nsamples": 4, "seqlen": 24, "lr": 1e-3, "epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def text(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of the bundled text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((text_dir / "calibration.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rough_tiny(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dir`, packed so roughly that there is something to repair."""
    out = tmp_path_factory.mktemp("rough") / "packed"
    options = {"bits": 2, "accounting": "codes", "group_size": 32, "quantizer": "minmax", "dense_bits": "8"}
    moeq.quantize(tiny_dir, out, device="cpu", **options)
    return out


@pytest.fixture(scope="module")
def repaired(rough_tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("repaired") / "out"
    return out, repair.run(rough_tiny, out, calibration=str(text), **SIZES)


def test_only_routers_differ(rough_tiny: Path, repaired: tuple[Path, Any]) -> None:
    out, report = repaired
    old, new = read_headers(rough_tiny), read_headers(out)
    assert old == new
    with Reader(rough_tiny) as before, Reader(out) as after:
        differ = {name for name in old if bytes(before.raw(name)) != bytes(after.raw(name))}
    assert differ == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)} == set(report.changed)
    shards = {old[name].file for name in differ}
    for path in rough_tiny.iterdir():
        same = path.read_bytes() == (out / path.name).read_bytes()
        assert same == (path.name not in shards | {"moeq.json", "README.md", "moeq_report.json"}), path.name
    assert {path.name for path in out.iterdir()} == {path.name for path in rough_tiny.iterdir()}


def test_it_is_a_whole_checkpoint(rough_tiny: Path, repaired: tuple[Path, Any]) -> None:
    out, report = repaired
    checked = verify.run(out, every=True)
    assert (checked.files, checked.layers, checked.logits_finite) == (report.verified.files, 3, True)
    model = moeq.load(out, device="cpu")
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.inference_mode():
        new, old = model(input_ids=ids).logits, moeq.load(rough_tiny, device="cpu")(input_ids=ids).logits
    assert bool(new.isfinite().all())
    assert not torch.equal(new, old)
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16


def test_the_report(repaired: tuple[Path, Any], text: Path) -> None:
    out, report = repaired
    assert report.output == str(out)
    assert report.loss_after < report.loss_before
    assert (report.steps, report.parameters) == (8, 3 * zoo.EXPERTS * HIDDEN)
    assert set(report.before) == set(report.after) == {"perplexity"}
    assert "no reference was given" in report.quality_note
    assert set(report.seconds) == {"tune", "write"}


def test_manifest_and_card_say_what_was_done(rough_tiny: Path, repaired: tuple[Path, Any], text: Path) -> None:
    out, _ = repaired
    old, new = read_manifest(rough_tiny), read_manifest(out)
    (done,) = new.recipe.pop("repairs")
    assert new.recipe == old.recipe
    assert done["routers"] == {"what": "routers", "loss": "task", "lr": 1e-3, "epochs": 2, "weight_decay": 1e-4}
    assert done["calibration"]["source"] == text.name
    assert done["calibration"]["shape"] == [4, 24]
    assert (new.model_hash, new.plan_hash, new.layers) == (old.model_hash, old.plan_hash, old.layers)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert ROUTERS_KEPT in (rough_tiny / "README.md").read_text(encoding="utf-8")
    assert ROUTERS_KEPT not in card
    assert ROUTERS_TUNED in card
    assert "8 steps" in card
    assert "task loss on the calibration tokens" in card


def test_the_same_options_give_the_same_bytes(
    rough_tiny: Path, repaired: tuple[Path, Any], text: Path, tmp_path: Path
) -> None:
    out, _ = repaired
    again = tmp_path / "out"
    repair.run(rough_tiny, again, calibration=str(text), **SIZES)
    assert {path.name: hash_file(path) for path in again.iterdir()} == {
        path.name: hash_file(path) for path in out.iterdir()
    }
    other = tmp_path / "other"
    repair.run(rough_tiny, other, calibration=str(text), **{**SIZES, "seed": 1})
    assert read_manifest(other).files != read_manifest(out).files


def test_kl_to_the_original(rough_tiny: Path, tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    seen: set[str] = set()
    report = repair.run(
        rough_tiny,
        tmp_path / "out",
        calibration=str(text),
        loss="kl",
        reference=tiny_dir,
        progress=lambda what, done, total: seen.add(what),
        **SIZES,
    )
    assert 0 < report.loss_after < report.loss_before
    assert report.quality_note == ""
    for metrics in (report.before, report.after):
        assert {"perplexity", "reference_perplexity", "kl", "top1_agreement", "router_overlap"} <= set(metrics)
    assert report.before["router_overlap"] < 1
    assert report.before != report.after
    assert seen == {"blocks", "tuning"}
    assert "kl on held-out windows" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_whole_model_is_tuned_by_kl(rough_tiny: Path, tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    """Norms, routers and scales change, codes do not; what was held out is better off."""
    options = {**SIZES, "nsamples": 8, "lr": 3e-3, "epochs": 3}
    report = repair.run(
        rough_tiny, tmp_path / "out", calibration=str(text), tune="model", reference=tiny_dir, **options
    )
    assert (report.tune, report.loss) == ("model", "kl")
    assert report.loss_after < report.loss_before
    names = set(report.changed)
    assert any("layernorm" in name for name in names)
    assert any(name.endswith("experts.moeq_data") for name in names)
    assert any(name.endswith("q_proj.moeq_data") for name in names)
    old, new = (attach.map_packed(sorted(path.glob("*.safetensors"))) for path in (rough_tiny, tmp_path / "out"))
    for linear in read_manifest(rough_tiny).dense:
        width, group_size, levels = old[f"{linear.path}.moeq_table"][0, 0, 1:].tolist()
        spec = QuantSpec(bits=width, group_size=group_size, levels=LEVELS[levels])
        codes = sum(size for _, _, size in sections(spec, linear.shape).planes)
        before, after = (tensors[f"{linear.path}.moeq_data"] for tensors in (old, new))
        assert torch.equal(before[:codes], after[:codes])
        assert not torch.equal(before, after)
    assert "Routers, norms and scales" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert moeq.verify(tmp_path / "out").logits_finite


def test_tuning_at_the_end_of_packing(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    """Scales are others then than those that were noted while weights were rounded."""
    options = {"bits": 2.0, "group_size": 32, "calibration": str(text), "nsamples": 8, "seqlen": 24, "device": "cpu"}
    plain = moeq.quantize(tiny_dir, tmp_path / "plain", method="uniform", **options)
    tuned = moeq.quantize(tiny_dir, tmp_path / "tuned", method="uniform", tune="model", router_epochs=4, **options)
    assert plain.stored_bytes == tuned.stored_bytes
    name = "model.layers.0.mlp.experts.moeq_data"
    with Reader(tmp_path / "plain") as before, Reader(tmp_path / "tuned") as after:
        assert not torch.equal(before.tensor(name), after.tensor(name)), "scales were tuned"
    assert read_manifest(tmp_path / "tuned").recipe["repairs"][0]["routers"]["what"] == "model"
    with pytest.raises(OptionError, match="tuned by kl"):
        moeq.plan(tiny_dir, bits=3, tune="model", router="task")


def test_the_teacher_is_the_original(rough_tiny: Path, tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    tokens, _ = choices.calibration_tokens(tiny_dir, Recipe(calibration=str(text), nsamples=3, seqlen=16), None)
    dtype = compute_dtype(torch.bfloat16, torch.device("cpu"))
    model = load_any(tiny_dir, "cpu", dtype)
    with torch.inference_mode():
        wanted = model(input_ids=tokens.ids_NT, use_cache=False).logits
    options = TuneOptions(loss="kl")
    inventory = tuning.inventory_of(tiny_dir, read_manifest(rough_tiny), options)
    device = torch.device("cpu")
    with tuning.teaching(tiny_dir, inventory, tokens, options, device, tmp_path, None) as teacher:
        for index in (2, 0):
            logits = teacher(index, tokens.ids_NT[index : index + 1])
            torch.testing.assert_close(logits.float(), wanted[index : index + 1].float(), rtol=0.02, atol=0.02)
            assert not logits.requires_grad


def test_in_place(rough_tiny: Path, repaired: tuple[Path, Any], text: Path, tmp_path: Path) -> None:
    """What the end of `quantize` calls on its own output gives the bytes of `repair`."""
    out, report = repaired
    directory = copy_of(rough_tiny, tmp_path / "packed")
    tokens, _ = choices.calibration_tokens(directory, Recipe(calibration=str(text), nsamples=4, seqlen=24), None)
    options = TuneOptions(lr=1e-3, epochs=2)
    replaced: list[tuple[str, ...]] = []

    def replacing(files: tuple[str, ...]) -> None:
        replaced.append(files)
        assert all((directory / file).read_bytes() == (rough_tiny / file).read_bytes() for file in files)

    result = tuning.tune_directory(
        directory, tokens, options, reference=None, device=torch.device("cpu"), replacing=replacing
    )
    assert set(result.tensors) == set(report.changed)
    assert (result.facts.loss_before, result.facts.loss_after) == (report.loss_before, report.loss_after)
    assert (result.facts.steps, result.before) == (8, None)
    assert replaced == [tuple(sorted({read_headers(directory)[name].file for name in result.tensors}))]
    assert read_manifest(directory) == read_manifest(out)
    verify_files(directory, validate_packed(directory))


def test_repairs_add_up(repaired: tuple[Path, Any], text: Path, tmp_path: Path) -> None:
    out, _ = repaired
    repair.run(out, tmp_path / "twice", calibration=str(text), **{**SIZES, "epochs": 1})
    assert [done["routers"]["epochs"] for done in read_manifest(tmp_path / "twice").recipe["repairs"]] == [2, 1]


Refusal = tuple[dict[str, Any], type[MoeqError], tuple[str, ...]]
REFUSED: dict[str, Refusal] = {
    "kl without reference": ({"loss": "kl"}, OptionError, ("option reference", "use task")),
    "unknown loss": ({"loss": "mse"}, OptionError, ("option loss", "task, kl")),
    "no learning rate": ({"lr": 0.0}, OptionError, ("option router-lr",)),
    "no epochs": ({"epochs": 0}, OptionError, ("option router-epochs",)),
    "text too short": ({"nsamples": 4000}, CalibrationError, ("tokens", "4000 samples")),
    "no text": ({"calibration": "nowhere.txt"}, CalibrationError, ("nowhere.txt", "does not exist")),
    "one token": ({"seqlen": 1}, OptionError, ("option seqlen",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, rough_tiny: Path, text: Path, tmp_path: Path) -> None:
    changes, kind, words = REFUSED[case]
    options = {"calibration": str(text), **SIZES, **changes}
    refused(kind, lambda: repair.run(rough_tiny, tmp_path / "out", **options), *words)
    no_partial(tmp_path / "out")


def test_another_model_is_no_reference(rough_tiny: Path, text: Path, tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", other := tmp_path / "other", seed=1, dtype=torch.bfloat16)
    for loss in ("task", "kl"):
        call = lambda loss=loss: repair.run(  # noqa: E731
            rough_tiny, tmp_path / "out", calibration=str(text), loss=loss, reference=other, **SIZES
        )
        refused(OptionError, call, "option reference", "made from")
    no_partial(tmp_path / "out")


def test_what_is_not_packed_is_refused(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    refused(
        PackedError,
        lambda: repair.run(tiny_dir, tmp_path / "out", calibration=str(text), **SIZES),
        "not a packed checkpoint",
    )
    no_partial(tmp_path / "out")


def test_damage_is_not_blessed_with_a_new_hash(rough_tiny: Path, text: Path, tmp_path: Path) -> None:
    damaged = copy_of(rough_tiny, tmp_path / "damaged")
    file = read_headers(damaged)["model.layers.0.mlp.gate.weight"].file
    flip(damaged / file, -1)
    refused(PackedError, lambda: repair.run(damaged, tmp_path / "out", calibration=str(text), **SIZES), "sha256", file)
    no_partial(tmp_path / "out")


def test_the_output_is_not_the_input(rough_tiny: Path, text: Path, tmp_path: Path) -> None:
    packed = copy_of(rough_tiny, tmp_path / "packed")
    for out in (packed, packed / "inside"):
        refused(OutputError, lambda out=out: repair.run(packed, out, calibration=str(text), **SIZES), "overlaps")
    (taken := tmp_path / "taken").mkdir()
    (taken / "file").touch()
    refused(OutputError, lambda: repair.run(packed, taken, calibration=str(text), **SIZES), "not empty")


@pytest.mark.parametrize("error", [PackedError("bad"), KeyboardInterrupt()])
def test_nothing_stays_after_an_error(
    error: BaseException, rough_tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path) -> None:
        assert (directory / "moeq.json").is_file()
        raise error

    monkeypatch.setattr(verify, "run", fail)
    with pytest.raises(type(error)):
        repair.run(rough_tiny, tmp_path / "out", calibration=str(text), **{**SIZES, "nsamples": 1})
    no_partial(tmp_path / "out")
